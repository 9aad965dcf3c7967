"""Stands in for torch: it has a version and nothing else."""

from torch import version
from torch.version import __version__

__all__ = ["__version__", "version"]
