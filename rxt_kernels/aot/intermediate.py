"""What a kernel means to do, read in Triton's intermediate representation: loads, matrix products, arguments touched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rxt_kernels.aot.assembly import Place

__all__ = ["Load", "MatrixProduct", "Touched", "loads", "matrix_products", "needs_wide_loads", "touched"]

_FILE = re.compile(r'^(#loc\d*) = loc\("([^"]+)":(\d+):\d+\)')
_CALL = re.compile(r"^(#loc\d*) = loc\(callsite\((#loc\d*) at #loc\d*\)\)")
_NAMED = re.compile(r'^(#loc\d*) = loc\("[^"]*"\((#loc\d*)\)\)')
_LOAD = re.compile(r"tt\.load .* : (?:tensor<((?:\d+x)*)!tt\.ptr<\w+>|!tt\.ptr<\w+>).* loc\((#loc\d*)\)")
_DOT = re.compile(r"tt\.dot .*: tensor<(?:\d+x)+(\w+)")
_ARGUMENT = re.compile(r"(%\w+): !tt\.ptr<")
_OPERATION = re.compile(r"^\s*(?:(%[\w#]+)(?::\d+)? = )?([\w.]+)(.*)$")
_VALUE = re.compile(r"%[\w#]+")
_CARRIED = re.compile(r"(%\w+) = (%[\w#]+)")
_TENSOR_FLOAT = re.compile(r"inputPrecision = (?:tf32|bf16)")


_PASS_POINTERS_ON = frozenset({
    "tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.bitcast", "arith.select"
})  # fmt: skip


class Load(NamedTuple):
    """A load: how many values along each side (none for a single value), and where it is written."""

    shape: tuple[int, ...]
    place: Place | None


class MatrixProduct(NamedTuple):
    """A matrix product of tiles: whether matrix units can take it at the precision asked for, whether it is in a loop."""

    is_for_matrix_units: bool
    is_in_loop: bool


def _places(intermediate: str) -> dict[str, Place]:
    """Source file and line of every location; of an inlined function its own line, not that of the call."""
    found: dict[str, Place] = {}
    passed_on: dict[str, str] = {}
    for line in intermediate.splitlines():
        if match := _FILE.match(line):
            found[match[1]] = match[2], int(match[3])
        elif match := _CALL.match(line) or _NAMED.match(line):
            passed_on[match[1]] = match[2]
    for name in passed_on:
        source = name
        while source in passed_on:
            source = passed_on[source]
        if source in found:
            found[name] = found[source]
    return found


def loads(intermediate: str) -> list[Load]:
    """Every load of the kernel."""
    places = _places(intermediate)
    result = []
    for line in intermediate.splitlines():
        if match := _LOAD.search(line):
            shape = tuple(int(side) for side in (match[1] or "").split("x") if side)
            result.append(Load(shape, places.get(match[2])))
    return result


def matrix_products(intermediate: str) -> list[MatrixProduct]:
    """Every matrix product of tiles. Those of float32 at IEEE precision are not for the matrix units of every GPU."""
    result = []
    regions: list[bool] = []
    for line in intermediate.splitlines():
        text = line.strip()
        if text.startswith("}") and regions:
            regions.pop()
        if match := _DOT.search(line):
            halves = match[1] in ("f16", "bf16")
            result.append(MatrixProduct(halves or bool(_TENSOR_FLOAT.search(line)), any(regions)))
        if re.sub(r" loc\(.*\)$", "", text).endswith("{"):
            regions.append("scf.for" in text or "scf.while" in text)
    return result


def _is_tile(shape: Sequence[int]) -> bool:
    return sum(side > 1 for side in shape) > 1


def needs_wide_loads(all_loads: Sequence[Load]) -> set[Place | None]:
    """The places whose loads must be wider than 32 bits for a thread.

    Tiles must. A vector need not if it has at most one value for every row or column of the largest tile of the kernel, such
    as a mask, the lengths, statistics of rows, or the rows that a gather reads: there are fewer of them than threads times
    128 bits, and every thread wants the values of its own rows. A vector in a kernel without tiles is the data itself, and
    must. Single values need not.
    """
    side = max((max(load.shape) for load in all_loads if _is_tile(load.shape)), default=1)
    return {
        load.place for load in all_loads if _is_tile(load.shape) or (load.shape and max(load.shape) > max(side, 1))
    }  # fmt: skip


class Touched(NamedTuple):
    """Names of the arguments that a kernel reads from and writes to; those that only stand in are in neither."""

    read: tuple[str, ...]
    written: tuple[str, ...]


def touched(intermediate: str) -> Touched:
    """Follow every pointer back to the argument that it comes from.

    Raises:
        ValueError: a pointer comes from nowhere; the representation has a form that is not known here.
    """
    origin: dict[str, str] = {}
    read: dict[str, None] = {}
    written: dict[str, None] = {}
    for line in intermediate.splitlines():
        if line.lstrip().startswith("tt.func"):
            origin |= {name: name[1:] for name in _ARGUMENT.findall(line)}
            continue
        match = _OPERATION.match(line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        operands = _VALUE.findall(rest)
        if operation == "scf.for" and "iter_args(" in rest:
            carried = _CARRIED.findall(rest[rest.index("iter_args(") :])
            for index, (inside, initial) in enumerate(carried):
                if initial in origin:
                    origin[inside] = origin[f"{result}#{index}"] = origin[initial]
                    if len(carried) == 1:
                        origin[str(result)] = origin[initial]
        elif operation in ("tt.load", "tt.store", "tt.atomic_rmw", "tt.atomic_cas"):
            pointer = next((operand for operand in operands if operand in origin), None)
            if pointer is None or (pointer != operands[0] and operation in ("tt.load", "tt.store")):
                raise ValueError(f"the pointer of {line.strip()!r} cannot be followed to an argument.")
            if operation != "tt.store":
                read[origin[pointer]] = None
            if operation != "tt.load":
                written[origin[pointer]] = None
        elif result is not None and operation in _PASS_POINTERS_ON:
            source = next((operand for operand in operands if operand in origin), None)
            if source is not None:
                origin[result] = origin[source]
    return Touched(tuple(read), tuple(written))
