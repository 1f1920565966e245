"""The base of rotary frequencies, checked against the table a file stores."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rxt_model.checkpoint.errors import CheckpointError
from rxt_model.checkpoint.inference import ComponentFile

__all__ = ["StoredTensors", "settle_rotary_base"]

#: Relative error of a stored frequency; half-precision files hold rounded ones (spec section 3.4).
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


class StoredTensors(Protocol):
    """Where tensors are read from: a file, or a live model."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""


def settle_rotary_base(file: ComponentFile, fields: dict[str, Any], weights: StoredTensors) -> None:
    """Sets `rope_base` so that it explains the stored frequencies; they themselves are computed anew (spec 2.2).

    Upstream's ``update_max_len`` can change the base without the configuration learning of it, so where the two differ
    the table is right. From a rounded table a base is told to two significant digits.

    Raises:
        CheckpointError: the table has the form of no base.
    """
    key = min((key for key in file.shapes if key.endswith("rope.inv_freq")), default=None)
    if key is None or "rope_base" not in fields:
        return
    stored = weights.read(file.prefix + key)
    tolerance = _TOLERANCE.get(stored.dtype, 0.0)
    frequencies = stored.double()
    if _explains(fields["rope_base"], frequencies, tolerance):
        return
    if frequencies.numel() > 1 and 0.0 < float(frequencies[1]) < 1.0:
        base = float(frequencies[1]) ** -frequencies.numel()
        if base < 1e15:
            candidate = round(base) if tolerance < 1e-3 else int(float(f"{base:.1e}"))
            # The second frequency alone fixes the base only roughly; the last one is nearly its inverse.
            if not _explains(candidate, frequencies, tolerance) and 0.0 < float(frequencies[-1]) < 1.0:
                exact = float(frequencies[-1]) ** (-frequencies.numel() / (frequencies.numel() - 1))
                candidate = round(exact) if tolerance < 1e-3 else int(float(f"{exact:.1e}"))
            if candidate > 0 and _explains(candidate, frequencies, tolerance):
                fields["rope_base"] = candidate
                return
    raise CheckpointError(
        f"{file.at(key)} these rotary frequencies belong to no base (rope_base is {fields['rope_base']} in "
        f"{file.config_where} or by default)."
    )


def _explains(base: int, frequencies: Tensor, tolerance: float) -> bool:
    if base < 1:
        return False
    exponents = torch.arange(frequencies.numel(), dtype=torch.float64, device="cpu") / frequencies.numel()
    expected = float(base) ** -exponents
    return bool(torch.allclose(frequencies, expected, rtol=tolerance, atol=0.0))
