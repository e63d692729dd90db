"""Generated scenes: the pair of domains of the demo, and the driver's view that can stand in for a rendered data set."""

from .dataset import DRIVER, SOURCE, TARGET, Domain, GeneratedDataset, domain_of

__all__ = ["DRIVER", "SOURCE", "TARGET", "Domain", "GeneratedDataset", "domain_of"]
