"""Where checkpoints come from and go to: directories, the hub (never reached here), and saves that fail."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors

from rxt_model.checkpoint import CheckpointError, CheckpointWarning, PretrainedModel
from rxt_model.checkpoint import hub as hub_module
from rxt_model.checkpoint import saving as saving_module
from rxt_model.decoder import RxTDecoder
from rxt_model.heads import MLMHead
from rxt_model.models import RxTAlpha
from tests.checkpoint_cases import assert_same, decoder, edit_tensors, full, randomise, write_as_upstream


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in here may reach the network."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a test tried to use the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


# local directories


def test_strings_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(decoder())
    model.save_pretrained(str(tmp_path / "model"))
    for name in (tmp_path / "model", str(tmp_path / "model"), str(tmp_path / "model") + "/"):
        assert_same(model, RxTDecoder.from_pretrained(name))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(model, RxTDecoder.from_pretrained("~/model"))
    monkeypatch.chdir(tmp_path)
    assert_same(model, RxTDecoder.from_pretrained("model"))


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "absent", "", "a/b/c", "~/absent/model", "a\\b"])
def test_names_that_are_neither_directory_nor_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        RxTDecoder.from_pretrained(name)


def test_a_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        RxTDecoder.from_pretrained(Path("owner/name"))


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="this is a file; give the directory"):
        RxTDecoder.from_pretrained(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a directory is needed, and this is a file"):
        decoder().save_pretrained(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rope_layout": "half"}, ValueError, "rope_layout is 'half'; accepted are 'auto', 'split', 'interleaved'"),
        ({"rope_angle_dtype": "bf16"}, ValueError, "rope_angle_dtype is 'bf16'"),
        ({"padding": "zeros"}, ValueError, "padding is 'zeros'"),
        ({"memory_attention_variant": "x"}, ValueError, "memory_attention_variant is 'x'"),
        ({"dtype": torch.int8}, ValueError, r"dtype is torch\.int8"),
        ({"dtype": "float32"}, ValueError, "dtype is 'float32'"),
        ({"device": "quantum"}, RuntimeError, "quantum"),
        ({"revision": "main"}, ValueError, "a local directory and has no revisions"),
        ({"tokenizer": object()}, TypeError, "RxTDecoder is a component, which has none"),
        ({"unheard_of": 1}, TypeError, "unheard_of"),
    ],
)
def test_arguments(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        RxTDecoder.from_pretrained(tmp_path, **options)


def test_wrong_types_and_choices() -> None:
    with pytest.raises(TypeError, match="is a int; a directory or a hub id is needed"):
        RxTDecoder.from_pretrained(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="embedding is 'twice'"):
        decoder().save_pretrained("never", embedding="twice")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rope_layout is 'auto'"):
        decoder().save_pretrained("never", rope_layout="auto")  # type: ignore[arg-type]
    assert not Path("never").exists()


def test_warnings_point_at_the_caller_and_come_only_with_a_model(tmp_path: Path) -> None:
    write_as_upstream(decoder(rope_layout="split"), tmp_path)
    with pytest.warns(CheckpointWarning) as caught:
        RxTDecoder.from_pretrained(tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.head.bias"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError):
            RxTDecoder.from_pretrained(tmp_path)


def test_tokenizer_of_the_directory(tmp_path: Path) -> None:
    full().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer cannot be loaded.*Pass tokenizer="):
        RxTAlpha.from_pretrained(tmp_path)
    assert RxTAlpha.from_pretrained(tmp_path, tokenizer=False).tokenizer is None
    (tmp_path / "tokenizer.json").unlink()
    assert RxTAlpha.from_pretrained(tmp_path).tokenizer is None


# saves that fail


class Disk:
    """Fails at the n-th write."""

    def __init__(self, real: Any, *, after: int) -> None:
        self.real, self.after, self.bytes = real, after, 0

    def __call__(self, tensors: Any, path: Path, *, metadata: Any) -> None:
        self.real(tensors, path, metadata=metadata)
        os.truncate(path, self.after)
        raise OSError(28, "No space left on device")


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = randomise(decoder())
    old.save_pretrained(tmp_path)
    before = _contents(tmp_path)
    monkeypatch.setattr(saving_module, "write_safetensors", Disk(saving_module.write_safetensors, after=100))
    with pytest.raises(CheckpointError, match=r"cannot be saved there .*No space left") as caught:
        randomise(decoder(num_layers=3), seed=2).save_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert _contents(tmp_path) == before
    assert_same(old, RxTDecoder.from_pretrained(tmp_path))


def test_an_interrupted_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder().save_pretrained(tmp_path)
    before = _contents(tmp_path)

    def interrupt(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoder(num_layers=3).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert _contents(tmp_path) == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be saved there"):
        decoder().save_pretrained(tmp_path / "file" / "below")
    (tmp_path / "model" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a directory"):
        decoder().save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_saving_replaces_and_does_not_touch_what_a_reader_has_open(tmp_path: Path) -> None:
    from rxt_model.checkpoint import SafetensorsFile

    first = randomise(decoder())
    first.save_pretrained(tmp_path)
    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        randomise(decoder(), seed=2).save_pretrained(tmp_path)
        assert torch.equal(file.read("model.head.weight"), first.state_dict()["model.head.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        randomise(full()).save_pretrained(tmp_path / name)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    model = full().train()
    memory = model.stm.memory.clone()
    model.save_pretrained(tmp_path, rope_layout="split")
    assert model.training
    assert torch.equal(model.stm.memory, memory)
    assert model.encoder.model.embedding is model.decoder.model.embedding


# the hub, imitated


class Hub:
    """A repository in a directory, behind the functions that this package calls."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        self.calls.append((filename, {"repo_id": repo_id, **options}))
        if self.error is not None:
            raise self.error
        path = self.root / filename
        if not path.exists():
            raise make_error(hub_errors.EntryNotFoundError)
        return str(path)


