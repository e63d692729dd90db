"""The ops: checks, autograd and the pick of a backend. Pure functions, no state, no files."""

from .class_moments import ClassMoments, class_moments
from .labels import agreement_labels, check_labels, labels_on
from .move_prototypes import move_prototypes_, moved_prototypes
from .prototype_contrastive_loss import prototype_contrastive_loss
from .upsampled_cross_entropy import upsampled_cross_entropy
from .upsampled_prediction import Prediction, upsampled_prediction

__all__ = [
    "ClassMoments",
    "Prediction",
    "agreement_labels",
    "check_labels",
    "class_moments",
    "labels_on",
    "move_prototypes_",
    "moved_prototypes",
    "prototype_contrastive_loss",
    "upsampled_cross_entropy",
    "upsampled_prediction",
]
