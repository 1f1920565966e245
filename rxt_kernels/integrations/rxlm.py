"""The drop-in for the upstream library `rxlm`: the door, whose house is :mod:`rxt_model.drop_in`.

    from rxt_kernels.integrations.rxlm import accelerate, restore

`rxt_kernels` never imports `rxt_model`, with this module as the one exception: replacing the forward pass of a model takes
modules, and users look for it here. Nothing else in `rxt_kernels` imports this module, so the operations stay free of models.
"""

from __future__ import annotations

from rxt_model.drop_in import NothingAcceleratedError, Replaced, Report, Skipped, accelerate, restore

__all__ = ["NothingAcceleratedError", "Replaced", "Report", "Skipped", "accelerate", "restore"]
