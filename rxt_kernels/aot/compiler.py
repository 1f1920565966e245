"""Compile a recorded launch for one target, and read off the compiled code what a program of it costs."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rxt_kernels.aot.addresses import narrow_products
from rxt_kernels.aot.assembly import Code, Instruction, innermost_loops, read_amd, read_nvidia
from rxt_kernels.aot.intermediate import loads, matrix_products, needs_wide_loads, touched
from rxt_kernels.aot.targets import TARGETS, Target
from rxt_kernels.triton_runtime import Launch

__all__ = ["Compiled", "Job", "compile_job", "compiler_cache", "failed", "inspect", "job_of"]

WIDE = 128
SCALAR = 32
"""Bits that a thread moves at once: what it should, and what is one value at a time."""


@dataclass(frozen=True)
class Job:
    """A kernel with everything that decides what its compiled code is; two launches with equal jobs share their code.

    Attributes:
        module: that defines it.
        kernel: its name there.
        target: the architecture.
        types: of its arguments, by name.
        constants: place in the argument list, and value.
        attributes: place in the argument list, and what is known of the value, such as that 16 divides it.
        options: ``num_warps``, ``num_stages`` and other options of the compiler.
    """

    module: str
    kernel: str
    target: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        """The same as text."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Compiled:
    """What one kernel costs on one target. Nothing of it was measured by running it.

    Attributes:
        kernel: its name.
        target: the architecture.
        tile: block sizes and how heads are shared: compile-time numbers that are written in capitals.
        switches: what is compiled in: compile-time truth values.
        warps: of a program.
        stages: of software pipelines.
        registers: per thread.
        spilled: bytes of registers per thread that went to memory.
        spilled_scalars: values of a whole wavefront that went to lanes of vector registers (AMD); no memory is touched.
        stack: bytes per thread; the math library's sines have an array there, which is no spill.
        shared: bytes of shared memory of a program.
        occupancy: share of a multiprocessor's warps that programs fill, by registers and shared memory.
        loops: innermost loops that touch global memory or multiply matrices.
        matrix_in_loops: matrix instructions in them.
        matrix_instructions: in the whole code, by name without sizes.
        wide_share: share of the bytes that move in accesses of 128 bits or more, in these loops or, without loops, in all.
        scalar_loads: places in these loops where tiles are loaded in pieces of at most 32 bits.
        read: arguments that it reads.
        written: arguments that it writes.
        failure: why it could not be compiled; None if it was.
        problems: what is wrong with it, in sentences.
    """

    kernel: str
    target: str
    tile: Mapping[str, int]
    switches: Mapping[str, bool]
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spilled: int = 0
    spilled_scalars: int = 0
    stack: int = 0
    shared: int = 0
    occupancy: float = 0.0
    loops: int = 0
    matrix_in_loops: int = 0
    matrix_instructions: Mapping[str, int] | None = None
    wide_share: float = 0.0
    scalar_loads: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    failure: str | None = None
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@contextmanager
def compiler_cache(directory: str | Path) -> Iterator[None]:
    """Triton keeps what it compiles in this directory inside the block, and nowhere else."""
    from triton import knobs

    before = knobs.cache.dir
    knobs.cache.dir = str(directory)
    try:
        yield
    finally:
        knobs.cache.dir = before


