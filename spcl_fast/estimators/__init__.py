"""What is kept from step to step: prototypes, class statistics and thresholds of pseudo-labels, the only state outside of nets."""

from .bank import PrototypeBank
from .centre import TeacherCentre
from .class_memory import ClassMemory
from .clusters import PrototypeClusters
from .mean_bank import MeanBank
from .mixture import GaussianMixture
from .moments import ProtoEstimator
from .thresholds import PseudoLabelThresholds

__all__ = [
    "ClassMemory",
    "GaussianMixture",
    "MeanBank",
    "ProtoEstimator",
    "PrototypeBank",
    "PrototypeClusters",
    "PseudoLabelThresholds",
    "TeacherCentre",
]
