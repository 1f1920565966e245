"""The command line: every command, every kind of wrong argument, and Ctrl-C at every moment."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import os
import pkgutil
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import rxt_model.cli
import rxt_model.cli.errors
from rxt_kernels import native_runtime
from rxt_model import RxTAlpha, RxTBeta, RxTMemoryAttention, train_tokenizer
from rxt_model.cli import main
from rxt_model.cli.errors import sentence
from rxt_model.cli.interrupts import Interrupts
from rxt_model.cli.session import ChatSession, Settings
from rxt_model.cli.transcript import Exchange, Transcript
from rxt_model.demo_conversation import SCRIPT, Line, hold_conversation, is_right
from rxt_model.interaction.state import load_state
from rxt_model.tokenizer import Tokenizer
from rxt_model.training.facts import ATTRIBUTES

REPOSITORY = Path(__file__).parent.parent
MESSAGES = ("hello there", "my name is Anna", "where do I live")


class Outcome:
    """What one call of the command line gave."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def turns(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Rxt = Callable[..., Outcome]


@pytest.fixture
def rxt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rxt:
    """Run the command line in this process, in an empty directory, with messages on a pipe."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, messages: Sequence[str] = ()) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{message}\n" for message in messages)))
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


def make_model(kind: type[RxTAlpha] | type[RxTBeta], seed: int) -> RxTAlpha | RxTBeta:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([*MESSAGES * 5], vocab_size=300)
    shared = {
        "num_layers": 2,
        "embed_dim": 32,
        "att_heads": 4,
        "att_groups": 2,
        "att_query_groups": 2,
        "seq_len": 64,
        "stm_size": 8,
    }
    transformer = {**shared, "vocab_size": tokenizer.vocab_size, "ff_dim": 48}
    return kind(
        transformer,
        {**transformer, "skip_memory_cross_attention": True},
        shared,
        memory_attention_variant="interlayer",
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alpha")
    make_model(RxTAlpha, 0).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def beta_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("beta")
    make_model(RxTBeta, 0).save_pretrained(directory)
    return directory


@pytest.fixture
def session(model_directory: Path) -> ChatSession:
    return ChatSession(RxTAlpha.from_pretrained(model_directory), Settings(seed=1))


def refused(outcome: Outcome, *words: str, status: int = 2) -> None:
    """One sentence on stderr, nothing on stdout, and the status of a user's error."""
    assert outcome.status == status, outcome.err
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("rxt: ")
    assert lines[0][-1] in ".?!)"
    for word in words:
        assert word in lines[0]


# -- the program ------------------------------------------------------------------------------------------------------


def test_every_command_has_help(rxt: Rxt) -> None:
    for arguments in (["--help"], *([name, "--help"] for name in ("chat", "info", "bench", "train", "demo", "doctor"))):
        outcome = rxt(*arguments)
        assert outcome.status == 0
        assert outcome.out.startswith("usage: rxt")
    assert rxt("train", "demo", "--help").out.startswith("usage: rxt train demo")


def test_version(rxt: Rxt) -> None:
    from rxt_kernels.version import __version__

    outcome = rxt("--version")
    assert (outcome.status, outcome.out) == (0, f"rxt-kernels {__version__}\n")


