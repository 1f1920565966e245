"""Writing safetensors files: the same tensors always give the same bytes.

The format's own writer puts metadata in an arbitrary order and gathers all tensors in memory first; this one sorts, and
moves one tensor at a time to the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rxt_model.checkpoint.reader import DTYPES

__all__ = ["write_safetensors"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; the caller takes care of a temporary name.

    Args:
        tensors: name to tensor, any device, any strides; tensors that share memory are written separately.
        path: the file.
        metadata: string to string.

    Raises:
        ValueError: a tensor's type has no name in the format.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> path = Path(tempfile.mkdtemp()) / "x.safetensors"
        >>> write_safetensors({"a": torch.ones(2)}, path, metadata={})
        >>> load_file(path)
        {'a': tensor([1., 1.])}
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(
                f"key {name!r}: the type {tensor.dtype} cannot be stored; accepted: {', '.join(_NAMES.values())}."
            )
    # Wide types first, then by name: the order of the format's own writer, which keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for name in order:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
