"""The GPUs that kernels are compiled for, and their limits as their makers publish them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PARTITIONS", "TARGETS", "Target"]

PARTITIONS = 4
"""Every multiprocessor here is four schedulers with a quarter of the registers each; a warp lives in one of them."""


@dataclass(frozen=True)
class Target:
    """One architecture, with the figures of one product.

    Attributes:
        name: what ``--target`` takes.
        product: whose figures these are.
        backend: ``cuda`` or ``hip``.
        architecture: as the compiler names it.
        warp_size: threads of a warp or wavefront.
        registers: 32-bit registers of a multiprocessor, accumulation registers included.
        most_warps: warps that a multiprocessor holds.
        most_programs: programs that it holds.
        shared_memory: bytes of shared memory of a multiprocessor.
        reserved_memory: bytes of it that every program takes besides its own.
        most_shared_memory: bytes that one program can have.
        bandwidth: bytes per second of the main memory.
        matrix_rate: operations per second of the matrix units on half precision, without sparsity.
        vector_rate: operations per second on float32 outside of the matrix units.
        special_rate: exponentials, sines and the like per second, by instruction throughput and boost clock.
        matrix_instruction: regular expression of the name of a matrix instruction.
    """

    name: str
    product: str
    backend: str
    architecture: int | str
    warp_size: int
    registers: int
    most_warps: int
    most_programs: int
    shared_memory: int
    reserved_memory: int
    most_shared_memory: int
    bandwidth: float
    matrix_rate: float
    vector_rate: float
    special_rate: float
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
        # Registers are handed out to a warp in steps of 8 per thread, and a warp stays in its quarter.
        per_warp = -(-max(registers, 1) // 8) * 8 * self.warp_size
        resident = min(self.registers // PARTITIONS // per_warp * PARTITIONS, self.most_warps)
        programs = min(resident // warps, self.most_programs)
        if shared:
            programs = min(programs, self.shared_memory // (shared + self.reserved_memory))
        return programs * warps / self.most_warps


_NVIDIA: Mapping[str, Any] = {
    "backend": "cuda", "warp_size": 32, "registers": 65536, "most_warps": 64, "most_programs": 32, "reserved_memory": 1024,
    "matrix_instruction": r"[HIQBD]MMA|HGMMA|QGMMA|UTC[A-Z]*MMA",
}  # fmt: skip

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="sm_80", product="A100 80 GB", architecture=80, shared_memory=164 << 10, most_shared_memory=163 << 10,
            bandwidth=2.04e12, matrix_rate=312e12, vector_rate=19.5e12, special_rate=2.4e12, **_NVIDIA,
        ),
        Target(
            name="sm_90", product="H100 SXM", architecture=90, shared_memory=228 << 10, most_shared_memory=227 << 10,
            bandwidth=3.35e12, matrix_rate=989e12, vector_rate=67e12, special_rate=3.9e12, **_NVIDIA,
        ),
        Target(
            name="sm_100", product="B200", architecture=100, shared_memory=228 << 10, most_shared_memory=227 << 10,
            bandwidth=8.0e12, matrix_rate=2250e12, vector_rate=75e12, special_rate=4.4e12, **_NVIDIA,
        ),
        Target(
            name="gfx942", product="MI300X", backend="hip", architecture="gfx942", warp_size=64, registers=131072,
            most_warps=32, most_programs=16, shared_memory=64 << 10, reserved_memory=0, most_shared_memory=64 << 10,
            bandwidth=5.3e12, matrix_rate=1307e12, vector_rate=163e12, special_rate=10.2e12, matrix_instruction="v_mfma_.*",
        ),
    )
}  # fmt: skip
"""By name."""
