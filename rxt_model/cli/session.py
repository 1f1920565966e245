"""A conversation on a terminal or a pipe: messages in, streamed answers out, memory saved after every update."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rxt_model.cli.errors import UserError, sentence
from rxt_model.cli.interrupts import Interrupts
from rxt_model.cli.transcript import Exchange, Transcript

if TYPE_CHECKING:
    from rxt_model.background import BackgroundTask
    from rxt_model.models import ReactiveTransformer

__all__ = ["Answer", "ChatSession", "Settings"]


_CONTROL_CHARACTERS = dict.fromkeys(
    {*range(0x20), *range(0x7F, 0xA0)} - {*map(ord, "\n\t")}, "\N{REPLACEMENT CHARACTER}"
)


@dataclass(frozen=True)
class Settings:
    """How answers are made; see ``Conversation.interact``.

    Attributes:
        seed: turn n of a conversation draws with ``seed + n``, so that a restored conversation goes on as it would have.
        system_prompt: written into memory before the first message, and again after a reset.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_seq_len: int | None = None
    seed: int | None = None
    thinking_mode: str | None = None
    system_prompt: str | None = None


@dataclass
class Answer:
    """What came of one message.

    Attributes:
        exchange: message and answer as text; None if the answer was dropped and memory is as before.
        tokens: tokens that were generated.
        seconds: from the message to the last token.
        update_seconds: the memory update; this and what follows is known once it is done.
        saved_to: the file that holds the conversation with this turn, if there is one.
        save_error: why it could not be saved although a file was named; the conversation goes on in memory.
    """

    exchange: Exchange | None = None
    tokens: int = 0
    seconds: float = 0.0
    update_seconds: float = 0.0
    saved_to: Path | None = None
    save_error: OSError | None = None


