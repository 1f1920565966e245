"""Opening checkpoint files without trusting them.

A safetensors file is eight bytes of header length (little endian), a JSON header, and the tensors' bytes. Everything a
header can get wrong is checked here before a byte of data is touched, so that a bad file is one `CheckpointError` that
names the file and the key. Nothing is ever unpickled.

Tensors are read one at a time, straight into their own memory. A memory map would not save a copy (a loaded model must
own its weights) and would crash the process with a bus error if another program truncated the file meanwhile; a
read can only come back short, which is reported.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from rxt_model.checkpoint.errors import CheckpointError

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "SafetensorsFile", "TensorEntry", "read_json_object"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

#: Header names of the element types that torch and this package can hold.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

#: The format's own limit on its header (100 MB); a longer length is damage, not a header.
_LONGEST_HEADER = 100_000_000
_LONGEST_CONFIG = 16_000_000

#: How other formats begin, to name them in the refusal.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (pickle inside, never opened)"),
    (b"\x80\x02", "a Python pickle (never opened)"),
    (b"\x80\x03", "a Python pickle (never opened)"),
    (b"\x80\x04", "a Python pickle (never opened)"),
    (b"\x80\x05", "a Python pickle (never opened)"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file it points to: fetch it with `git lfs pull`"),
)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file: its type, shape, absolute offset and size in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int


class SafetensorsFile:
    """An opened, fully checked safetensors file: names, shapes and metadata at once, tensors on request.

    Attributes:
        path: the file.
        metadata: the header's string-to-string map (empty if it has none).
        entries: every tensor's `TensorEntry`, in the order of the file.

    Raises:
        CheckpointError: the file is absent, unreadable, empty, truncated, of another format, or its header is not
            valid JSON of the right types, repeats a name, or gives offsets that overlap, leave holes or pass the end.

    Example:
        >>> import tempfile, pathlib, torch
        >>> from safetensors.torch import save_file
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"a": torch.ones(2)}, path)
        >>> with SafetensorsFile(path) as file:
        ...     print(file.entries["a"].shape, file.read("a"))
        (2,) tensor([1., 1.])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: BinaryIO = _open(self.path)
        try:
            self.metadata, self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; tensors read from it stay valid."""
        self._file.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape, in the order of the file."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own, on the CPU, with the type it has in the file.

        Raises:
            CheckpointError: the file has no such tensor, or has become shorter since it was opened.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise self._error("has no such tensor", name)
        raw = torch.empty(entry.size, dtype=torch.uint8, device="cpu")
        if entry.size:
            view = memoryview(raw.numpy())  # type: ignore[arg-type]
            try:
                self._file.seek(entry.offset)
                done = 0
                while done < entry.size:
                    count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                    if not count:
                        raise self._error(f"ends after {done} of the tensor's {entry.size} bytes", name)
                    done += count
            except OSError as error:
                raise self._error(f"cannot be read ({error.strerror or error})", name) from error
        return raw.view(entry.dtype).reshape(entry.shape)

    def _error(self, problem: str, key: str | None = None) -> CheckpointError:
        where = f"{self.path}, key {key!r}: the file" if key is not None else f"{self.path}: the file"
        return CheckpointError(f"{where} {problem}.")

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorEntry]]:
        try:
            total = os.fstat(self._file.fileno()).st_size
            head = self._file.read(32)
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror or error})") from error
        if total == 0:
            raise self._error("is empty")
        length = int.from_bytes(head[:8], "little") if len(head) >= 8 else -1
        plausible = 2 <= length <= _LONGEST_HEADER and head[8:9] == b"{"
        if not plausible:
            for magic, description in _FOREIGN:
                if head.startswith(magic):
                    raise self._error(f"is not safetensors but {description}; convert it to model.safetensors first")
        if length < 0:
            raise self._error(f"is truncated: {total} bytes, and a safetensors header alone needs more")
        if not plausible:
            raise self._error("is not a safetensors file (it does not begin with a header length and a JSON object)")
        if 8 + length > total:
            raise self._error(f"is truncated: its header needs {8 + length} bytes and it has {total}")
        self._file.seek(8)
        raw = self._file.read(length)
        if len(raw) != length:
            raise self._error("is truncated inside its header")
        header = _parse_object(raw, lambda problem: self._error(f"has a damaged header: {problem}"))
        metadata = self._check_metadata(header.pop("__metadata__", {}))
        entries = [self._check_entry(name, value, 8 + length) for name, value in header.items()]
        self._check_layout(entries, 8 + length, total)
        return metadata, {entry.name: entry for entry in entries}

    def _check_metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self._error("has a damaged header: __metadata__ must map names to strings")
        return value

    def _check_entry(self, name: str, value: Any, start: int) -> TensorEntry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise self._error("has a damaged header: a tensor needs dtype, shape and data_offsets, no more", name)
        dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            known = ", ".join(DTYPES)
            raise self._error(f"stores the element type {dtype_name!r}, which is unsupported; supported: {known}", name)
        if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
            raise self._error(f"has a damaged header: shape is {_short(shape)}, not a list of sizes", name)
        if len(shape) > 16:
            raise self._error(f"has a damaged header: a shape of {len(shape)} dimensions", name)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
            raise self._error(f"has a damaged header: data_offsets is {_short(offsets)}, not [begin, end]", name)
        begin, end = offsets
        dtype = DTYPES[dtype_name]
        needed = math.prod(shape) * dtype.itemsize
        if end - begin != needed:
            raise self._error(
                f"has a damaged header: {dtype_name} of shape {shape} takes {needed} bytes, "
                f"data_offsets {_short(offsets)} hold {end - begin}",
                name,
            )
        return TensorEntry(name, dtype, tuple(shape), start + begin, needed)

    def _check_layout(self, entries: list[TensorEntry], start: int, total: int) -> None:
        """The tensors must fill the data part exactly: no overlap, no hole, nothing after the end."""
        position = start
        for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size)):
            if entry.offset < position:
                raise self._error("has a damaged header: this tensor overlaps another one", entry.name)
            if entry.offset > position:
                raise self._error("has a damaged header: there is a hole before this tensor", entry.name)
            position += entry.size
            if position > total:
                raise self._error(f"is truncated: this tensor ends at byte {position} of {total}", entry.name)
        if position != total:
            raise self._error(f"has {total - position} bytes after its last tensor; it is damaged or not safetensors")


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file whose top level is an object, such as `config.json`.

    Raises:
        CheckpointError: the file is absent, a directory, unreadable, too long, not UTF-8, not JSON (NaN and repeated
            names are refused too), or not an object.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = path.write_text('{"embed_dim": 128}')
        >>> read_json_object(path)
        {'embed_dim': 128}
    """
    path = Path(path)
    with _open(path) as file:
        try:
            raw = file.read(_LONGEST_CONFIG + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: the file cannot be read ({error.strerror or error}).") from error
    if not raw.strip():
        raise CheckpointError(f"{path}: the file is empty.")
    if len(raw) > _LONGEST_CONFIG:
        raise CheckpointError(f"{path}: the file is longer than {_LONGEST_CONFIG} bytes; it is no configuration.")
    return _parse_object(raw, lambda problem: CheckpointError(f"{path}: the file is damaged: {problem}."))


def _open(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: this is a directory, a file is needed.")
        if path.exists() and not path.is_file():  # a pipe or a device would block for ever
            raise CheckpointError(f"{path}: this is not a regular file.")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: the file cannot be opened ({error}).") from error


def _parse_object(raw: bytes, error: Any) -> dict[str, Any]:
    """Strict JSON object: UTF-8, no NaN, no name twice, bounded nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise ValueError(f"the name {repeated!r} appears twice")
        return result

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        raise error("it is nested too deeply") from None
    except UnicodeDecodeError as cause:
        raise error("it is not UTF-8 text") from cause
    except ValueError as cause:
        raise error(f"it is not valid JSON ({cause})") from cause
    if not isinstance(value, dict):
        raise error(f"a JSON object is needed, this is {type(value).__name__}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
