"""Tables of block sizes: reading, checking, choosing.

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
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ConfigError", "architecture_of", "block_config", "for_architecture", "load_table", "override_config"]

Row = Mapping[str, int]
Table = Mapping[str, tuple[Row, ...]]

DEFAULT = "default"
ENVIRONMENT_VARIABLE = "RXT_KERNELS_CONFIGS"
_HERE = Path(__file__).parent

_architectures: list[str] = []
_overrides: list[tuple[str, Row]] = []


class ConfigError(ValueError):
    """A table of block sizes that cannot be used; the message names file, kernel and value."""


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _check_row(where: str, row: Any) -> Row:
    if not isinstance(row, dict) or not all(type(value) is int for value in row.values()):
        raise ConfigError(f"{where} is {row!r}; a row maps names to integers.")
    if row.get("up_to", 0) < 1:
        raise ConfigError(f"{where} has up_to {row.get('up_to')!r}; it is the largest width of the row, at least 1.")
    for name, value in row.items():
        if name == "num_stages" and 1 <= value <= 8:
            continue
        if name not in ("up_to", "num_stages") and _is_power_of_two(value) and value <= 1024:
            continue
        if name != "up_to":
            accepted = "1 to 8" if name == "num_stages" else "a power of two of at most 1024"
            raise ConfigError(f"{where} has {name} {value}; accepted is {accepted}.")
    return row


def load_table(path: str | Path) -> tuple[str, Table]:
    """Read a table.

    Args:
        path: of the JSON file.

    Returns:
        The architecture it is for, and the rows of every kernel.

    Raises:
        ConfigError: the file cannot be read or is no table; the message says where and why.
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
    table: dict[str, tuple[Row, ...]] = {}
    for kernel, rows in kernels.items():
        if not isinstance(rows, list) or not rows:
            raise ConfigError(f"{path}: {kernel} has no rows; it takes a list of at least one.")
        table[kernel] = tuple(_check_row(f"{path}: {kernel}, row {index}", row) for index, row in enumerate(rows))
        limits = [row["up_to"] for row in table[kernel]]
        if limits != sorted(set(limits)):
            raise ConfigError(f"{path}: {kernel} has rows up to {limits}; they must grow.")
    return content["architecture"], table


@functools.cache
def _packaged(architecture: str) -> Table:
    path = _HERE / f"{architecture}.json"
    return load_table(path)[1] if path.is_file() else {}


@functools.cache
def _own(path: str) -> tuple[str, Table]:
    return load_table(path)


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


def _row(table: Table, kernel: str, width: int) -> Row | None:
    return next((row for row in table.get(kernel, ()) if width <= row["up_to"]), None)


def _tables(architecture: str) -> Iterator[Table]:
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if path:
        own_architecture, table = _own(path)
        if own_architecture in (architecture, DEFAULT):
            yield table
    yield _packaged(architecture)
    yield _packaged(DEFAULT)


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
    for name, row in reversed(_overrides):
        if name == kernel:
            return {key: value for key, value in row.items() if key != "up_to"}
    counted = width * max(2, on.element_size()) // 2
    for table in _tables(architecture_of(on)):
        if (found := _row(table, kernel, counted)) is not None:
            return {key: value for key, value in found.items() if key != "up_to"}
    raise ConfigError(f"no table has a row for kernel {kernel!r} at width {counted}; default.json must have one.")
