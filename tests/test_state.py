"""Saved conversations: continued elsewhere, refused by other models, never half applied (spec 1; contract of state.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import alpha, beta, messages, refusal
from safetensors import safe_open
from safetensors.torch import save_file

from rxt_model.interaction.state import (
    FORMAT,
    FORMAT_VERSION,
    ConversationState,
    StateError,
    load_state,
    model_fingerprint,
    save_state,
)

PROMPT = torch.tensor(messages([5]))


def talked(turns: int = 2) -> Any:
    model = alpha()
    for turn in range(turns):
        list(model.interact(PROMPT, seed=turn, max_seq_len=14))
    return model


def contents(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata()), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_a_conversation_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    model = talked()
    path = model.save_conversation(tmp_path / "c.safetensors", notes={"transcript": "né 漢"})
    expected = list(model.interact(PROMPT, seed=9, max_seq_len=14))
    other = alpha()
    state = other.load_conversation(path)
    assert other.turns == state.turns == 2
    assert state.notes == {"transcript": "né 漢"}
    assert list(other.interact(PROMPT, seed=9, max_seq_len=14)) == expected
    assert torch.equal(other.stm.memory, model.stm.memory)
    assert other.turns == 3


def test_another_process_continues_it(tmp_path: Path) -> None:
    model = talked()
    path = model.save_conversation(tmp_path / "c.safetensors")
    expected = list(model.interact(PROMPT, seed=9, max_seq_len=14))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; from helpers import alpha, messages\n"
        "model = alpha(); model.load_conversation(sys.argv[2])\n"
        "print(model.turns, *model.interact(torch.tensor(messages([5])), seed=9, max_seq_len=14))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert list(map(int, done.stdout.split())) == [2, *expected]


def test_what_the_file_holds(tmp_path: Path) -> None:
    model = talked()
    metadata, tensors = contents(model.save_conversation(tmp_path / "c.safetensors"))
    assert metadata["format"] == FORMAT
    assert metadata["format_version"] == str(FORMAT_VERSION) == "1"
    assert metadata["turns"] == "2"
    assert metadata["fingerprint"] == model_fingerprint(model)
    assert list(tensors) == ["memory"]
    assert torch.equal(tensors["memory"], model.stm.memory)


def test_saving_settles_an_open_answer(tmp_path: Path) -> None:
    model = alpha()
    stream = model.interact(PROMPT, max_seq_len=14)
    next(stream)
    path = model.save_conversation(tmp_path / "c.safetensors")
    assert load_state(path).turns == 1
    with refusal(FileNotFoundError, "no"):
        model.save_conversation(tmp_path / "no" / "c.safetensors")


def test_batched_conversations_are_saved_as_such(tmp_path: Path) -> None:
    model = alpha()
    model.set_batch_mode(True, batch_size=3)
    list(model.batch_interact(torch.tensor(messages([4] * 3)), max_seq_len=12))
    path = model.save_conversation(tmp_path / "c.safetensors")
    other = alpha()
    other.load_conversation(path)
    assert other.stm.batch_size == 3
    assert torch.equal(other.stm.memory, model.stm.memory)


def test_a_bfloat16_copy_of_the_model_takes_the_conversation_over(tmp_path: Path) -> None:
    model = talked()
    path = model.save_conversation(tmp_path / "c.safetensors")
    half = alpha().bfloat16()
    half.load_conversation(path)
    assert half.stm.memory.dtype is torch.bfloat16
    assert torch.equal(half.stm.memory, model.stm.memory.bfloat16())
    back = alpha()
    back.load_conversation(half.save_conversation(tmp_path / "h.safetensors"))
    assert torch.equal(back.stm.memory, half.stm.memory.float())


def test_fingerprints_tell_models_apart_and_know_their_own() -> None:
    own = model_fingerprint(alpha())
    assert own == model_fingerprint(talked())
    assert own == model_fingerprint(alpha(with_tokenizer=False))
    assert own != model_fingerprint(alpha(seed=1))
    assert own != model_fingerprint(alpha(variant="gated-self-interlayer"))
    assert own != model_fingerprint(beta())
    trained = alpha()
    with torch.no_grad():
        trained.memory_attention.model.memory_norm_layers[1].weight.mul_(1.01)
    assert own != model_fingerprint(trained)


Damage = Callable[[Path], None]


def rewritten(**changes: Any) -> Damage:
    def damage(path: Path) -> None:
        metadata, tensors = contents(path)
        memory = changes.get("tensors", tensors)
        metadata |= {name: value for name, value in changes.items() if name != "tensors"}
        save_file(memory, path, {name: value for name, value in metadata.items() if value is not None})

    return damage


def truncated(share: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)]) and None


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def of_another_model(path: Path) -> None:
    list_of = alpha(seed=1)
    list_of.save_conversation(path)


DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "empty": (truncated(0.0), ["damaged"]),
    "cut in the header": (truncated(0.01), ["damaged"]),
    "cut in the memory": (truncated(0.7), ["damaged"]),
    "a bit flipped": (flipped, ["changed"]),
    "text": (lambda path: path.write_text("hello") and None, ["damaged"]),
    "another model": (of_another_model, ["fingerprint"]),
    "a model's weights": (lambda path: save_file({"w": torch.zeros(2)}, path), ["not a saved conversation"]),
    "another format": (rewritten(format="other"), ["not a saved conversation"]),
    "a newer version": (rewritten(format_version="2", notes=None, checksum=None), ["version 2", "Update"]),
    "a newer version with more in it": (
        rewritten(format_version="9", tensors={"memory": torch.zeros(1), "other": torch.zeros(1)}),
        ["version 9"],
    ),
    "no version": (rewritten(format_version=None), ["format_version"]),
    "a strange version": (rewritten(format_version="one"), ["damaged metadata"]),
    "no turns": (rewritten(turns=None), ["turns"]),
    "negative turns": (rewritten(turns="-1"), ["turns"]),
    "strange notes": (rewritten(notes="{"), ["damaged metadata"]),
    "notes that are a list": (rewritten(notes="[]"), ["damaged metadata"]),
    "no fingerprint": (rewritten(fingerprint=None), ["fingerprint"]),
    "no checksum": (rewritten(checksum=None), ["checksum"]),
    "no memory": (rewritten(tensors={"other": torch.zeros(1)}), ["memory"]),
    "a memory of integers": (rewritten(tensors={"memory": torch.zeros(2, 1, 8, 32).long()}), ["memory"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_and_foreign_files_are_refused_and_nothing_changes(name: str, tmp_path: Path) -> None:
    damage, named = DAMAGES[name]
    path = talked(1).save_conversation(tmp_path / "c.safetensors")
    damage(path)
    model = talked(2)
    before = model.export_stm_state()
    stream = model.interact(PROMPT, max_seq_len=14)
    next(stream)
    with refusal(StateError, str(path), *named):
        model.load_conversation(path)
    assert torch.equal(model.stm.memory, before)
    assert model.turns == 2
    assert list(stream)[-1] == -2, "the open answer goes on"
    assert model.turns == 3


@pytest.mark.parametrize(
    "memory",
    [torch.zeros(2, 1, 4, 32), torch.full((2, 1, 8, 32), float("nan")), torch.zeros(2, 0, 8, 32), torch.zeros(3)],
)
def test_a_memory_that_does_not_fit_is_refused(memory: torch.Tensor, tmp_path: Path) -> None:
    model = talked(1)
    before = model.export_stm_state()
    path = save_state(ConversationState(memory, 7, model_fingerprint(model)), tmp_path / "c.safetensors")
    with refusal(StateError, str(path), "memory"):
        model.load_conversation(path)
    assert torch.equal(model.stm.memory, before)
    assert model.turns == 1


def test_missing_files_and_directories(tmp_path: Path) -> None:
    model = alpha()
    with refusal(FileNotFoundError, "no.safetensors"):
        model.load_conversation(tmp_path / "no.safetensors")
    with refusal(FileNotFoundError, str(tmp_path)):
        model.load_conversation(tmp_path)
    with refusal(IsADirectoryError, str(tmp_path)):
        model.save_conversation(tmp_path)


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = talked(1)
    path = model.save_conversation(tmp_path / "c.safetensors")
    old = path.read_bytes()
    list(model.interact(PROMPT, max_seq_len=14))
    with refusal(TypeError, "notes"):
        model.save_conversation(path, notes={"turn": 3})

    def fails_halfway(tensors: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rxt_model.interaction.state.save_file", fails_halfway)
        with pytest.raises(KeyboardInterrupt):
            model.save_conversation(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    model.save_conversation(path)
    assert load_state(path).turns == 2


def test_nothing_in_the_file_can_run_code(tmp_path: Path) -> None:
    path = talked(1).save_conversation(tmp_path / "c.safetensors", notes={"a": "__import__('os')"})
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header) == {"__metadata__", "memory"}
    assert load_state(path).notes["a"] == "__import__('os')"
