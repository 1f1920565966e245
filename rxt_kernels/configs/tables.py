"""Tables of block sizes: reading, checking, choosing, writing.

A table is a JSON file::

    {"architecture": "sm_90",
     "kernels": {"sqa_fwd": [{"up_to": 32, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
                             {"up_to": 256, "BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}]}}

The rows of a kernel are for growing widths; the first whose ``up_to`` is not below the width is taken. Widths count
half-precision elements: a float32 row counts twice, because it fills twice the registers and shared memory.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ConfigError",
    "Row",
    "Table",
    "architecture_of",
    "block_config",
    "for_architecture",
    "kernel_names",
    "load_table",
    "observe_configs",
    "override_config",
    "rows_of",
    "save_table",
]

Row = Mapping[str, int]
Table = Mapping[str, Sequence[Row]]

DEFAULT = "default"
ENVIRONMENT_VARIABLE = "RXT_KERNELS_CONFIGS"
LARGEST_BLOCK, MOST_WARPS, MOST_STAGES = 1024, 32, 8
_HERE = Path(__file__).parent
_OF_EVERY_KERNEL = ("up_to", "num_warps", "num_stages")

_logger = logging.getLogger("rxt_kernels")
_architectures: list[str] = []
_overrides: list[tuple[str, Row]] = []
_observers: list[list[tuple[str, int]]] = []


class ConfigError(ValueError):
    """A table of block sizes that cannot be used; the message names file, kernel and value."""


def _check_row(where: str, row: Any) -> Row:
    if not isinstance(row, dict) or not all(type(value) is int for value in row.values()):
        raise ConfigError(f"{where} is {row!r}; a row maps names to integers.")
    for name in _OF_EVERY_KERNEL:
        if name not in row:
            raise ConfigError(f"{where} has no {name}; a row has {', '.join(_OF_EVERY_KERNEL)} and block sizes.")
    for name, value in row.items():
        if name == "up_to":
            fits, accepted = value >= 1, "the largest width of the row, at least 1"
        elif name == "num_stages":
            fits, accepted = 1 <= value <= MOST_STAGES, f"1 to {MOST_STAGES}"
        else:
            most = MOST_WARPS if name == "num_warps" else LARGEST_BLOCK
            fits, accepted = 1 <= value <= most and value & (value - 1) == 0, f"a power of two of at most {most}"
        if not fits:
            raise ConfigError(f"{where} has {name} {value}; accepted is {accepted}.")
    return row


def _check_names(where: str, names: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - names):
        raise ConfigError(f"{where} lacks {', '.join(missing)}; it needs {', '.join(sorted(expected))}.")
    if unknown := sorted(names - expected):
        raise ConfigError(
            f"{where} has {', '.join(unknown)}, which is not known; it takes {', '.join(sorted(expected))}."
        )


def load_table(path: str | Path) -> tuple[str, Table]:
    """Read a table.

    Args:
        path: of the JSON file.

    Returns:
        The architecture it is for, and the rows of every kernel.

    Raises:
        ConfigError: the file cannot be read, is no table, or names a kernel or a block size that the table of defaults
            does not have; the message says where and why.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is no table of block sizes: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        raise ConfigError(f"{path} names no architecture; a table is an object with architecture and kernels.")
    kernels = content.get("kernels")
    if not isinstance(kernels, dict):
        raise ConfigError(f"{path} has no kernels; a table is an object with architecture and kernels.")
    architecture: str = content["architecture"]
    table: dict[str, tuple[Row, ...]] = {}
    for kernel, rows in kernels.items():
        if not isinstance(rows, list) or not rows:
            raise ConfigError(f"{path}: {kernel} has no rows; it takes a list of at least one.")
        table[kernel] = tuple(_check_row(f"{path}: {kernel}, row {index}", row) for index, row in enumerate(rows))
        limits = [row["up_to"] for row in table[kernel]]
        if limits != sorted(set(limits)):
            raise ConfigError(f"{path}: {kernel} has rows up to {', '.join(map(str, limits))}; they must grow.")
        known = table if Path(path) == _HERE / f"{DEFAULT}.json" else _packaged(DEFAULT)
        if kernel not in known:
            raise ConfigError(f"{path} has {kernel}, which is no kernel; kernels are {', '.join(sorted(known))}.")
        for index, row in enumerate(table[kernel]):
            _check_names(f"{path}: {kernel}, row {index},", set(row), set(known[kernel][0]))
    return architecture, table


def save_table(path: str | Path, architecture: str, table: Table) -> None:
    """Write a table, kernels by name and one row per line; a file that is there is replaced in one step."""
    kernels = (
        f"    {json.dumps(kernel)}: [\n"
        + ",\n".join(f"      {json.dumps(dict(row))}" for row in table[kernel])
        + "\n    ]"
        for kernel in sorted(table)
    )
    text = f'{{\n  "architecture": {json.dumps(architecture)},\n  "kernels": {{\n' + ",\n".join(kernels) + "\n  }\n}\n"
    target = Path(path)
    temporary = target.with_name(target.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)