@dataclass
class _Parts:
    """The text of an answer, by the control token that opened each part."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {"answer": [], "thinking": [], "tool_call": []})
    current: str = "answer"

    def text(self, name: str) -> str:
        return "".join(self.texts[name]).strip()

    def exchange(self, turn: int, message: str, stopped: bool) -> Exchange:
        return Exchange(
            turn, message, self.text("answer"), self.text("thinking"), self.text("tool_call"), stopped=stopped
        )


class ChatSession:
    """One conversation with one model, and the file that keeps it.

    Nothing that was saved is ever lost: files are written whole or not at all; a file that this session neither wrote
    nor loaded is not overwritten; and after the conversation was reset or another one was loaded, nothing is saved
    until a file is named again.

    Args:
        model: a full model with a tokenizer.
        settings: how answers are made.
        output: where answers are streamed to; None streams nothing.
        interrupts: what Ctrl-C means; entered by the caller.
        on_update: if given, :meth:`answer` returns with the last token, memory is updated and saved in the background, and
            this is called there once the answer is complete. The session waits for it before it does anything else.
    """

    def __init__(
        self,
        model: ReactiveTransformer,
        settings: Settings,
        *,
        output: TextIO | None = None,
        interrupts: Interrupts | None = None,
        on_update: Callable[[Answer], None] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.transcript = Transcript()
        self.save_path: Path | None = None
        self.loaded_path: Path | None = None
        self.unsaved = False
        self._output = output
        self._interrupts = Interrupts() if interrupts is None else interrupts
        self._on_update = on_update
        self._completion: BackgroundTask | None = None
        own = min(model.default_max_seq_len, model.decoder.config.seq_len)
        self.max_seq_len = own if settings.max_seq_len is None else settings.max_seq_len
        self._begin()

    # -- the conversation and its file --------------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until the last answer is in memory, and saved if a file was named.

        Raises:
            MemoryUpdateError: memory could not be updated and is as it was before that message. Raised once.
        """
        if self._completion is not None:
            error = self._completion.wait()
            self._completion = None
            if error is not None:
                raise error

    def _begin(self) -> None:
        self.model.reset_stm(seed=self.settings.seed)
        self.transcript = Transcript()
        if self.settings.system_prompt is not None:
            self.model.init_model(self.settings.system_prompt, self.max_seq_len)
        self.unsaved = False

    def reset(self) -> None:
        """Forget the conversation and begin another; the saved one stays as it is."""
        with self._interrupts.shielded():
            self.settle()
            self._begin()
            self.save_path = self.loaded_path = None

    def load(self, path: Path) -> None:
        """Continue a saved conversation; if it cannot be loaded, this one goes on.

        Raises:
            FileNotFoundError, StateError: there is no such file, it is damaged, or it is another model's.
        """
        with self._interrupts.shielded():
            self.settle()
            state = self.model.load_conversation(path)
            self.transcript = Transcript.from_notes(state.notes)
            self.save_path, self.loaded_path = None, path
            self.unsaved = False

    def autosave_to(self, path: Path, *, known: bool = False) -> None:
        """Save after every memory update from now on.

        Args:
            path: the file.
            known: it may be overwritten, because the user said so.

        Raises:
            FileExistsError: the file exists and is not this session's.
        """
        self.settle()
        if path.exists() and not known and path not in (self.save_path, self.loaded_path):
            raise FileExistsError(
                f"{path} exists and would be overwritten; continue it with --load {path} --save {path} (or /load {path} "
                "and /save here), or name another file."
            )
        self.save_path = path

    def save(self) -> Path:
        """Write memory and transcript to the file named before, whole or not at all.

        Raises:
            UserError: no file was named.
            OSError: it cannot be written.
        """
        if self.save_path is None:
            raise UserError("there is no file to save to; name one: /save FILE.")
        with self._interrupts.shielded():
            self.settle()
            self._write_to(self.save_path)
        return self.save_path

    def _write_to(self, path: Path) -> None:
        from safetensors import SafetensorError

        self.unsaved = True
        try:
            self.model.save_conversation(path, self.transcript.notes())
        except (OSError, SafetensorError) as error:
            raise OSError(f"the conversation cannot be saved to {path}: {sentence(error)}") from error
        self.unsaved = False

    @property
    def state_bytes(self) -> int:
        """Bytes of the conversation's memory, whatever its length."""
        memory = self.model.stm.memory
        return memory.numel() * memory.element_size()

    def describe(self) -> dict[str, str]:
        """What ``/info`` shows."""
        self.settle()
        memory, settings = self.model.stm.memory, self.settings
        layers, _, slots, width = memory.shape
        draw = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
        draw += "" if settings.top_k is None else f", top-k {settings.top_k}"
        draw += "" if settings.top_p is None else f", top-p {settings.top_p:g}"
        draw += "" if settings.seed is None else f", seed {settings.seed}"
        return {
            "model": f"{type(self.model).__name__}, {sum(p.numel() for p in self.model.parameters()):,} parameters",
            "turns": f"{self.model.turns} in memory",
            "memory": f"{layers} layers of {slots} slots of width {width}, {self.state_bytes:,} bytes, whatever the number "
            "of turns",
            "answers": f"{draw}, at most {self.max_seq_len} tokens with the message",
            "saved": "nowhere" if self.save_path is None else f"{self.save_path}, after every memory update",
        }

    # -- one message --------------------------------------------------------------------------------------------------

    def answer(self, message: str) -> Answer:
        """Answer a message, update the memory, and save if a file was named.

        Ctrl-C stops the answer, and what was said is remembered; a second Ctrl-C before the next token drops the answer,
        and memory is as it was before the message.

        Raises:
            ValueError: the message cannot be answered, for instance because it is too long; memory is as it was.
            MemoryUpdateError: the last answer could not be written into memory in the background, and this message was not
                answered; see :meth:`settle`.
        """
        from rxt_model.interaction.text import MEMORY_UPDATE_START
        from rxt_model.memory import MemoryUpdateError

        self.settle()
        model, settings = self.model, self.settings
        query = model.tokenize_query(message, self.max_seq_len, model.device)
        before, turns = model.export_stm_state(), model.turns
        stream = model.interact(
            query["input_ids"],
            query["attention_mask"],
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_seq_len=self.max_seq_len,
            thinking_mode=settings.thinking_mode,
            seed=None if settings.seed is None else settings.seed + turns + 1,
            async_memory=self._on_update is not None,
        )
        result, parts = Answer(), _Parts()
        started = time.perf_counter()
        try:
            with self._interrupts.answering():
                result.tokens = self._stream(stream, parts)
                stopped = self._interrupts.requested
                # From here on the interaction is written and saved; Ctrl-C waits, or the background is not touched by it.
                with self._interrupts.shielded():
                    result.seconds = time.perf_counter() - started
                    # The bytes of a character that was cut off.
                    self._show(parts, model.stringify_token(MEMORY_UPDATE_START))
                    self._write("\n")
                    self._finish(stream, result, parts.exchange(turns + 1, message, stopped))
        except KeyboardInterrupt:
            with self._interrupts.shielded():
                with contextlib.suppress(MemoryUpdateError):
                    model.finish_memory_update()
                model.load_stm_state(before)
                model.turns = turns
                _close(stream)
        return result

    def _stream(self, stream: Iterator[int], parts: _Parts) -> int:
        from rxt_model.interaction.text import MEMORY_UPDATE_START

        ids = self.model.token_ids
        opens = {ids.think_token_id: "thinking", ids.answer_token_id: "answer", ids.tool_call_token_id: "tool_call"}
        count = 0
        for token in stream:
            if token == MEMORY_UPDATE_START:
                break
            count += 1
            if token in opens and self.model.thinks:
                self._open(parts, opens[token])
            else:
                self._show(parts, self.model.stringify_token(token))
            if self._interrupts.requested:
                break
        return count

    def _open(self, parts: _Parts, name: str) -> None:
        shown = any(parts.texts.values())
        parts.current = name
        if self._output is not None:
            heading = {"thinking": "[thinking] ", "tool_call": "[tool call] ", "answer": ""}[name]
            self._write(("\n" if shown else "") + heading)

    def _show(self, parts: _Parts, piece: str) -> None:
        if piece:
            parts.texts[parts.current].append(piece)
            self._write(piece)

    def _write(self, text: str) -> None:
        if self._output is not None:
            # A model can say any byte; none of them shall move the cursor or rename the window.
            self._output.write(text.translate(_CONTROL_CHARACTERS) if self._output.isatty() else text)
            self._output.flush()

    def _finish(self, stream: Iterator[int], result: Answer, exchange: Exchange) -> None:
        """Update the memory and save, here or in the background."""
        from rxt_model.background import BackgroundTask

        result.exchange = exchange
        started = time.perf_counter()
        _close(stream)  # the memory update happens or begins here

        def complete() -> None:
            self.model.finish_memory_update()
            result.update_seconds = time.perf_counter() - started
            self.transcript.exchanges.append(exchange)
            self.unsaved = True
            if self.save_path is not None:
                try:
                    self._write_to(self.save_path)
                    result.saved_to = self.save_path
                except OSError as error:
                    result.save_error = error
            if self._on_update is not None:
                self._on_update(result)

        if self._on_update is None:
            complete()
        else:
            self._completion = BackgroundTask(complete, self.model.device, name="memory update")


def _close(stream: Iterator[int]) -> None:
    stream.close()  # type: ignore[attr-defined]  # a generator, by its declared type an iterator