def make_error(kind: Any, text: str = "the hub says no") -> Exception:
    try:
        error: Exception = kind(text)
    except TypeError:  # newer clients want the response that was received
        error = kind(text, response=MagicMock())
    return error


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    imitation = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub_module, "hf_hub_download", imitation.download)
    monkeypatch.chdir(tmp_path)
    return imitation


def test_loading_from_the_hub(hub: Hub) -> None:
    model = randomise(decoder())
    model.save_pretrained(hub.root)
    loaded = RxTDecoder.from_pretrained(
        "owner/name", revision="v1", token="t", cache_dir="c", local_files_only=True, force_download=False
    )
    assert_same(model, loaded)
    assert [name for name, _ in hub.calls] == ["config.json", "model.safetensors"]
    assert hub.calls[0][1] == {
        "repo_id": "owner/name", "revision": "v1", "token": "t", "cache_dir": "c", "local_files_only": True,
        "force_download": False,
    }  # fmt: skip


def test_a_repository_that_changes_meanwhile(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder().save_pretrained(hub.root)

    def download(repo_id: str, filename: str, **options: Any) -> str:
        snapshot = hub.root / filename.replace(".", "-")
        snapshot.mkdir()
        return str(shutil.copy(hub.root / filename, snapshot))

    monkeypatch.setattr(hub_module, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match="changed while it was downloaded; try again"):
        RxTDecoder.from_pretrained("owner/name")


def test_a_full_model_from_the_hub_without_a_tokenizer(hub: Hub) -> None:
    model = randomise(full())
    model.save_pretrained(hub.root)
    assert_same(model, RxTAlpha.from_pretrained("owner/name"))
    assert [name for name, _ in hub.calls] == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_local_directory_wins(hub: Hub, tmp_path: Path) -> None:
    model = randomise(decoder())
    model.save_pretrained(tmp_path / "owner" / "name")
    assert_same(model, RxTDecoder.from_pretrained("owner/name"))
    assert hub.calls == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub_errors.RepositoryNotFoundError, "no such hub repository that this login may read"),
        (hub_errors.GatedRepoError, "accept this repository's terms"),
        (hub_errors.RevisionNotFoundError, "has no revision 'v1'"),
        (hub_errors.EntryNotFoundError, r"has no config\.json"),
        (hub_errors.LocalEntryNotFoundError, "not in the download cache, and the hub could not be reached"),
        (hub_errors.HFValidationError, "it is not a hub id either"),
        (hub_errors.HfHubHTTPError, r"cannot be downloaded \(the hub says no\)"),
        (OSError, r"cannot be downloaded \(the hub says no\)"),
    ],
)
def test_hub_failures(hub: Hub, kind: Any, message: str) -> None:
    hub.error = make_error(kind)
    with pytest.raises(CheckpointError, match=message) as caught:
        RxTDecoder.from_pretrained("owner/name", revision="v1")
    assert str(caught.value).startswith("owner/name")


