"""What all native CPU kernels share: the extension, why it is missing where it is, and its instruction set.

The extension ``rxt_kernels._native`` is built from ``csrc/`` when the package is installed. It picks the highest instruction
set that the machine has; the environment variable ``RXT_KERNELS_INSTRUCTION_SET`` chooses a lower one. Tests with sanitizers
or with emulated AVX-512 name another build of it in ``RXT_KERNELS_EXTENSION``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch  # before the extension, so that both use the thread pool that torch brought
from torch import Tensor

from .native_sources import fingerprint

__all__ = [
    "available",
    "extension",
    "instruction_set",
    "instruction_sets",
    "is_plain_call",
    "neighbouring_rows",
    "unavailable",
    "unsupported_tensors",
    "use_instruction_set",
]

DTYPES = frozenset({torch.float32, torch.bfloat16})
INSTRUCTION_SET_VARIABLE = "RXT_KERNELS_INSTRUCTION_SET"
EXTENSION_VARIABLE = "RXT_KERNELS_EXTENSION"


def _import() -> Any:
    name, path = "rxt_kernels._native", os.environ.get(EXTENSION_VARIABLE)
    if not path:
        return import_module(name)
    specification = spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"{EXTENSION_VARIABLE} is {path!r}, which is no extension module")
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _outdated(module: Any, checkout: Path) -> str | None:
    """Why the extension does not belong to this checkout of the project, in one sentence; None if it does."""
    sources = checkout / "csrc"
    if not (checkout / "setup.py").exists() or not (sources / "bindings.cpp").exists():
        return None  # installed without its sources
    if getattr(module, "sources", None) == fingerprint(sources):
        return None
    return "The native CPU kernels are off: they were built from other sources than csrc/ has now; run `make native`."


def _load() -> tuple[Any, str | None]:
    """The extension, or None and the reason why there is none."""
    try:
        module = _import()
    except ImportError as error:
        report = Path(__file__).with_name("_native_build.txt")
        built = report.read_text(encoding="utf-8").strip() if report.exists() else ""
        if built and built != "built":
            return None, f"The native CPU kernels were not built: {built}"
        return None, f"The native CPU kernels cannot be loaded ({error}); install the package again to build them."
    if outdated := _outdated(module, Path(__file__).parent.parent):
        warnings.warn(outdated, RuntimeWarning, stacklevel=2)
        return None, outdated
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE)
    try:
        if wanted:
            module.use_instruction_set(wanted)
        module.instruction_set()
    except (ValueError, RuntimeError) as error:
        return None, f"The native CPU kernels are off: {INSTRUCTION_SET_VARIABLE} is {wanted!r}, but {error}"
    return module, None


extension, _reason = _load()
"""The extension module; None where it is missing."""


def unavailable() -> str | None:
    """Why no native kernel can run in this process, in one sentence; None if they can.

    Example:
        >>> (unavailable() is None) == available()
        True
    """
    return _reason


def available() -> bool:
    """Whether native kernels can run in this process."""
    return _reason is None


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that this build has and this machine can run, in rising order.

    Example:
        >>> set(instruction_sets()) <= {"portable", "avx2", "avx512", "avx512_bf16"}
        True
    """
    return tuple(extension.instruction_sets()) if available() else ()


def instruction_set() -> str | None:
    """The instruction set that kernels use now; None without the extension."""
    return extension.instruction_set() if available() else None


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Make kernels use another instruction set inside the block, in all threads.

    Raises:
        ValueError: the name is unknown, not built, or not supported by this machine.
        RuntimeError: there is no extension.

    Example:
        >>> if available():
        ...     with use_instruction_set(instruction_sets()[0]):
        ...         assert instruction_set() == instruction_sets()[0]
    """
    if _reason is not None:
        raise RuntimeError(_reason)
    before = extension.instruction_set()
    extension.use_instruction_set(name)
    try:
        yield
    finally:
        extension.use_instruction_set(before)


def unsupported_tensors(*tensors: Tensor | None) -> str | None:
    """Why native kernels cannot take these tensors, in one sentence; None if they can.

    They are on the CPU, dense, all float32 or all bfloat16, and not wrapped by torch.func.
    """
    if _reason is not None:
        return _reason
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms are at work, which native kernels do not know."
    first = None
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}; native kernels work in CPU memory."
        if tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}; native kernels take float32 and bfloat16."
        first = first or tensor.dtype
        if tensor.dtype is not first:
            return f"tensors are {first} and {tensor.dtype}; native kernels take one dtype."
    return None


def neighbouring_rows(x: Tensor) -> Tensor:
    """x (..., D) as rows (N, D) of neighbouring values, as kernels read them: a view where that is possible."""
    rows = x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def is_plain_call(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called directly: nothing is traced, recorded for gradients, or watched by a dispatch mode.

    Otherwise the call goes through its ``torch.library`` operation, which costs ten microseconds more.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(tensor is not None and tensor.requires_grad for tensor in tensors)
