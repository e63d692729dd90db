"""What is kept from step to step: the prototypes and the thresholds of pseudo-labels. The only state of the package outside of nets."""

from .bank import PrototypeBank
from .centre import TeacherCentre
from .class_memory import ClassMemory
from .clusters import PrototypeClusters
from .mixture import GaussianMixture
from .thresholds import PseudoLabelThresholds

__all__ = [
    "ClassMemory",
    "GaussianMixture",
    "PrototypeBank",
    "PrototypeClusters",
    "PseudoLabelThresholds",
    "TeacherCentre",
]