@functools.cache
def _packaged(architecture: str) -> Table:
    path = _HERE / f"{architecture}.json"
    return load_table(path)[1] if path.is_file() else {}


@functools.cache
def _own(path: str, architecture: str) -> Table:
    """The user's table, if it is for this architecture or for all."""
    own_architecture, table = load_table(path)
    if own_architecture in (architecture, DEFAULT):
        return table
    _logger.warning(
        "%s=%s is for %s and this is %s: its block sizes are not used (said once)",
        ENVIRONMENT_VARIABLE, path, own_architecture, architecture,
    )  # fmt: skip
    return {}


@functools.cache
def _architecture_of_device(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{10 * major + minor}"


def architecture_of(tensor: Tensor) -> str:
    """The architecture that a kernel on this tensor runs on or is compiled for; ``default`` for the CPU.

    Example:
        >>> architecture_of(torch.empty(0))
        'default'
    """
    if _architectures:
        return _architectures[-1]
    if tensor.device.type != "cuda":
        return DEFAULT
    return _architecture_of_device(tensor.device.index if tensor.device.index is not None else 0)


@contextmanager
def for_architecture(name: str) -> Iterator[None]:
    """Choose block sizes for this architecture inside the block, whatever device tensors are on: for compiling ahead."""
    _architectures.append(name)
    try:
        yield
    finally:
        _architectures.pop()


@contextmanager
def override_config(kernel: str, row: Row) -> Iterator[None]:
    """Use these block sizes for one kernel inside the block: for tuning, and for tests of block edges."""
    _overrides.append((kernel, row))
    try:
        yield
    finally:
        _overrides.pop()


@contextmanager
def observe_configs() -> Iterator[list[tuple[str, int]]]:
    """The kernels whose block sizes are asked for inside the block, each with its width in half-precision elements.

    Example:
        >>> with observe_configs() as asked:
        ...     _ = block_config("sqa_fwd", torch.empty(0), 16)
        >>> asked
        [('sqa_fwd', 32)]
    """
    asked: list[tuple[str, int]] = []
    _observers.append(asked)
    try:
        yield asked
    finally:
        _observers.pop()


def _tables(architecture: str, own: str | None) -> Iterator[Table]:
    if own:
        yield _own(own, architecture)
    yield _packaged(architecture)
    yield _packaged(DEFAULT)


def kernel_names() -> tuple[str, ...]:
    """Every kernel that has block sizes.

    Example:
        >>> "sqa_fwd" in kernel_names()
        True
    """
    return tuple(sorted(_packaged(DEFAULT)))


def rows_of(kernel: str, architecture: str) -> Sequence[Row]:
    """The rows of a kernel that hold on an architecture: of the user's table, the architecture's, or the defaults.

    Raises:
        ConfigError: there is no such kernel.
    """
    for table in _tables(architecture, os.environ.get(ENVIRONMENT_VARIABLE)):
        if kernel in table:
            return table[kernel]
    raise ConfigError(f"{kernel!r} is no kernel with block sizes; they are {', '.join(kernel_names())}.")


@functools.cache
def _chosen(kernel: str, architecture: str, width: int, own: str | None) -> Row:
    for table in _tables(architecture, own):
        for row in table.get(kernel, ()):
            if width <= row["up_to"]:
                return {name: value for name, value in row.items() if name != "up_to"}
    raise ConfigError(f"no table has a row for kernel {kernel!r} at width {width}; default.json must have one.")


def block_config(kernel: str, on: Tensor, width: int) -> dict[str, int]:
    """Block sizes, ``num_warps`` and ``num_stages`` of a kernel, as keyword arguments of its launch.

    Args:
        kernel: its name in the tables.
        on: a tensor that the kernel reads; its device decides the architecture, its dtype how much a width counts.
        width: elements of a row: the head's width for attention, the model's for the rest.

    Raises:
        ConfigError: no table has a row for this kernel and width, or a table is broken.

    Example:
        >>> sorted(block_config("sqa_fwd", torch.empty(0, dtype=torch.bfloat16), 16))
        ['BLOCK_M', 'BLOCK_N', 'num_stages', 'num_warps']
    """
    counted = width * max(2, on.element_size()) // 2
    for observer in _observers:
        observer.append((kernel, counted))
    for name, row in reversed(_overrides):
        if name == kernel:
            return {key: value for key, value in row.items() if key != "up_to"}
    return dict(_chosen(kernel, architecture_of(on), counted, os.environ.get(ENVIRONMENT_VARIABLE)))
