"""Rotary position embedding with both output layouts."""

from rxt_kernels.rotary.op import LAYOUTS, rotary
from rxt_kernels.rotary.reference import rotary_reference

__all__ = ["LAYOUTS", "rotary", "rotary_reference"]
