"""What is kept from step to step: the prototypes and the thresholds of pseudo-labels. The only state of the package outside of nets."""

from .bank import PrototypeBank
from .centre import TeacherCentre
from .clusters import PrototypeClusters
from .mixture import GaussianMixture
from .thresholds import PseudoLabelThresholds

__all__ = ["GaussianMixture", "PrototypeBank", "PrototypeClusters", "PseudoLabelThresholds", "TeacherCentre"]