def test_nothing_cached_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"owner/name: .*config\.json is not in the download cache, and local_files"
    ):
        RxTDecoder.from_pretrained("owner/name", local_files_only=True, cache_dir=tmp_path / "cache")


class Api:
    """What `push_to_hub` asks of the hub's client."""

    uploads: list[dict[str, Any]]

    def __init__(self, root: Path, *, has_card: bool, error: Exception | None = None) -> None:
        self.root, self.has_card, self.error, self.uploads, self.token = root, has_card, error, [], None

    def __call__(self, *, token: Any) -> Api:
        self.token = token
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        if self.error is not None:
            raise self.error
        self.private = private
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
        return self.has_card

    def upload_folder(self, *, folder_path: str, **options: Any) -> str:
        shutil.copytree(folder_path, self.root)
        self.uploads.append(options)
        return "https://huggingface.co/owner/name/commit/1"


@pytest.mark.parametrize("has_card", [True, False])
def test_publishing(has_card: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(tmp_path / "repository", has_card=has_card)
    monkeypatch.setattr(hub_module, "HfApi", api)
    model = randomise(full())
    address = model.push_to_hub("owner/name", private=True, token="t", branch="b", create_pr=True, commit_message="m")
    assert address.endswith("/commit/1")
    assert (api.token, api.private) == ("t", True)
    assert api.uploads == [{"repo_id": "owner/name", "commit_message": "m", "revision": "b", "create_pr": True}]
    assert (api.root / "README.md").exists() == (not has_card)
    assert_same(model, RxTAlpha.from_pretrained(api.root))


@pytest.mark.parametrize("kind", [hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError])
def test_publishing_that_fails(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "HfApi", Api(tmp_path, has_card=True, error=make_error(kind)))
    with pytest.raises(CheckpointError, match=r"owner/name: the model cannot be published there \(the hub says no\)"):
        MLMHead({"embed_dim": 4, "vocab_size": 5}).push_to_hub("owner/name")


def test_models_are_the_mixin_s(tmp_path: Path) -> None:
    model = decoder()
    assert isinstance(model, huggingface_hub.ModelHubMixin)
    assert "rxt-kernels" in str(model.generate_model_card())


# the protocol


def test_a_class_that_implements_nothing_says_so() -> None:
    class Empty(PretrainedModel):
        component = "decoder"

    with pytest.raises(NotImplementedError, match="Empty does not implement _config"):
        Empty().save_pretrained("never")
    with pytest.raises(NotImplementedError, match="Empty does not implement _from_config"):
        Empty._from_config({})


def test_buffers_that_nobody_makes_are_noticed(tmp_path: Path) -> None:
    class Forgetful(MLMHead):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.zeros(3), persistent=False)

    Forgetful({"embed_dim": 4, "vocab_size": 5}).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="table of Forgetful has no data after loading"):
        Forgetful.from_pretrained(tmp_path)


def test_subclasses_load_as_themselves(tmp_path: Path) -> None:
    class Mine(MLMHead):
        @classmethod
        def _from_config(cls, config: Any, *, tokenizer: Any = None) -> Mine:
            return cls(config)

    model = Mine({"embed_dim": 4, "vocab_size": 5})
    model.save_pretrained(tmp_path)
    assert isinstance(Mine.from_pretrained(tmp_path), Mine)
    assert json.loads((tmp_path / "config.json").read_text()) == {"embed_dim": 4, "vocab_size": 5}