def job_of(launch: Launch, target: Target) -> Job:
    """What Triton would compile for this launch: types, constants and divisibilities are found by its own binder."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    backend = make_backend(target.compiler_target())
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.arguments, **launch.options, debug=False)
    _, types, constants, attributes = kernel._pack_args(
        backend, {**launch.options, "debug": False}, bound, specialization, None
    )
    options = {name: value for name, value in launch.options.items() if name not in kernel.arg_names}
    return Job(
        kernel.fn.__module__,
        kernel.fn.__name__,
        target.name,
        tuple(types.items()),
        tuple(constants.items()),
        tuple((place, known) for place, known in attributes.items() if known),
        tuple(sorted(options.items())),
    )


def _constants(job: Job, kernel: Any) -> tuple[dict[str, int], dict[str, bool]]:
    """Compile-time numbers and truth values that are written in capitals."""
    named = {kernel.arg_names[place[0]]: value for place, value in job.constants}
    named = {name: value for name, value in named.items() if name.isupper()}
    return (
        {name: value for name, value in named.items() if type(value) is int},
        {name: value for name, value in named.items() if type(value) is bool},
    )


def _kernel(job: Job) -> Any:
    return getattr(importlib.import_module(job.module), job.kernel)


def failed(job: Job, reason: str) -> Compiled:
    """The report of a kernel that could not be compiled."""
    tile, switches = _constants(job, _kernel(job))
    return Compiled(
        job.kernel, job.target, tile, switches, failure=reason, problems=(f"it does not compile: {reason}.",)
    )


def compile_job(job: Job) -> Compiled:
    """Compile and read; takes about two seconds, and needs Triton but no GPU."""
    import triton
    from triton.compiler import ASTSource

    kernel, target = _kernel(job), TARGETS[job.target]
    source = ASTSource(kernel, dict(job.types), dict(job.constants), dict(job.attributes))
    try:
        compiled = triton.compile(source, target=target.compiler_target(), options=dict(job.options))
    # Whatever the compiler stumbles over belongs into the report, under the name of the kernel.
    except Exception as error:
        return failed(job, (str(error).strip().splitlines() or [type(error).__name__])[-1])
    return _read(job, *_constants(job, kernel), target, compiled)


class _Resources(NamedTuple):
    registers: int
    spilled: int
    spilled_scalars: int
    stack: int
    code: Code


def _read(job: Job, tile: Mapping[str, int], switches: Mapping[str, bool], target: Target, compiled: Any) -> Compiled:
    resources = (_nvidia if target.backend == "cuda" else _amd)(compiled.asm)
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    intermediate = str(compiled.asm["ttir"])
    inspected = inspect(resources.code, intermediate, target)
    arguments = touched(intermediate)
    problems = list(inspected.problems)
    if resources.spilled:
        problems.append(f"it spills {resources.spilled} bytes per thread.")
    if shared > target.most_shared_memory:
        problems.append(f"it wants {shared} bytes of shared memory; a program can have {target.most_shared_memory}.")
    return Compiled(
        kernel=job.kernel,
        target=job.target,
        tile=tile,
        switches=switches,
        warps=warps,
        stages=int(compiled.metadata.num_stages),
        registers=resources.registers,
        spilled=resources.spilled,
        spilled_scalars=resources.spilled_scalars,
        stack=resources.stack,
        shared=shared,
        occupancy=target.occupancy(resources.registers, shared, warps),
        loops=inspected.loops,
        matrix_in_loops=inspected.matrix_in_loops,
        matrix_instructions=inspected.matrix_instructions,
        wide_share=inspected.wide_share,
        scalar_loads=inspected.scalar_loads,
        read=arguments.read,
        written=arguments.written,
        problems=tuple(problems),
    )


class Inspected(NamedTuple):
    """What the instructions of a kernel say; fields as in :class:`Compiled`."""

    loops: int
    matrix_in_loops: int
    matrix_instructions: dict[str, int]
    wide_share: float
    scalar_loads: tuple[str, ...]
    problems: tuple[str, ...]


def inspect(code: Code, intermediate: str, target: Target) -> Inspected:
    """Compare what a kernel means to do with the instructions that came of it."""
    is_matrix = re.compile(target.matrix_instruction).fullmatch

    def multiplies(step: Instruction) -> bool:
        return is_matrix(step.name.split(".")[0]) is not None

    hot = innermost_loops(code, lambda step: step.access is not None or multiplies(step))
    names = Counter(step.name.split(".")[0] for step in code.instructions if multiplies(step))
    matrix_in_loops = sum(multiplies(step) for loop in hot for step in loop)
    scalar = _scalar_loads(hot, intermediate)
    problems = []
    products = [product for product in matrix_products(intermediate) if product.is_for_matrix_units]
    if products and not names:
        problems.append("it multiplies tiles without any matrix instruction.")
    elif any(product.is_in_loop for product in products) and hot and not matrix_in_loops:
        problems.append("it multiplies tiles in a loop, and has no matrix instruction in an innermost loop.")
    problems += [f"it loads a tile in pieces of at most {SCALAR} bits in a loop: {place}." for place in scalar]
    problems += [f"it computes an offset in 32 bits: {product}." for product in narrow_products(intermediate)]
    share = _wide_share([step for loop in hot for step in loop] or code.instructions)
    return Inspected(len(hot), matrix_in_loops, dict(sorted(names.items())), share, tuple(scalar), tuple(problems))


def _scalar_loads(loops: Sequence[Sequence[Instruction]], intermediate: str) -> list[str]:
    """Where tiles are loaded value by value; a load that comes from nowhere in the source counts as one of a tile."""
    known = loads(intermediate)
    needing = needs_wide_loads(known)
    exempt = {load.place for load in known} - needing
    places = {
        step.place
        for loop in loops
        for step in loop
        if step.access is not None and step.access.is_load and step.access.bits <= SCALAR and step.place not in exempt
    }
    return sorted(f"{'/'.join(Path(place[0]).parts[-2:])}:{place[1]}" if place else "unknown" for place in places)


def _wide_share(steps: Sequence[Instruction]) -> float:
    bits = [step.access.bits for step in steps if step.access is not None]
    return round(sum(width for width in bits if width >= WIDE) / sum(bits), 3) if bits else 0.0


def _tool(name: str) -> Path:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise RuntimeError(f"{name} is not in this installation of Triton; install Triton's wheel for Linux.")
    return path


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _nvidia(asm: Mapping[str, Any]) -> _Resources:
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _output(_tool("cuobjdump"), "-res-usage", cubin))
        if usage is None:
            raise RuntimeError("cuobjdump said nothing about registers; its output has a form that is not known here.")
        code = read_nvidia(_output(_tool("nvdisasm"), "-c", "-g", cubin))
        # Local memory holds spilled registers, and an array of the math library's sines. The assembler knows which.
        spilled = 0
        if any(step.name.split(".")[0] in ("STL", "LDL") for step in code.instructions):
            spilled = _spilled_by_assembler(str(asm["ptx"]), Path(directory))
    return _Resources(int(usage[1]), spilled, 0, int(usage[2]), code)


def _spilled_by_assembler(assembly: str, directory: Path) -> int:
    """What ptxas, asked as Triton asks it, says that it spills: bytes stored per thread."""
    source = directory / "kernel.ptx"
    source.write_text(assembly, encoding="utf-8")
    architecture = re.search(r"^\.target (sm_\w+)", assembly, re.MULTILINE)
    assert architecture is not None
    is_newer = int(re.sub(r"\D", "", architecture[1])) >= 100
    said = _output(
        _tool("ptxas-blackwell" if is_newer else "ptxas"), "-v", "-lineinfo", "--regAllocOptLevel=2",
        f"--gpu-name={architecture[1]}", source, "-o", directory / "again.cubin",
    )  # fmt: skip
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if found is None:
        raise RuntimeError("ptxas said nothing about spills; its output has a form that is not known here.")
    return max(int(found[1]), int(found[2]))


def _amd(asm: Mapping[str, Any]) -> _Resources:
    assembly = str(asm["amdgcn"])

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly has no {name}; it has a form that is not known here.")
        return int(found[1])

    # The count of vector registers includes the accumulation registers.
    return _Resources(
        value("vgpr_count"), 4 * value("vgpr_spill_count"), value("sgpr_spill_count"),
        value("private_segment_fixed_size"), read_amd(assembly),
    )  # fmt: skip
