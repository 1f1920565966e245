"""The GPUs that kernels are compiled for, and their limits as their makers publish them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """One architecture, with the figures of one product.

    Attributes:
        name: what ``--target`` takes.
        product: whose figures these are.
        backend: ``cuda`` or ``hip``.
        architecture: as the compiler names it.
        warp_size: threads of a warp or wavefront.
        registers: 32-bit registers of a multiprocessor, per lane of a warp.
        most_registers: that one thread can have.
        most_warps: warps that a multiprocessor holds.
        shared_memory: bytes of a multiprocessor.
        most_shared_memory: bytes that one program can have.
        bandwidth: bytes per second of the main memory.
        matrix_rate: bfloat16 operations per second of the matrix units, without sparsity.
        matrix_instruction: regular expression of a matrix instruction in the assembly.
    """

    name: str
    product: str
    backend: str
    architecture: int | str
    warp_size: int
    registers: int
    most_registers: int
    most_warps: int
    shared_memory: int
    most_shared_memory: int
    bandwidth: float
    matrix_rate: float
    matrix_instruction: str

    def compiler_target(self) -> Any:
        """The same as Triton's ``GPUTarget``."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.architecture, self.warp_size)

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Share of the warps of a multiprocessor that programs of this size can fill, from 0 to 1.

        Example:
            >>> TARGETS["sm_90"].occupancy(registers=128, shared=0, warps=4)
            0.25
        """
        # Registers are handed out to a warp in steps of 8 per thread.
        per_warp = -(-max(registers, 1) // 8) * 8 * self.warp_size
        programs = min(self.registers // (per_warp * warps), self.most_warps // warps)
        if shared:
            programs = min(programs, self.shared_memory // shared)
        return programs * warps / self.most_warps


_NVIDIA: Mapping[str, Any] = {
    "backend": "cuda", "warp_size": 32, "registers": 65536, "most_registers": 255, "most_warps": 64,
}  # fmt: skip

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="sm_80", product="A100 80 GB", architecture=80, shared_memory=164 << 10, most_shared_memory=163 << 10,
            bandwidth=2.04e12, matrix_rate=312e12, matrix_instruction=r"\bHMMA\b", **_NVIDIA,
        ),
        Target(
            name="sm_90", product="H100 SXM", architecture=90, shared_memory=228 << 10, most_shared_memory=227 << 10,
            bandwidth=3.35e12, matrix_rate=989e12, matrix_instruction=r"\bH?HMMA\b|\bHGMMA\b", **_NVIDIA,
        ),
        Target(
            name="sm_100", product="B200", architecture=100, shared_memory=228 << 10, most_shared_memory=227 << 10,
            bandwidth=8.0e12, matrix_rate=2250e12, matrix_instruction=r"\bHMMA\b|\bUTC[A-Z]*MMA\b", **_NVIDIA,
        ),
        Target(
            name="gfx942", product="MI300X", backend="hip", architecture="gfx942", warp_size=64, registers=131072,
            most_registers=512, most_warps=32, shared_memory=64 << 10, most_shared_memory=64 << 10,
            bandwidth=5.3e12, matrix_rate=1307e12, matrix_instruction=r"\bv_mfma_",
        ),
    )
}  # fmt: skip
"""By name."""
