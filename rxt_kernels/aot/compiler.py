"""Compile one recorded launch for one target, and read off the result what it costs."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rxt_kernels.aot.targets import Target
from rxt_kernels.triton_runtime import Launch

__all__ = ["Compiled", "compile_launch", "signature"]

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
    torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
_LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Compiled:
    """What one kernel costs on one target. Nothing of it was measured by running it.

    Attributes:
        kernel: its name.
        target: the architecture.
        constants: compile-time constants.
        registers: per thread.
        spilled: bytes of a thread's registers that went to memory.
        shared: bytes of shared memory of a program.
        warps: of a program.
        occupancy: share of a multiprocessor's warps, by registers and shared memory.
        matrix_instructions: in the whole code.
        wide_accesses: share of global loads and stores that move 128 bits.
        accesses: global loads and stores in the code.
        programs: in the grid.
        traffic: bytes of all tensors that it is given, each touched once: what it must move at least.
        bound: seconds that the traffic takes at the target's full bandwidth.
        problems: what is wrong with it, in sentences.
    """

    kernel: str
    target: str
    constants: Mapping[str, Any]
    registers: int
    spilled: int
    shared: int
    warps: int
    occupancy: float
    matrix_instructions: int
    wide_accesses: float
    accesses: int
    programs: int
    traffic: int
    bound: float
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and known divisibilities of a launch, by the rules by which Triton specialises a call."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: dict[tuple[int, ...], list[list[Any]]] = {}
    names = launch.kernel.arg_names
    for index, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, Tensor):
            types[name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1:
            types[name], constants[name] = "constexpr", 1
        else:
            types[name] = "i32" if -_LARGEST_INT32 - 1 <= value <= _LARGEST_INT32 else "i64"
            if value % 16 == 0:
                divisible[(index,)] = [["tt.divisibility", 16]]
    for name, value in launch.options.items():
        if name in names:
            types[name], constants[name] = "constexpr", value
    return types, constants, divisible


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile what was recorded. Takes about a second; needs Triton, and no GPU.

    Raises:
        RuntimeError: the tools that read compiled code are missing.
    """
    import triton
    from triton.compiler import ASTSource

    types, constants, divisible = signature(launch)
    options = {name: value for name, value in launch.options.items() if name not in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, types, constants, divisible)
    compiled = triton.compile(source, target=target.compiler_target(), options=options)
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    registers, spilled, assembly, narrow, wide = read(compiled.asm)
    matrix = len(re.findall(target.matrix_instruction, assembly))
    tensors = {t.data_ptr(): t for t in launch.arguments if isinstance(t, Tensor)}
    traffic = sum(t.numel() * t.element_size() for t in tensors.values())
    programs = 1
    for size in launch.grid:
        programs *= size
    problems = []
    if spilled:
        problems.append(f"it spills {spilled} bytes per thread.")
    if shared > target.most_shared_memory:
        problems.append(
            f"it wants {shared} bytes of shared memory, and a program can have {target.most_shared_memory}."
        )
    if "tt.dot" in compiled.asm["ttir"] and not matrix and _multiplies_halves(compiled.asm["ttir"]):
        problems.append("it has a dot of half-precision tiles and no matrix instruction.")
    return Compiled(
        kernel=launch.kernel.fn.__name__,
        target=target.name,
        constants={name: value for name, value in constants.items() if name.isupper()},
        registers=registers,
        spilled=spilled,
        shared=shared,
        warps=warps,
        occupancy=target.occupancy(registers, shared, warps),
        matrix_instructions=matrix,
        wide_accesses=wide / (wide + narrow) if wide + narrow else 0.0,
        accesses=wide + narrow,
        programs=programs,
        traffic=traffic,
        bound=traffic / target.bandwidth,
        problems=tuple(problems),
    )


def _multiplies_halves(intermediate: str) -> bool:
    return any("bf16" in line or "f16" in line for line in intermediate.splitlines() if "tt.dot" in line)


def _tool(name: str) -> Path:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise RuntimeError(f"{name} is not in this installation of Triton; install Triton's wheel for Linux.")
    return path


def _read_nvidia(asm: Mapping[str, Any]) -> tuple[int, int, str, int, int]:
    """Registers, spilled bytes, assembly, narrow and 128-bit global accesses of a cubin."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True)
        assembly = subprocess.run([_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(
            "cuobjdump said nothing about registers; its output has another form than this version knows."
        )
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS|UBLKCP|UTMALDG)(\.[A-Z0-9.]*)?", assembly)
    wide = sum(".128" in access for access in accesses)
    return int(found[1]), int(found[2]), assembly, len(accesses) - wide, wide


def _read_amd(asm: Mapping[str, Any]) -> tuple[int, int, str, int, int]:
    """The same of the assembly of an AMD kernel; its accumulation registers count as registers."""
    assembly = str(asm["amdgcn"])

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    registers = max(value("vgpr_count"), value("vgpr_count") + value("agpr_count"))
    accesses = re.findall(r"\b(?:global|buffer)_(?:load|store)_(\w+)", assembly)
    wide = sum("dwordx4" in access or "b128" in access for access in accesses)
    return registers, 4 * value("vgpr_spill_count"), assembly, len(accesses) - wide, wide


def as_json(results: list[dict[str, Any]]) -> str:
    """One result per line, sorted keys, so that a change of one kernel is a change of its line."""
    lines = ",\n".join("  " + json.dumps(result, sort_keys=True) for result in results)
    return f"[\n{lines}\n]\n"
