"""sslops: fused kernels for self-supervised learning in PyTorch."""

from .backend import explain
from .ops.nt_xent import nt_xent

__version__ = "0.1.0"
__all__ = ["explain", "nt_xent"]