def test_help_and_refusals_import_no_torch() -> None:
    """The command line of itself; whether ``import rxt_model`` is as light is that module's affair."""
    program = """
import sys, types
package = types.ModuleType("rxt_model")
package.__path__ = [sys.argv[1]]
sys.modules["rxt_model"] = package
from rxt_model.cli import main
assert main(["--help"]) == 0
assert main(["chat", "--temperature", "hot"]) == 2
assert main(["chat", "--top-k", "3"]) == 2
assert main(["bench"]) == 0
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(REPOSITORY / "rxt_model")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


MODULES = [module.name for module in pkgutil.iter_modules(rxt_model.cli.__path__, "rxt_model.cli.")]


@pytest.mark.parametrize("name", ["rxt_model.cli", "rxt_model.demo_model", "rxt_model.demo_conversation", *MODULES])
def test_examples(name: str) -> None:
    if not name.endswith("__main__"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("COMMAND", "rxt --help")),
        (("frobnicate",), ("frobnicate", "chat")),
        (("--frobnicate",), ("rxt --help",)),
        (("chat", "--temperature", "hot"), ("--temperature", "'hot'", "number of at least 0")),
        (("chat", "--temperature", "-1"), ("--temperature", "number of at least 0")),
        (("chat", "--temperature", "nan"), ("--temperature",)),
        (("chat", "--temperature", "inf"), ("--temperature",)),
        (("chat", "--temp", "1"), ("--temp",)),
        (("chat", "--top-k", "0"), ("--top-k", "integer of at least 1")),
        (("chat", "--top-k", "2.5"), ("--top-k",)),
        (("chat", "--top-p", "0"), ("--top-p", "above 0 and at most 1")),
        (("chat", "--top-p", "1.5"), ("--top-p",)),
        (("chat", "--top-k", "3"), ("--top-k", "--temperature")),
        (("chat", "--seed", "x"), ("--seed",)),
        (("chat", "--max-seq-len", "0"), ("--max-seq-len",)),
        (("chat", "--thinking-mode", "deep"), ("--thinking-mode", "extended")),
        (("chat", "--load", "absent.st"), ("--load", "absent.st")),
        (("chat", "--load", "."), ("--load", "directory")),
        (("chat", "--save", "absent/talk.st"), ("--save", "does not exist")),
        (("chat", "--save", "."), ("--save",)),
        (("chat", "--overwrite"), ("--overwrite", "--save")),
        (("chat", "--device", "toaster"), ("--device", "toaster", "cpu")),
        (("chat", "--model", "./absent"), ("absent", "no such directory")),
        (("chat", "surplus"), ("surplus",)),
        (("info", "rxt-alpha-micr"), ("no preset",)),
        (("info", "rxt-alpha-micro/wheel"), ("wheel", "encoder")),
        (("info", "--keys"), ("--keys",)),
        (("info", "mlm-alpha-micro", "--keys"), ("--keys", "preset")),
        (("info", "./absent"), ("absent",)),
        (("bench", "absent"), ("absent", "scaling")),
        (("bench", "--json", "scaling"), ("--json",)),
        (("train",), ("RECIPE",)),
        (("train", "giant"), ("giant", "demo")),
        (("train", "demo", "--steps", "0"), ("--steps", "integer of at least 1")),
        (("doctor", "./absent"), ("absent", "no directory")),
        (("doctor", "demo", "surplus"), ("surplus",)),
        (("demo", "--model", "./absent"), ("absent",)),
    ],
)
def test_wrong_arguments_are_answered_in_one_sentence(
    rxt: Rxt, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(rxt(*arguments), *words)


def test_debugging_shows_the_traceback(rxt: Rxt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RXT_DEBUG", "1")
    outcome = rxt("info", "absent")
    assert outcome.status == 2
    assert "Traceback" in outcome.err
    assert outcome.err.strip().splitlines()[-1].startswith("rxt: ")


def test_failures_of_the_program_have_another_status(rxt: Rxt, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the cat\n is on the keyboard")

    monkeypatch.setattr("rxt_model.cli.doctor.collect", fail)
    refused(rxt("doctor"), "RuntimeError: the cat is on the keyboard", status=1)
    monkeypatch.setattr("rxt_model.cli.doctor.collect", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    refused(rxt("doctor"), "interrupted", status=130)


def test_sentences() -> None:
    assert sentence(OSError(28, "No space left on device", "talk.st")) == "talk.st: no space left on device."
    assert sentence(OSError(28, "No space left on device")) == "no space left on device."
    assert sentence(KeyError("memory")) == "KeyError: 'memory'."
    assert sentence(ValueError()) == "ValueError without a message."


def test_a_reader_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == ""


# -- chat on a pipe ---------------------------------------------------------------------------------------------------


def test_chat_on_a_pipe_keeps_answers_apart_from_notices(rxt: Rxt, model_directory: Path) -> None:
    outcome = rxt("chat", "--model", model_directory, messages=["hello there", "", "  ", "/info", "//slash"])
    assert outcome.status == 0
    assert outcome.out.endswith("\n")
    assert "[memory updated" not in outcome.out
    assert outcome.err.count("[memory updated") == 2
    assert "turn 2" in outcome.err
    assert "2,048 bytes" in outcome.err
    assert "> " not in outcome.out


def test_chat_as_json(rxt: Rxt, model_directory: Path) -> None:
    outcome = rxt("chat", "--model", model_directory, "--json", "--seed", 3, messages=["hello there", "//slash"])
    assert outcome.status == 0
    first, second = outcome.turns
    assert (first["turn"], first["message"], first["stopped"]) == (1, "hello there", False)
    assert second["message"] == "/slash"
    assert first["state_bytes"] == second["state_bytes"] == 2 * 8 * 32 * 4
    assert first["tokens"] > 0
    assert first["saved_to"] is None


def test_weights_are_packed_as_told_for_decoding(rxt: Rxt) -> None:
    outcome = rxt("chat", "--weights", "int8", "--seed", 0, messages=["My name is Anna.", "What is my name?"])
    if native_runtime.available():
        assert (outcome.status, "Anna" in outcome.out) == (0, True)
    else:
        refused(outcome, "--weights int8", "takes the native engine")


def test_streamed_text_is_the_answer(rxt: Rxt, model_directory: Path) -> None:
    arguments = ("chat", "--model", model_directory, "--seed", 3)
    streamed = rxt(*arguments, messages=["hello there"]).out
    assert streamed.strip() == rxt(*arguments, "--json", messages=["hello there"]).turns[0]["answer"]


@pytest.mark.parametrize("drawing", [(), ("--temperature", "0.9", "--top-k", "50", "--top-p", "0.95")])
def test_a_restored_conversation_goes_on_as_it_would_have(
    rxt: Rxt, model_directory: Path, drawing: tuple[str, ...]
) -> None:
    arguments = ("chat", "--model", model_directory, "--json", "--seed", "7", *drawing)
    whole = rxt(*arguments, messages=MESSAGES)
    first = rxt(*arguments, "--save", "talk.st", messages=MESSAGES[:1])
    rest = rxt(*arguments, "--load", "talk.st", "--save", "talk.st", messages=MESSAGES[1:])
    assert whole.status == first.status == rest.status == 0
    answers = [(turn["turn"], turn["answer"]) for turn in whole.turns]
    assert [(turn["turn"], turn["answer"]) for turn in first.turns + rest.turns] == answers
    state = load_state("talk.st")
    assert state.turns == 3
    assert [exchange.message for exchange in Transcript.from_notes(state.notes).exchanges] == list(MESSAGES)


def test_saved_after_every_update(rxt: Rxt, model_directory: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        turns: list[int] = []
        original = RxTAlpha.save_conversation

        def record(self: RxTAlpha, path: Path, notes: dict[str, str]) -> Path:
            turns.append(self.turns)
            return original(self, path, notes)

        patch.setattr(RxTAlpha, "save_conversation", record)
        outcome = rxt("chat", "--model", model_directory, "--save", "talk.st", messages=MESSAGES)
    assert turns == [1, 2, 3]
    assert outcome.err.count("saved to talk.st") == 3
    assert [path.name for path in Path.cwd().iterdir()] == ["talk.st"]


def test_no_saved_conversation_is_overwritten_unasked(rxt: Rxt, model_directory: Path) -> None:
    arguments = ("chat", "--model", model_directory)
    rxt(*arguments, "--save", "talk.st", messages=MESSAGES)
    kept = Path("talk.st").read_bytes()
    refused(rxt(*arguments, "--save", "talk.st", messages=["hello"]), "talk.st exists", "--load talk.st")
    rxt(*arguments, "--save", "other.st", messages=["hello"])
    refused(rxt(*arguments, "--load", "other.st", "--save", "talk.st", messages=["hello"]), "talk.st exists")
    outcome = rxt(*arguments, messages=["hello", "/save talk.st"])
    assert outcome.status == 2
    assert "talk.st exists" in outcome.err
    assert Path("talk.st").read_bytes() == kept
    assert rxt(*arguments, "--save", "talk.st", "--overwrite", messages=["hello"]).status == 0
    assert load_state("talk.st").turns == 1


def test_commands(rxt: Rxt, model_directory: Path) -> None:
    outcome = rxt(
        "chat", "--model", model_directory, "--json",
        messages=["hello", "/save one.st", "hello", "/reset", "hello", "/load one.st", "/save", "hello", "/help", "/quit", "x"],
    )  # fmt: skip
    assert outcome.status == 0
    assert [turn["turn"] for turn in outcome.turns] == [1, 2, 1, 3]
    assert [turn["saved_to"] for turn in outcome.turns] == [None, "one.st", None, "one.st"]
    assert "one.st keeps the one before" in outcome.err
    assert "/reset" in outcome.err
    assert load_state("one.st").turns == 3


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/frobnicate", ("/frobnicate", "/help")),
        ("/save", ("/save FILE",)),
        ("/save absent/x.st", ("does not exist",)),
        ("/load", ("/load",)),
        ("/load absent.st", ("absent.st",)),
        ("/reset now", ("/reset", "'now'")),
        ("x" * 400, ("max_seq_len",)),
    ],
)
def test_lines_that_cannot_be_followed_end_a_script(
    rxt: Rxt, model_directory: Path, command: str, words: tuple[str, ...]
) -> None:
    refused(rxt("chat", "--model", model_directory, messages=[command, "hello"]), *words)


def test_input_that_is_not_text(rxt: Rxt, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "StringIO", lambda _: io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    refused(rxt("chat", "--model", model_directory), "not utf-8 text")


def test_a_system_prompt_is_in_memory_and_comes_back_after_a_reset(rxt: Rxt, model_directory: Path) -> None:
    arguments = ("chat", "--model", model_directory, "--json", "--seed", "1")
    prompt = ("--system-prompt", "my name is Anna")
    plain = rxt(*arguments, messages=["hello", "/save plain.st"])
    prompted = rxt(*arguments, *prompt, messages=["hello", "/save prompted.st", "/reset", "hello", "/save again.st"])
    assert plain.status == prompted.status == 0
    memories = [load_state(f"{name}.st").memory for name in ("plain", "prompted", "again")]
    assert not torch.equal(memories[0], memories[1])
    assert torch.equal(memories[1], memories[2])
    refused(rxt(*arguments, *prompt, "--load", "plain.st"), "--system-prompt", "--load")
    refused(rxt(*arguments, "--system-prompt", ""), "system prompt is empty")


def test_thinking_modes(rxt: Rxt, model_directory: Path, beta_directory: Path) -> None:
    refused(rxt("chat", "--model", model_directory, "--thinking-mode", "fast"), "--thinking-mode", "RxT-Beta")
    arguments = ("chat", "--model", beta_directory, "--max-seq-len", "40")
    extended = rxt(*arguments, "--thinking-mode", "extended", "--json", messages=["hello there"])
    assert extended.turns[0]["thinking"] != ""
    assert "[thinking] " in rxt(*arguments, "--thinking-mode", "extended", messages=["hello there"]).out
    fast = rxt(*arguments, "--thinking-mode", "fast", "--json", messages=["hello there"])
    assert fast.turns[0]["answer"] != ""
    assert fast.turns[0]["thinking"] == ""


def test_a_model_that_cannot_talk(rxt: Rxt, model_directory: Path, tmp_path: Path) -> None:
    model = make_model(RxTAlpha, 0)
    model.decoder.save_pretrained("decoder")
    refused(rxt("chat", "--model", "./decoder"), "an RxT decoder", "full")
    shutil.copytree(model_directory, "silent")
    Path("silent/tokenizer.json").unlink()
    refused(rxt("chat", "--model", "./silent"), "tokenizer.json")
    Path("empty").mkdir()
    refused(rxt("chat", "--model", "./empty"), "no such file")
    refused(rxt("chat", "--model", "./silent/config.json"), "is a file")
    refused(rxt("chat", "--model", model_directory, "--top-k", "5000", "--temperature", "1"), "--top-k", "296")


def test_damaged_models(rxt: Rxt, model_directory: Path) -> None:
    shutil.copytree(model_directory, "damaged")
    weights = Path("damaged/model.safetensors")
    whole = weights.read_bytes()
    for content in (b"", whole[:5], whole[:100], whole[:-1], b"PK\x03\x04" + whole, b"\x80\x02" + whole):
        weights.write_bytes(content)
        refused(rxt("chat", "--model", "./damaged"), "model.safetensors")
        refused(rxt("info", "./damaged"), "model.safetensors")
    weights.write_bytes(whole)
    Path("damaged/config.json").write_text("{")
    refused(rxt("chat", "--model", "./damaged"), "config.json")


def test_conversations_that_cannot_be_continued(rxt: Rxt, model_directory: Path) -> None:
    arguments = ("chat", "--model", model_directory)
    Path("noise.st").write_bytes(b"noise")
    refused(rxt(*arguments, "--load", "noise.st"), "noise.st", "damaged")
    refused(rxt(*arguments, "--load", model_directory / "model.safetensors"), "not a saved conversation")
    rxt(*arguments, "--save", "talk.st", messages=["hello"])
    make_model(RxTAlpha, 1).save_pretrained("other")
    refused(rxt("chat", "--model", "./other", "--load", "talk.st"), "fingerprint", "talk.st")
    whole = Path("talk.st").read_bytes()
    Path("talk.st").write_bytes(whole[:-9])
    refused(rxt(*arguments, "--load", "talk.st"), "talk.st", "damaged")


def test_a_failed_save_keeps_the_last_one_and_the_conversation(
    rxt: Rxt, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([False, True, True])
    replace = os.replace

    def fail_later(source: Path, target: Path) -> None:
        if next(calls):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr("rxt_model.files.os.replace", fail_later)
    outcome = rxt("chat", "--model", model_directory, "--save", "talk.st", "--json", messages=MESSAGES[:2])
    assert outcome.status == 1
    assert [turn["saved_to"] for turn in outcome.turns] == ["talk.st", None]
    assert "no space left on device" in outcome.err
    assert load_state("talk.st").turns == 1
    assert [path.name for path in Path.cwd().iterdir()] == ["talk.st"]


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupt_at_token(session: ChatSession, number: int, *, presses: int = 1) -> None:
    """Ctrl-C, once or more, when the answer's token of this number is shown."""
    stringify, count = session.model.stringify_token, 0

    def shown(token: int, show_memory_update: bool = False) -> str:
        nonlocal count
        count += token >= 0
        if count == number and token >= 0:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        return stringify(token, show_memory_update)

    session.model.stringify_token = shown  # type: ignore[method-assign, assignment]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "talk.st"
    session.autosave_to(path)
    interrupt_at_token(session, 3)
    with session._interrupts:
        answer = session.answer("hello there")
        assert answer.exchange is not None
        assert answer.exchange.stopped
        assert answer.tokens == 3
        assert session.model.turns == 1
        following = session.answer("hello there")
    assert following.exchange is not None
    assert not following.exchange.stopped
    state = load_state(path)
    assert state.turns == 2
    assert [exchange.stopped for exchange in Transcript.from_notes(state.notes).exchanges] == [True, False]


