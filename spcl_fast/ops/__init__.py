"""The ops: checks, autograd and the pick of a backend. Pure functions, no state, no files."""

from .balance import balance_
from .class_moments import ClassMoments, class_moments
from .labels import agreement_labels, check_labels, labels_on
from .majority import majority_labels
from .move_prototypes import move_prototypes_, moved_prototypes
from .prototype_contrastive_loss import prototype_contrastive_loss
from .prototype_logits import prototype_logits
from .teacher import TeacherTargets
from .upsampled_confusion import upsampled_confusion
from .upsampled_cross_entropy import upsampled_binary_cross_entropy, upsampled_cross_entropy
from .upsampled_prediction import Prediction, upsampled_prediction

__all__ = [
    "ClassMoments",
    "Prediction",
    "TeacherTargets",
    "agreement_labels",
    "balance_",
    "check_labels",
    "class_moments",
    "labels_on",
    "majority_labels",
    "move_prototypes_",
    "moved_prototypes",
    "prototype_contrastive_loss",
    "prototype_logits",
    "upsampled_binary_cross_entropy",
    "upsampled_confusion",
    "upsampled_cross_entropy",
    "upsampled_prediction",
]
