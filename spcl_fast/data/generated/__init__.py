"""Generated scenes: the pair of domains of the demo, and the driver's view that can stand in for a rendered data set."""

from .dataset import DOMAINS, GeneratedDataset

__all__ = ["DOMAINS", "GeneratedDataset"]