def test_a_second_ctrl_c_drops_the_answer(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "talk.st"
    session.autosave_to(path)
    with session._interrupts:
        session.answer("hello there")
        memory, saved = session.model.export_stm_state(), path.read_bytes()
        interrupt_at_token(session, 2, presses=2)
        answer = session.answer("my name is Anna")
    assert answer.exchange is None
    assert torch.equal(session.model.export_stm_state(), memory)
    assert session.model.turns == 1
    assert path.read_bytes() == saved
    assert len(session.transcript.exchanges) == 1


def test_a_second_ctrl_c_inside_the_model_drops_the_answer(session: ChatSession) -> None:
    memory = session.model.export_stm_state()
    layer = session.model.decoder.model.layers[0]
    passes = 0

    def press(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with session._interrupts, layer.register_forward_pre_hook(press):
        assert session.answer("hello there").exchange is None
    assert torch.equal(session.model.export_stm_state(), memory)
    assert session.model.turns == 0


def test_ctrl_c_does_not_touch_the_memory_update(session: ChatSession, tmp_path: Path) -> None:
    session.autosave_to(tmp_path / "talk.st")

    def press(*_: object) -> None:
        for _press in range(3):
            signal.raise_signal(signal.SIGINT)

    with session._interrupts as interrupts, session.model.memory_attention.register_forward_pre_hook(press):
        answer = session.answer("hello there")
    assert answer.exchange is not None
    assert not answer.exchange.stopped
    assert interrupts.requested
    assert load_state(tmp_path / "talk.st").turns == session.model.turns == 1


def test_ctrl_c_does_not_touch_a_file_being_saved(
    session: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.autosave_to(tmp_path / "talk.st")
    replace = os.replace

    def press(source: Path, target: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        replace(source, target)

    monkeypatch.setattr("rxt_model.files.os.replace", press)
    with session._interrupts:
        answer = session.answer("hello there")
    assert answer.saved_to == tmp_path / "talk.st"
    assert load_state(tmp_path / "talk.st").turns == 1


def test_ctrl_c_elsewhere_is_what_it_always_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not interrupts.requested
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


class Terminal:
    """A real ``rxt chat`` on a pseudo-terminal; ``program`` is run instead of the command line itself."""

    def __init__(self, *arguments: object, program: str | None = None) -> None:
        import pty

        self.child, self.descriptor = pty.fork()
        if self.child == 0:  # pragma: no cover  # the other process
            os.chdir(REPOSITORY)
            run = ["-m", "rxt_model.cli"] if program is None else ["-c", program]
            os.execv(sys.executable, [sys.executable, *run, *map(str, arguments)])
        self.output = b""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, *texts: str, seconds: float = 60.0) -> str:
        """Wait until one of the texts comes, counted from what was waited for before; what came in front of it."""
        deadline = time.monotonic() + seconds
        while not (found := [text.encode() for text in texts if text.encode() in self.output]):
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"none of {texts} came; the output ends with {self.output[-500:]!r}"
            self.output += os.read(self.descriptor, 1 << 16)
        before, self.output = self.output.split(found[0], 1)
        return before.decode(errors="replace")

    def interrupt_until_it_ends(self) -> None:
        """Ctrl-C at a prompt, again if nothing comes of it.

        Python misses one that comes after a prompt is shown and before its reader waits for keys: nobody is that quick, but a
        test is.
        """
        deadline = time.monotonic() + 60.0
        with contextlib.suppress(OSError):  # the other side is closed
            while time.monotonic() < deadline:
                self.type("\x03")
                while select.select([self.descriptor], [], [], 5.0)[0]:
                    os.read(self.descriptor, 1 << 16)

    def status(self, seconds: float = 60.0) -> int:
        """The exit status, once the process has ended."""
        with contextlib.suppress(OSError):  # the other side is closed
            while select.select([self.descriptor], [], [], seconds)[0]:
                os.read(self.descriptor, 1 << 16)
            os.kill(self.child, signal.SIGKILL)
        _, status = os.waitpid(self.child, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix")
def test_a_conversation_on_a_terminal(model_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.st"
    arguments = ("chat", "--model", model_directory, "--save", path, "--max-seq-len", "100000")
    terminal = Terminal(*arguments)
    terminal.wait_for("/help")
    terminal.wait_for("> ")
    terminal.type("hello there\n")
    terminal.wait_for("hello there\r\n")
    assert os.read(terminal.descriptor, 1) != b""  # the answer has begun; it would go on for 100,000 tokens
    terminal.type("\x03")
    terminal.wait_for("[stopped; memory updated with what was said: turn 1")
    terminal.wait_for("> ")
    terminal.type("/frobnicate\n")
    terminal.wait_for("/frobnicate is no command")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.status() == 0
    state = load_state(path)
    assert state.turns == 1
    assert Transcript.from_notes(state.notes).exchanges[0].stopped
    assert [file.name for file in tmp_path.iterdir()] == ["talk.st"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are Unix")
def test_a_signal_to_a_script_keeps_the_saved_conversation(model_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.st"
    command = [sys.executable, "-m", "rxt_model.cli", "chat", "--model", str(model_directory), "--save", str(path)]
    with subprocess.Popen(
        [*command, "--max-seq-len", "100000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"hello there\nmy name is Anna\n")
        process.stdin.flush()
        assert process.stdout.read(1) != b""
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    state = load_state(path)
    assert state.turns == 1
    assert Transcript.from_notes(state.notes).exchanges[0].stopped


# -- memory updates in the background -----------------------------------------------------------------------------------


def background_session(model_directory: Path, **settings: Any) -> tuple[ChatSession, list[Any], threading.Event]:
    """A session whose updates wait for the event; and what it says when they are done."""
    told: list[Any] = []
    gate = threading.Event()
    session = ChatSession(
        RxTAlpha.from_pretrained(model_directory), Settings(seed=1, **settings), on_update=told.append
    )
    session.model.memory_attention.register_forward_pre_hook(lambda *_: gate.wait(60) and None)
    return session, told, gate


def break_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = RxTMemoryAttention.forward
    error = iter([RuntimeError("the hippocampus is busy")])

    def fail(self: RxTMemoryAttention, *arguments: Any) -> Any:
        for one in error:
            raise one
        return forward(self, *arguments)

    monkeypatch.setattr(RxTMemoryAttention, "forward", fail)


def test_an_answer_does_not_wait_for_its_update(model_directory: Path, session: ChatSession, tmp_path: Path) -> None:
    quick, told, gate = background_session(model_directory)
    quick.autosave_to(tmp_path / "talk.st")
    answer = quick.answer("hello there")
    assert answer.exchange is not None
    assert answer.exchange.turn == 1
    assert not told
    assert not (tmp_path / "talk.st").exists()
    gate.set()
    quick.settle()
    assert told == [answer]
    assert answer.saved_to == tmp_path / "talk.st"
    assert answer.update_seconds > 0
    assert not quick.unsaved
    assert answer.exchange == session.answer("hello there").exchange
    assert torch.equal(load_state(tmp_path / "talk.st").memory, session.model.export_stm_state())
    following = quick.answer("my name is Anna")
    assert following.exchange == session.answer("my name is Anna").exchange
    quick.settle()
    assert [exchange.turn for exchange in quick.transcript.exchanges] == [1, 2]


@pytest.mark.parametrize(
    "call",
    [
        lambda session, path: session.answer("my name is Anna"),
        lambda session, path: session.save(),
        lambda session, path: session.autosave_to(path / "other.st"),
        lambda session, path: session.load(path / "saved.st"),
        lambda session, path: session.reset(),
        lambda session, path: session.describe(),
    ],
)
def test_whatever_a_session_does_next_waits(model_directory: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    session, told, gate = background_session(model_directory)
    session.model.save_conversation(tmp_path / "saved.st", {})
    session.autosave_to(tmp_path / "talk.st")
    session.answer("hello there")
    threading.Timer(0.05, gate.set).start()
    call(session, tmp_path)
    assert load_state(tmp_path / "talk.st").turns in (1, 2)
    assert told


def test_a_second_ctrl_c_drops_an_answer_behind_an_update(model_directory: Path, tmp_path: Path) -> None:
    session, told, gate = background_session(model_directory)
    gate.set()
    session.autosave_to(tmp_path / "talk.st")
    with session._interrupts:
        session.answer("hello there")
        interrupt_at_token(session, 2, presses=2)
        assert session.answer("my name is Anna").exchange is None
        memory, saved = session.model.export_stm_state(), load_state(tmp_path / "talk.st")
    assert torch.equal(memory, saved.memory)
    assert session.model.turns == saved.turns == len(told) == 1


def test_a_failed_update_ends_a_script(rxt: Rxt, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("chat", "--model", model_directory, "--save", "talk.st")
    assert rxt(*arguments, messages=["hello there"]).status == 0
    for lines in (["hello there"], ["hello there", "my name is Anna"], ["hello there", "/info"]):
        with monkeypatch.context() as patch:
            break_the_next_update(patch)
            outcome = rxt(*arguments, "--load", "talk.st", messages=lines)
        assert outcome.status == 1
        assert outcome.err.count("memory update of the last interaction failed") == 1
        assert "the hippocampus is busy" in outcome.err
        assert load_state("talk.st").turns == 1, "what was saved stays"


def test_a_person_hears_of_a_failed_update_and_goes_on(
    rxt: Rxt, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(io, "StringIO", Keyboard)
    break_the_next_update(monkeypatch)
    outcome = rxt("chat", "--model", model_directory, "--save", "talk.st", messages=["hello there", "my name is Anna"])
    assert outcome.status == 0
    assert outcome.err.index("the hippocampus is busy") < outcome.err.index("[memory updated: turn 1")
    transcript = Transcript.from_notes(load_state("talk.st").notes)
    assert [exchange.message for exchange in transcript.exchanges] == ["my name is Anna"]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix")
def test_a_prompt_comes_at_once_and_again_below_the_notice(model_directory: Path, tmp_path: Path) -> None:
    program = """
import sys, time
from rxt_model.cli import main
from rxt_model.memory_attention import RxTMemoryAttention
forward = RxTMemoryAttention.forward
def slowly(self, *arguments):
    time.sleep(2.0)
    return forward(self, *arguments)
RxTMemoryAttention.forward = slowly
sys.exit(main(sys.argv[1:]))
"""
    path = tmp_path / "talk.st"
    terminal = Terminal("chat", "--model", model_directory, "--save", path, "--seed", 1, program=program)
    terminal.wait_for("/help")
    terminal.wait_for("> ")
    terminal.type("hello there\n")
    terminal.wait_for("hello there\r\n")
    line = terminal.wait_for("[memory updated: turn 1").rsplit("\n", 1)[-1]
    assert "> " in line, "the prompt was there before memory was updated"
    assert line.endswith("\r"), "and the notice takes its place"
    terminal.wait_for("\n> ")
    terminal.type("my name is Anna\n")
    terminal.wait_for("my name is Anna\r\n")
    terminal.wait_for("\n> ")
    terminal.interrupt_until_it_ends()  # most likely before memory is updated: it is, and is saved, all the same
    assert terminal.status() == 0
    assert load_state(path).turns == 2


def test_no_answer_moves_the_cursor(session: ChatSession) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    session._output = Screen()
    session._write("a\x1b[2Jb\x9bc\n")
    assert session._output.getvalue() == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c\n"


def test_transcripts_keep_the_newest() -> None:
    exchanges = [Exchange(turn, "x" * 1_000_000, "y" * 500_000) for turn in range(1, 6)]
    kept = Transcript.from_notes(Transcript(exchanges).notes()).exchanges
    assert [exchange.turn for exchange in kept] == [4, 5]
    for notes in ({}, {"transcript": "{"}, {"transcript": "3"}, {"transcript": '[{"turn": 1}]'}):
        assert Transcript.from_notes(notes).exchanges == []


# -- info -------------------------------------------------------------------------------------------------------------


def test_presets_are_listed(rxt: Rxt) -> None:
    from rxt_model.presets import PRESETS

    assert list(json.loads(rxt("info", "--json").out)) == list(PRESETS)
    assert [line.split()[0] for line in rxt("info").out.splitlines()] == list(PRESETS)


def test_info_of_a_preset(rxt: Rxt) -> None:
    report = json.loads(rxt("info", "rxt-beta-micro", "--json").out)
    components = report["components"]
    assert components["decoder"]["parameters"] == {"total": 251_304_192, "active": 41_432_320}
    assert components["encoder"]["parameters"]["total"] == 18_320_384
    assert components["memory_attention"]["parameters"]["total"] == 3_731_200
    assert report["memory"]["state_bytes"]["float32"] == 14 * 1024 * 256 * 4
    assert components["decoder"]["mixture_of_experts"]["layout"] == "per expert"
    assert components["decoder"]["rotary"]["layout"] == "split"
    text = rxt("info", "rxt-beta-micro").out
    for words in ("251,304,192", "41,432,320", "14,680,064", "split", "gated-self-interlayer", "32,000"):
        assert words in text


def test_info_of_every_kind_of_preset(rxt: Rxt) -> None:
    for name, total in (
        ("rxt-beta-3b", 2_927_674_880),
        ("mlm-alpha-mini", 2_636_304),
        ("rxt-alpha-micro/encoder", None),
    ):
        report = json.loads(rxt("info", name, "--json").out)
        assert total in (None, report["parameters"]["total"])
        assert rxt("info", name).status == 0
    assert json.loads(rxt("info", "sqat-m-sqa", "--json").out)["memory"] is None


def test_info_of_a_checkpoint(rxt: Rxt, model_directory: Path, beta_directory: Path) -> None:
    report = json.loads(rxt("info", model_directory, "--json").out)
    assert report["component"] == "rxt_alpha"
    assert report["file"]["bytes"] == (model_directory / "model.safetensors").stat().st_size
    assert report["tokenizer"]
    names = [tensor["name"] for tensor in report["file"]["tensors"]]
    assert "decoder.model.head.weight" in names
    listing = rxt("info", model_directory, "--keys").out
    assert all(name in listing for name in names)
    assert json.loads(rxt("info", beta_directory, "--json").out)["component"] == "rxt_beta"


def test_info_of_components_written_elsewhere(rxt: Rxt, model_directory: Path) -> None:
    """Without this package's metadata, the kind is told from the names of the tensors."""
    from safetensors.torch import load_file, save_file

    from rxt_model import MLMHead, MLMHeadConfig

    model = make_model(RxTAlpha, 0)
    head = MLMHead(MLMHeadConfig(embed_dim=4, vocab_size=6))
    for name, part in {
        "decoder": model.decoder,
        "encoder": model.encoder,
        "memory_attention": model.memory_attention,
        "mlm_head": head,
        "rxt_alpha": model,
        "rxt_beta": make_model(RxTBeta, 0),
    }.items():
        part.save_pretrained(name)
        weights = Path(name) / "model.safetensors"
        save_file(load_file(weights), weights, metadata={"format": "pt"})
        assert json.loads(rxt("info", f"./{name}", "--json").out)["component"] == name
    save_file({"wheel": torch.zeros(1)}, "mlm_head/model.safetensors")
    refused(rxt("info", "./mlm_head"), "'wheel'")


def test_info_of_a_saved_conversation(rxt: Rxt, model_directory: Path) -> None:
    rxt("chat", "--model", model_directory, "--save", "talk.st", messages=MESSAGES)
    report = json.loads(rxt("info", "talk.st", "--json").out)
    assert (report["turns"], report["exchanges"], report["memory"]["bytes"]) == (3, 3, 2048)
    assert "3, 3 of them with their text" in rxt("info", "talk.st").out
    refused(rxt("info", "talk.st", "--keys"), "--keys", "saved conversation")


# -- bench, train, doctor, demo ---------------------------------------------------------------------------------------


@pytest.fixture
def asked_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Benchmarks of these tests' own instead of those installed; what they were asked is in the mapping."""
    asked: dict[str, Any] = {}
    package = types.ModuleType("rxt_benchmarks")
    package.__path__ = []
    package.BENCHMARKS = {"sloth": "how slow it is", "absent": "listed and not there", "hungry": "wants a package"}  # type: ignore[attr-defined]
    sloth = types.ModuleType("rxt_benchmarks.sloth", "How slow a sloth is.")
    sloth.add_arguments = lambda parser: parser.add_argument("--turns", type=int)  # type: ignore[attr-defined]

    def run(options: Any) -> int:
        asked["turns"] = options.turns
        if options.turns == 13:
            raise ModuleNotFoundError("matplotlib is not installed.")
        return 4

    sloth.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rxt_benchmarks", package)
    monkeypatch.setitem(sys.modules, "rxt_benchmarks.sloth", sloth)
    return asked


def test_benchmarks_are_listed_and_run(rxt: Rxt, asked_of_benchmarks: dict[str, Any]) -> None:
    assert json.loads(rxt("bench", "--json").out)["sloth"] == "how slow it is"
    assert rxt("bench").out.splitlines()[0].split(maxsplit=1) == ["sloth", "how slow it is"]
    assert rxt("bench", "sloth", "--turns", 7).status == 4
    assert asked_of_benchmarks == {"turns": 7}
    helped = rxt("bench", "sloth", "--help")
    assert helped.status == 0
    assert helped.out.startswith("usage: rxt bench sloth")
    refused(rxt("bench", "sloth", "--turns", "x"), "--turns", "rxt bench sloth --help")
    refused(rxt("bench", "sloth", "--turns", 13), "matplotlib")
    refused(rxt("bench", "absent"), "not in this installation")


def test_an_installation_without_benchmarks(rxt: Rxt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rxt_benchmarks", None)
    refused(rxt("bench"), "no benchmarks", "source tree")
    refused(rxt("bench", "scaling"), "no benchmarks")
    assert json.loads(rxt("doctor", "--json").out)["benchmarks"] == []


def test_the_scaling_benchmark_is_there(rxt: Rxt) -> None:
    assert "scaling" in json.loads(rxt("bench", "--json").out)
    assert "--plot" in rxt("bench", "scaling", "--help").out
    refused(rxt("bench", "scaling", "--turns", "many"), "--turns")
    refused(rxt("bench", "scaling", "--model", "absent"), "absent", "rxt-alpha-micro")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Training that ends at once."""
    calls: list[dict[str, Any]] = []

    def train_demo(directory: Path, **options: Any) -> Path:
        calls.append({"directory": directory, **options})
        if options["steps"] == 13:
            raise ModuleNotFoundError("Training needs chitchat-dataset, which is not installed.")
        if options["steps"] == 14:
            raise KeyboardInterrupt
        result = types.SimpleNamespace(loss=torch.tensor(2.5), recall={1: (3, 4), 8: (1, 2)})
        options["on_step"](1, result)
        options["on_step"](2, result)
        return directory

    monkeypatch.setattr("rxt_model.training.demo.train_demo", train_demo)
    return calls


def test_training(rxt: Rxt, trained: list[dict[str, Any]]) -> None:
    outcome = rxt("train", "demo", "--output", "out", "--steps", 5, "--seed", 3, "--no-resume")
    assert outcome.status == 0
    assert "rxt chat --model out" in outcome.out
    assert outcome.err == "step 1: loss 2.500, recall 75% at 1 to 3, 50% at 8 and more\n"
    call = trained[0]
    assert (call["directory"], call["steps"], call["seed"], call["resume"]) == (Path("out"), 5, 3, False)
    refused(rxt("train", "demo", "--output", "out", "--steps", 13), "chitchat-dataset")
    interrupted = rxt("train", "demo", "--output", "out", "--steps", 14)
    assert interrupted.status == 130
    assert "before anything was saved" in interrupted.err


def test_training_of_the_control(rxt: Rxt, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def train_stateless(directory: Path, tokenizer: Tokenizer, **options: Any) -> Path:
        calls.append((directory, tokenizer.vocab_size, options["steps"]))
        return directory

    monkeypatch.setattr("rxt_model.training.stateless_control.train_stateless", train_stateless)
    outcome = rxt("train", "stateless", "--model", model_directory, "--steps", 7)
    assert outcome.status == 0
    assert f"rxt bench memory --model {model_directory} --history runs/stateless" in outcome.out
    own = Tokenizer.from_pretrained(model_directory).vocab_size
    assert calls == [(Path("runs/stateless"), own, 7)]
    assert "`rxt bench memory --history out`" in rxt("train", "stateless", "--output", "out").out
    refused(rxt("train", "stateless", "--model", "absent"), "absent")


def test_training_does_not_replace_a_model_unasked(rxt: Rxt, trained: list[dict[str, Any]]) -> None:
    Path("out").mkdir()
    Path("out/model.safetensors").touch()
    refused(rxt("train", "demo", "--output", "out"), "finished model", "--overwrite")
    assert rxt("train", "demo", "--output", "out", "--overwrite").status == 0
    Path("out/training-state-1.safetensors").touch()
    outcome = rxt("train", "demo", "--output", "out")
    assert outcome.status == 0
    assert "continuing" in outcome.err
    Path("file").touch()
    refused(rxt("train", "demo", "--output", "file"), "is a file")


def test_doctor(rxt: Rxt, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RXT_DEMO_MODEL", str(model_directory))
    report = json.loads(rxt("doctor", "--json").out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["operations"]["swiglu"]["reference"]["available"]
    assert report["operations"]["swiglu"]["native"]["available"] == report["native_kernels"]["available"]
    assert report["demo_model"]["state"] == "present"
    assert len(report["demo_model"]["sha256"]) == 64
    assert set(report["optional_packages"]) == {"matplotlib", "chitchat-dataset", "triton", "transformers"}
    text = rxt("doctor").out
    for words in ("Backends", "swiglu", "Demo model: present", "matplotlib", report["demo_model"]["fingerprint"][:12]):
        assert words in text


def test_doctor_without_a_demo_model(rxt: Rxt, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RXT_DEMO_MODEL", "absent")
    outcome = rxt("doctor")
    assert outcome.status == 0
    assert "Demo model: missing" in outcome.out
    for command in ("chat", "demo"):
        refused(rxt(command), "demo model is not in this installation", "rxt train demo")
    refused(rxt("info", "demo"), "demo model")
    shutil.copytree(model_directory, "damaged")
    Path("damaged/model.safetensors").write_bytes(b"noise")
    monkeypatch.setenv("RXT_DEMO_MODEL", "damaged")
    outcome = rxt("doctor")
    assert outcome.status == 1
    assert "Demo model: damaged" in outcome.out


def test_the_script_of_the_demo_asks_for_what_it_told() -> None:
    values = {attribute.key: attribute.values for attribute in ATTRIBUTES}
    for turn, line in enumerate(SCRIPT, start=1):
        if line.expected:
            assert line.attribute in values
            assert line.expected in values[line.attribute]
            assert 1 <= line.told < turn
            assert line.expected in SCRIPT[line.told - 1].message
            later = SCRIPT[line.told : turn - 1]
            assert not any(word in other.message for other in later for word in (f"My {line.attribute}", line.expected))


def test_answers_are_marked_honestly() -> None:
    asked = Line("Where do I live now?", "city", "Oslo", 8)
    assert is_right(asked, "You live in Oslo.")
    assert is_right(asked, "You live in Lisbon.") is False
    assert is_right(asked, "Lisbon or Oslo.") is False
    assert is_right(asked, "") is False
    untold = Line("How old am I?", "age")
    assert is_right(untold, "You have not told me that yet.")
    assert is_right(untold, "You are 42 years old.") is False
    assert is_right(Line("Hello!"), "Hello!") is None


def test_demo(rxt: Rxt, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RXT_DEMO_MODEL", str(model_directory))
    measured: list[list[str]] = []

    def run_benchmark(name: str, arguments: list[str]) -> int:
        measured.append([name, *arguments])
        return 0

    monkeypatch.setattr("rxt_model.cli.bench.run_benchmark", run_benchmark)
    outcome = rxt("demo", "--output", "out")
    assert outcome.status == 0
    assert f"0 of {sum(line.attribute is not None for line in SCRIPT)} questions answered right" in outcome.out
    assert outcome.out.count("<- WRONG") == 7
    assert measured == [["scaling", "--short", "--json", "out/demo-scaling.json", "--plot", "out/demo-scaling.png"]]
    report = json.loads(rxt("demo", "--json").out)
    assert (report["asked"], report["right"], len(report["turns"])) == (7, 0, len(SCRIPT))
    assert report["memory_bytes"] == 2048
    Path("file").touch()
    refused(rxt("demo", "--output", "file"), "is a file")


def test_demo_is_repeatable(model_directory: Path) -> None:
    model = RxTAlpha.from_pretrained(model_directory)
    answers = [[reply.answer for reply in hold_conversation(model, script=SCRIPT[:3])] for _ in range(2)]
    assert answers[0] == answers[1]
