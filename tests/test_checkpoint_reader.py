"""Bad files are one clear error, whatever is wrong with them, and never a crash, a hang, or a wrong model."""

from __future__ import annotations

import json
import os
import pickle
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rxt_model.checkpoint import CheckpointError, SafetensorsFile, read_json_object
from rxt_model.decoder import RxTDecoder
from rxt_model.models import RxTAlpha
from tests.checkpoint_cases import ELEMENTWISE, PER_EXPERT, SPLIT, decoder, full, randomise


def header(content: Any, data: bytes = b"") -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def zipped() -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return buffer.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "short": (b"\x08\0\0", "is truncated: 3 bytes"),
    "only a length": ((16).to_bytes(8, "little"), "not a safetensors file"),
    "truncated header": (header({"a": entry()})[:30], "is truncated: its header needs"),
    "no data": (header({"a": entry()}), r"key 'a': the file is truncated: this tensor ends"),
    "truncated data": (header({"a": entry()}, b"\0\0"), "truncated"),
    "surplus data": (header({"a": entry()}, b"\0" * 9), "5 bytes after its last tensor"),
    "not json": (header(b"{not json}"), "not valid JSON"),
    "not utf-8": (header(b'{"\xff": 1}'), "not UTF-8"),
    "a list": (header(b"[1, 2]"), "not a safetensors file"),
    "NaN": (header(b'{"a": NaN}'), "NaN is not JSON"),
    "name twice": (header(b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "deep nesting": (header(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "endless number": (header(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON|needs dtype"),
    "huge length": ((1 << 60).to_bytes(8, "little") + b"{}" * 10, "not a safetensors file"),
    "entry is no object": (header({"a": 3}), "key 'a'.*needs dtype, shape and data_offsets"),
    "entry without shape": (header({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "key 'a'.*needs dtype"),
    "entry with more": (header({"a": {**entry(), "more": 1}}, b"\0" * 4), "no more"),
    "unknown type": (header({"a": entry("F8_E4M3")}, b"\0" * 4), "key 'a'.*'F8_E4M3'.*unsupported"),
    "type is a list": (header({"a": entry([])}, b"\0" * 4), "unsupported"),  # type: ignore[arg-type]
    "negative size": (header({"a": entry(shape=(-1,))}, b"\0" * 4), "not a list of sizes"),
    "size is true": (header({"a": entry(shape=(True,))}, b"\0" * 4), "not a list of sizes"),
    "size is a float": (header({"a": entry(shape=(1.0,))}, b"\0" * 4), "not a list of sizes"),
    "size is huge": (header({"a": entry(shape=(2**62, 2**62))}, b"\0" * 4), "takes .* bytes"),
    "too many dimensions": (header({"a": entry(shape=(1,) * 17)}, b"\0" * 4), "17 dimensions"),
    "offsets backwards": (header({"a": entry(offsets=(4, 0))}, b"\0" * 4), "data_offsets"),
    "offsets negative": (header({"a": entry(offsets=(-4, 0))}, b"\0" * 4), "not \\[begin, end\\]"),
    "one offset": (header({"a": entry(offsets=(0,))}, b"\0" * 4), "not \\[begin, end\\]"),
    "out of range": (header({"a": entry(offsets=(96, 100))}, b"\0" * 4), "hole before"),
    "overlap": (header({"a": entry(), "b": entry()}, b"\0" * 4), "key 'b'.*overlaps"),
    "hole": (header({"a": entry(), "b": entry(offsets=(8, 12))}, b"\0" * 12), "key 'b'.*hole"),
    "shape against offsets": (header({"a": entry(shape=(2,))}, b"\0" * 4), "takes 8 bytes.*hold 4"),
    "metadata not strings": (header({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata no object": (header({"__metadata__": []}), "__metadata__"),
    "zip": (zipped(), "zip archive.*pickle inside, never opened"),
    "pickle": (pickle.dumps({"a": 1}, protocol=2), "Python pickle"),
    "new pickle": (pickle.dumps({"a": 1}, protocol=5), "Python pickle"),
    "gguf": (b"GGUF" + b"\0" * 40, "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "HDF5"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 40, "gzip"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
    "text": (b"Not Found" * 10, "not a safetensors file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    decoder().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for read in (SafetensorsFile, lambda _: RxTDecoder.from_pretrained(tmp_path)):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)  # type: ignore[operator]
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, ValueError)


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (os.mkdir, (str(tmp_path / "opened"),))

    decoder().save_pretrained(tmp_path)
    torch.save({"a": Bomb()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="never opened"):
        RxTDecoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"There is pytorch_model\.bin: it is a pickle"):
        RxTDecoder.from_pretrained(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_absent_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: there is no such file"):
        RxTDecoder.from_pretrained(tmp_path)
    decoder().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file"):
        RxTDecoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="split over several files"):
        RxTDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_directory_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: this is a directory"):
        RxTDecoder.from_pretrained(tmp_path)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path / "model.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_json_object(tmp_path / "config.json")


def test_a_name_with_a_null_byte() -> None:
    with pytest.raises(CheckpointError):
        SafetensorsFile("a\0b")
    with pytest.raises(CheckpointError):
        RxTDecoder.from_pretrained("a\0b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON object is needed, this is list"),
        (b"null", "this is NoneType"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"a": 1, "a": 1}', "appears twice"),
        (b'{"a": Infinity}', "not JSON"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_configurations(content: bytes, message: str, tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        RxTDecoder.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_zero_size_and_scalar_tensors(tmp_path: Path) -> None:
    tensors = {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "row": torch.arange(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor)
            assert file.read(name).dtype == tensor.dtype
        assert file.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        with pytest.raises(CheckpointError, match="key 'no': the file has no such tensor"):
            file.read("no")


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100_000)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match="key 'a': the file ends after"):
            file.read("a")


def test_reading_does_not_depend_on_the_default_device(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    with torch.device("meta"), SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.read("a").device.type == "cpu"


#: directory, weights, configuration, state dict, structure
Saved = tuple[Path, bytes, bytes, dict[str, torch.Tensor], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    directory = tmp_path_factory.mktemp("saved")
    model = randomise(
        full(decoder={**PER_EXPERT, "num_experts": 2}, memory=ELEMENTWISE, common={**SPLIT, "num_layers": 1})
    )
    model.save_pretrained(directory)
    weights, config = (directory / name for name in ("model.safetensors", "config.json"))
    structure = _structure(RxTAlpha.from_pretrained(directory))
    return directory, weights.read_bytes(), config.read_bytes(), model.state_dict(), structure


def _structure(model: Any) -> list[dict[str, Any]]:
    return [getattr(model, part).config.to_dict() for part in ("decoder", "encoder", "memory_attention")]


@settings(max_examples=250)
@given(data=st.data())
def test_flipped_header_bytes(data: st.DataObject, saved: Saved) -> None:
    """A damaged header is refused; a flip that changes nothing (spaces) may load, and then gives the same model."""
    directory, weights, config, expected, structure = saved
    (directory / "config.json").write_bytes(config)
    length = int.from_bytes(weights[:8], "little")
    damaged = bytearray(weights)
    for _ in range(data.draw(st.integers(1, 2))):
        position = data.draw(st.integers(0, 7 + length))
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (directory / "model.safetensors").write_bytes(bytes(damaged))
    try:
        loaded = RxTAlpha.from_pretrained(directory)
    except CheckpointError as error:
        message = str(error)
    else:
        message = "model.safetensors"
        assert _structure(loaded) == structure
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[name])
    assert "model.safetensors" in message


@settings(max_examples=150)
@given(data=st.data())
def test_truncated_anywhere(data: st.DataObject, saved: Saved) -> None:
    directory, weights, config, _, _ = saved
    (directory / "config.json").write_bytes(config)
    (directory / "model.safetensors").write_bytes(weights[: data.draw(st.integers(0, len(weights) - 1))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        RxTAlpha.from_pretrained(directory)


@settings(max_examples=100)
@given(content=st.binary(max_size=200))
def test_random_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="random"):
        SafetensorsFile(path)


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::rxt_model.checkpoint.errors.CheckpointWarning")
def test_flipped_configuration_bytes(data: st.DataObject, saved: Saved) -> None:
    """Whatever the configuration says, the weights are those of the file, or there is one error."""
    directory, weights, config, expected, _ = saved
    damaged = bytearray(config)
    position = data.draw(st.integers(0, len(config) - 1))
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (directory / "model.safetensors").write_bytes(weights)
    (directory / "config.json").write_bytes(bytes(damaged))
    try:
        loaded = RxTAlpha.from_pretrained(directory)
    except CheckpointError:
        return
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_concurrent_readers(tmp_path: Path) -> None:
    model = randomise(decoder())
    model.save_pretrained(tmp_path)
    results: list[bool] = []

    def read() -> None:
        loaded = RxTDecoder.from_pretrained(tmp_path)
        results.append(all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
