"""The vocabulary head and its cross-entropy as one operation."""

from rxt_kernels.linear_cross_entropy.op import linear_cross_entropy
from rxt_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
