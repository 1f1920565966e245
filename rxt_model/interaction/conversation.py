"""One message in, one streamed answer out, then one memory update: the conversation interface (spec 1 and 2.16)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rxt_model.checks import check_token_ids
from rxt_model.gradients import no_gradients
from rxt_model.interaction.decoding import CachedDecoding, Decoding, Step, UncachedDecoding, padded, stream_tokens
from rxt_model.interaction.encoding import encode, explain_encoding
from rxt_model.interaction.engine import MODULES, choose_engine, engine_decoding, explain_choice, prepare_memory
from rxt_model.interaction.sampling import Sampler, SamplingOptions, most_likely
from rxt_model.interaction.state import (
    ConversationState,
    StateError,
    load_state,
    model_fingerprint,
    save_state,
)
from rxt_model.interaction.templates import fits, required
from rxt_model.interaction.text import MEMORY_UPDATE_END, MEMORY_UPDATE_START, TextInterface

if TYPE_CHECKING:
    from rxt_model.decoder import RxTDecoder
    from rxt_model.encoder import RxTEncoder
    from rxt_model.memory import ShortTermMemory
    from rxt_model.memory_attention import RxTMemoryAttention

THINKING_MODES = ("auto", "fast", "extended")


def _tokens_of_one(steps: Generator[Step, None, None]) -> Generator[int, None, None]:
    with closing(steps):
        for step in steps:
            yield int(step.tokens[0])


def _tokens_of_all(steps: Generator[Step, None, None]) -> Generator[Tensor, None, None]:
    with closing(steps):
        for step in steps:
            yield step.tokens


def _refuse_meta(*tensors: Tensor | None) -> None:
    for name, tensor in zip(("input_ids", "attention_mask"), tensors, strict=True):
        if tensor is not None and tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; give a tensor that has.")


class _OpenInteraction:
    """An answer that is being streamed; its memory update happens, or begins, once, whoever asks for it."""

    def __init__(self, rows: list[list[int]], write: Callable[[list[list[int]]], None]) -> None:
        self.rows = rows
        self.is_open = True
        self._write = write

    def append(self, step: Step) -> None:
        for row, token, active in zip(self.rows, step.tokens.tolist(), step.active.tolist(), strict=True):
            if active:
                row.append(token)

    def commit(self) -> None:
        """Write the interaction into memory, unless that has happened or it was abandoned."""
        if self.is_open:
            self.is_open = False
            if not sys.is_finalizing():  # at the exit nobody can read the memory any more, and torch is taken apart
                self._write(self.rows)

    def abandon(self) -> None:
        """Leave memory as it was."""
        self.is_open = False


class Conversation(TextInterface):
    """Methods of a full model that talk and remember.

    The memory update happens exactly once per interaction: after the end token, when the caller stops reading or closes
    the stream, or at the latest when the next interaction begins or the state is read. An exception during decoding
    leaves the memory as it was.

    With ``async_memory=True`` the update runs in a thread of its own, so that a stream ends with its answer. The next
    interaction, and whatever else reads, replaces, moves or saves memory or weights through this model, waits for it by
    itself; if the update failed, the first of them raises :class:`rxt_model.MemoryUpdateError` instead, once. An
    interpreter that exits finishes the update first. Before you change weights in another way than by ``to``, ``train`` or
    ``load_state_dict``, call :meth:`finish_memory_update`. It is meant for callers that pause between messages: an update
    in the background takes longer (see ``benchmarks/NOTES.md``), so that a message sent at once may wait longer than without.
    """

    decoder: RxTDecoder
    encoder: RxTEncoder
    memory_attention: RxTMemoryAttention

    decode_engine: str = "auto"
    """How answers are decoded: "auto", "modules", or the name of an engine of :mod:`rxt_kernels.decode`. With "modules",
    interactions are encoded by the modules too.

    An answer without a cache (``use_self_attn_cache=False``) is always computed by the modules: that is what it is for.
    """

    decode_weights: str | None = None
    """What the native engine packs weights in: "float32", "bfloat16", "int8", or None for the dtype of the model."""

    @property
    def stm(self) -> ShortTermMemory:
        """The short-term memory; full models share one between their components."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        raise NotImplementedError

    @property
    def turns(self) -> int:
        """Interactions written into memory since it was reset or initialised."""
        self.finish_memory_update()
        return self._turns

    @turns.setter
    def turns(self, turns: int) -> None:
        self.finish_memory_update()
        self._turns = turns

    def _start_conversation(self) -> None:
        self._turns = 0
        self._open: _OpenInteraction | None = None
        self._text_stream = None
        self._text_rows = None

    def _settle(self) -> None:
        """Finish what an unfinished stream left undone."""
        if self._open is not None:
            self._open.commit()
            self._open = None
        self.finish_memory_update()

    # -- memory -------------------------------------------------------------------------------------------------------

    def finish_memory_update(self) -> None:
        """Wait for a memory update in the background, if there is one.

        Only a graph of ``torch.compile(fullgraph=True)`` that reads the memory cannot wait by itself, and says so.

        Raises:
            MemoryUpdateError: it failed; memory and turns are as they were before it. Raised once, here or by the first
                other call that has to wait.
        """
        self.stm.finish_update()

    @no_gradients()
    def _write_interaction(self, rows: Sequence[Sequence[int]]) -> None:
        input_ids, lengths = padded(rows, self.device)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = None if len(set(map(len, rows))) == 1 else columns < lengths[:, None]
        encoded = self._encode(input_ids, mask)
        stm = self.stm  # asked for once: that of a drop-in follows another library's memory every time
        stm.load(self.memory_attention(encoded, mask, stm.memory))
        self._turns += 1
        if self.decode_engine != MODULES:
            prepare_memory(self.decoder, stm.memory)

    def _encode(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        by_modules = self.decode_engine == MODULES
        states: Tensor = self.encoder(input_ids, mask) if by_modules else encode(self.encoder, input_ids, mask)
        return states

    def _write_in_background(self, rows: Sequence[Sequence[int]]) -> None:
        self.stm.update_in_background(lambda: self._write_interaction(rows))

    @no_gradients()
    def init_stm_state(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, add_noise: float = 0.0, force: bool = False
    ) -> None:
        """Write an interaction into memory before the conversation starts, as a system prompt would be.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool, True at real tokens, wherever they stand. A row without any keeps its memory.
            add_noise: standard deviation of noise on the encoded states.
            force: store the encoded states themselves instead of updating; T must equal the number of slots.

        Raises:
            TypeError, ValueError: ids or mask that do not fit, a batch that does not fit the memory, or ``force`` with a
                length that is not the slot count.
        """
        check_token_ids(input_ids, attention_mask, self.decoder.config.vocab_size)
        _refuse_meta(input_ids, attention_mask)
        if isinstance(add_noise, bool) or not isinstance(add_noise, (int, float)) or not 0 <= add_noise < float("inf"):
            raise ValueError(f"add_noise is {add_noise!r}; a standard deviation is a finite number of at least 0.")
        self._check_rows(input_ids.shape[0])
        if force and input_ids.shape[1] != self.stm.size:
            raise ValueError(
                f"force=True stores one encoded token per memory slot; input_ids has {input_ids.shape[1]} tokens and the "
                f"memory {self.stm.size} slots."
            )
        self._settle()
        mask = None if attention_mask is None else attention_mask.bool().to(self.device)
        input_ids = input_ids.to(self.device)
        if mask is not None and not force and self.memory_attention.config.padding == "mask":
            # Real tokens to the front, where a message alone has them: memory attention knows positions.
            order = (~mask).long().argsort(dim=1, stable=True)
            input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        # What stands at padded positions is stored with `force`, and the native encoder leaves zeros there.
        encoded = self.encoder(input_ids, mask) if force else self._encode(input_ids, mask)
        if add_noise:
            encoded = encoded + add_noise * torch.randn_like(encoded)
        if not force:
            updated = self.memory_attention(encoded, mask, self.stm.memory)
        elif mask is None:
            updated = encoded
        else:
            updated = torch.where(mask.any(dim=1)[None, :, None, None], encoded, self.stm.memory)
        self.stm.load(updated)
        self.turns = 0

    def init_model(
        self,
        system_prompt: str | None = None,
        max_seq_len: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Share components, move to a device, and write a system prompt into memory if one is given."""
        ids: list[int] | None = None
        if system_prompt is not None:
            ids = self.template.system_prompt(system_prompt, self.system_prompt_title)
            fits(ids, self._limit(max_seq_len), room=0, what="the system prompt")
            self._check_rows(1)
        self.share_components()
        if device is not None:
            self.to(device)  # type: ignore[attr-defined]
        if ids is not None:
            self.init_stm_state(torch.tensor([ids], device=self.device))

    def share_components(self) -> None:
        """Connect embeddings and memory; full models implement it."""
        raise NotImplementedError

    def reset_stm(self, init_type: str | None = None, seed: int | None = None) -> None:
        """Forget the conversation; see :meth:`ShortTermMemory.reset`."""
        self.stm.reset(init_type=init_type, seed=seed)
        self._abandon()
        self.turns = 0

    def _abandon(self) -> None:
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def set_batch_mode(self, use_batch: bool, batch_size: int | None = None) -> None:
        """Hold one conversation per row of a batch, starting from what is remembered now, or go back to one.

        Args:
            use_batch: False keeps the first conversation only.
            batch_size: conversations, with ``use_batch=True``.

        Raises:
            ValueError: ``use_batch`` without a batch size or the other way round, or several conversations that would have
                to become another number of conversations.
        """
        if not use_batch:
            if batch_size not in (None, 1):
                raise ValueError(f"batch_size is {batch_size!r} with use_batch=False; leave it out.")
            self._settle()
            self.stm.select(0)
            return
        if batch_size is None:
            raise ValueError(
                "batch_size is None; set_batch_mode(True, batch_size=...) needs the number of conversations."
            )
        self.stm.check_batch_size(batch_size)
        self._settle()
        self.stm.set_batch_size(batch_size)

    def export_stm_state(self) -> Tensor:
        """A detached copy of the memory, (L, B, S, D), after the last interaction is written."""
        self._settle()
        return self.stm.export()

    def load_stm_state(self, memory: Tensor) -> None:
        """Replace the memory; see :meth:`ShortTermMemory.load`. An unfinished interaction is dropped."""
        self.stm.load(memory)
        self._abandon()

    def save_conversation(self, path: str | os.PathLike[str], notes: Mapping[str, str] | None = None) -> Path:
        """Save memory, turn count and this model's fingerprint to one safetensors file, whole or not at all.

        Args:
            path: the file to write.
            notes: strings to keep with it, for instance a transcript.
        """
        self._settle()
        state = ConversationState(self.stm.export(), self.turns, model_fingerprint(self._as_module()), notes or {})
        return save_state(state, path)

    def load_conversation(self, path: str | os.PathLike[str]) -> ConversationState:
        """Continue a conversation that this model saved, here or elsewhere.

        Raises:
            FileNotFoundError: there is no such file.
            StateError: the file is damaged, or another model's.
        """
        state = load_state(path)
        own = model_fingerprint(self._as_module())
        if state.fingerprint != own:
            raise StateError(
                f"{path} was saved by a model with fingerprint {state.fingerprint[:12]}, this one has {own[:12]}; a memory "
                "means nothing to other weights. Load it with the model that saved it."
            )
        try:
            self.load_stm_state(state.memory)
        except ValueError as error:
            raise StateError(f"{path} holds a memory that does not fit: {error}") from None
        self.turns = state.turns
        return state

    def _as_module(self) -> torch.nn.Module:
        assert isinstance(self, torch.nn.Module)
        return self

    # -- answers ------------------------------------------------------------------------------------------------------

    def interact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        max_seq_len: int | None = None,
        use_self_attn_cache: bool = True,
        thinking_mode: str | None = None,
        seed: int | None = None,
        async_memory: bool = False,
    ) -> Generator[int, None, None]:
        """Answer one message token by token, then update the memory.

        Args:
            input_ids: (1, T) int64 from :meth:`tokenize_query`; padding is left out by the mask.
            attention_mask: (1, T) bool, True at real tokens.
            temperature, top_k, top_p, seed: see :class:`SamplingOptions`; temperature 0 is greedy.
            max_seq_len: most tokens of message and answer together.
            use_self_attn_cache: False runs the whole message again for every token, for checks.
            thinking_mode: RxT-Beta only. ``fast`` opens the answer with [A], ``extended`` with [T], ``auto`` (the default
                there) with whichever is more likely. The opening token is yielded.
            async_memory: update the memory in the background; see :class:`Conversation`.

        Returns:
            An iterator over token ids, the end token included; then -1 when the memory update starts, then -2 when it is
            done. With ``async_memory=True`` -2 follows -1 at once: the update has begun, and whoever needs the memory waits.

        Raises:
            TypeError, ValueError: arguments that do not fit, before anything is computed.
            MemoryUpdateError: by the iterator, if the update of an earlier interaction failed in the background.
        """
        prompts = self._prompts(input_ids, attention_mask)
        if len(prompts) != 1 or self.stm.batch_size != 1:
            raise ValueError(
                f"interact takes one message and one conversation; input_ids has {len(prompts)} rows and the memory "
                f"{self.stm.batch_size} conversations. Use batch_interact, or set_batch_mode(False)."
            )
        options = SamplingOptions(temperature, top_k, top_p, seed)
        steps = self._answer(prompts, options, max_seq_len, use_self_attn_cache, thinking_mode, async_memory)
        return _tokens_of_one(steps)

    def batch_interact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        max_seq_len: int | None = None,
        use_self_attn_cache: bool = True,
        thinking_mode: str | None = None,
        seed: int | Sequence[int] | None = None,
        async_memory: bool = False,
    ) -> Generator[Tensor, None, None]:
        """Answer one message per conversation, all at once; each gets the tokens it would get alone.

        Arguments as in :meth:`interact`, with (B, T) ids and mask, B being the batch size of :meth:`set_batch_mode`.

        Returns:
            An iterator over (B,) int64 tensors; rows that have ended repeat their last token. Then all -1, then all -2.

        Raises:
            TypeError, ValueError: arguments that do not fit, before anything is computed.
        """
        prompts = self._prompts(input_ids, attention_mask)
        self._check_rows(len(prompts))
        options = SamplingOptions(temperature, top_k, top_p, seed)
        steps = self._answer(prompts, options, max_seq_len, use_self_attn_cache, thinking_mode, async_memory)
        return _tokens_of_all(steps)

    def batch_interactions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        max_seq_len: int | None = None,
        use_self_attn_cache: bool = True,
        thinking_mode: str | None = None,
        seed: int | Sequence[int] | None = None,
        return_interactions_with_queries: bool = False,
        async_memory: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`batch_interact` without streaming.

        Args:
            return_interactions_with_queries: return whole interactions instead of answers, which start with the token that
                opens them.
            async_memory: return as soon as the answers are complete; the memory is updated in the background.

        Returns:
            ids (B, max_seq_len) int64, padded with 0, and their mask (B, max_seq_len) bool.
        """
        prompts = self._prompts(input_ids, attention_mask)
        self._check_rows(len(prompts))
        options = SamplingOptions(temperature, top_k, top_p, seed)
        steps = self._answer(prompts, options, max_seq_len, use_self_attn_cache, thinking_mode, async_memory)
        rows = prompts
        for step in steps:
            if self._open is not None:
                rows = self._open.rows
            if int(step.tokens[0]) == MEMORY_UPDATE_END:
                break
        if not return_interactions_with_queries:
            rows = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        width = self._limit(max_seq_len)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        return ids.to(self.device), mask.to(self.device)

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
        check_token_ids(input_ids, attention_mask, self.decoder.config.vocab_size)
        _refuse_meta(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [
            [token for token, keep in zip(row, row_mask, strict=True) if keep]
            for row, row_mask in zip(input_ids.tolist(), mask.tolist(), strict=True)
        ]
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"row {index} of attention_mask is all False; every conversation needs a message.")
        return prompts

    def _check_rows(self, rows: int) -> None:
        if rows != self.stm.batch_size:
            raise ValueError(
                f"input_ids has {rows} rows and the memory holds {self.stm.batch_size} conversations; call "
                f"set_batch_mode(True, batch_size={rows}) first."
            )

    def explain(self) -> str:
        """Which path decoding takes, and which the memory update, and why: a sentence each."""
        choice = choose_engine(self.decoder, self.decode_engine, self.decode_weights)
        with no_gradients():
            encoding = explain_encoding(self.encoder, self.decode_engine == MODULES)
        return f"{explain_choice(choice, self.decode_weights)} {encoding}"

    def _decoding(self, use_cache: bool, rows: int, capacity: int) -> Decoding:
        engine = MODULES
        if use_cache:
            engine = choose_engine(self.decoder, self.decode_engine, self.decode_weights).engine
        if engine != MODULES:
            return engine_decoding(self.decoder, engine, rows, self.stm.memory, self.decode_weights)
        with no_gradients():
            memory = self.decoder.project_memory()

        if use_cache:
            cache = self.decoder.new_cache(rows, capacity=capacity)
            return CachedDecoding(
                lambda ids, cache: self.decoder.hidden_states(ids, None, memory, cache).hidden,
                self.decoder.logits,
                cache,
                self.device,
            )
        return UncachedDecoding(
            lambda ids, _: self.decoder.hidden_states(ids, None, memory).hidden, self.decoder.logits, self.device
        )

    def _answer(
        self,
        prompts: list[list[int]],
        options: SamplingOptions,
        max_seq_len: int | None,
        use_cache: bool,
        thinking_mode: str | None,
        async_memory: bool,
    ) -> Generator[Step, None, None]:
        """Check everything, then return the stream of an answer and its memory update."""
        limit = self._limit(max_seq_len)
        for index, prompt in enumerate(prompts):
            fits(prompt, limit, room=2, what="the message" if len(prompts) == 1 else f"message {index}")
        options.check_vocabulary(self.decoder.config.vocab_size)
        if type(use_cache) is not bool:
            raise TypeError(f"use_self_attn_cache is {use_cache!r}; it must be True or False.")
        if type(async_memory) is not bool:
            raise TypeError(f"async_memory is {async_memory!r}; it must be True or False.")
        opening_ids = self._opening_ids(thinking_mode)
        sampler = Sampler(options, rows=len(prompts))
        return self._stream(prompts, sampler, limit, use_cache, opening_ids, async_memory)

    def _opening_ids(self, thinking_mode: str | None) -> tuple[int, ...]:
        """Tokens an answer of RxT-Beta may open with; empty for models without thinking modes."""
        if not self.thinks:
            if thinking_mode is not None:
                raise ValueError(f"thinking_mode is {thinking_mode!r}; {type(self).__name__} has no thinking modes.")
            return ()
        mode = "auto" if thinking_mode is None else thinking_mode
        if mode not in THINKING_MODES:
            known = ", ".join(map(repr, THINKING_MODES))
            raise ValueError(f"thinking_mode is {thinking_mode!r}; accepted are {known}.")
        answer, think = self.token_ids.answer_token_id, self.token_ids.think_token_id
        if mode == "fast" or (think is None and thinking_mode is None):
            return (answer,)
        if mode == "extended":
            return (required(think, "think [T]"),)
        return answer, required(think, "think [T]")

    def _opening(self, opening_ids: tuple[int, ...]) -> int | Callable[[Tensor], Tensor] | None:
        """How an answer begins: with one token, with the likeliest of several, or as the sampler has it."""
        if len(opening_ids) < 2:
            return opening_ids[0] if opening_ids else None
        choices = torch.tensor(opening_ids, device=self.device)
        return lambda logits: most_likely(logits, choices)

    def _stream(
        self,
        prompts: list[list[int]],
        sampler: Sampler,
        limit: int,
        use_cache: bool,
        opening_ids: tuple[int, ...],
        async_memory: bool = False,
    ) -> Generator[Step, None, None]:
        self._settle()
        self._check_rows(len(prompts))  # the memory may have changed since the arguments were checked
        # RxT-Alpha appends [A] itself and does not yield it (spec 2.16).
        rows = [prompt if self.thinks else [*prompt, self.token_ids.answer_token_id] for prompt in prompts]
        write = self._write_in_background if async_memory else self._write_interaction
        interaction = self._open = _OpenInteraction([list(row) for row in rows], write)
        self._text_stream = None
        text_rows = self._text_rows = WeakTensorKeyDictionary()
        opening = self._opening(opening_ids)
        try:
            decoding = self._decoding(use_cache, len(rows), min(limit, max(map(len, rows)) + 64))
            for step in stream_tokens(
                decoding,
                rows,
                sampler=sampler,
                budgets=[limit - len(row) for row in rows],
                eos_id=self.token_ids.eos_token_id,
                opening=opening,
            ):
                if not interaction.is_open:
                    raise RuntimeError(
                        "this answer was ended because another interaction began or the memory was replaced; read an "
                        "answer to its end before asking again."
                    )
                interaction.append(step)
                text_rows[step.tokens] = step.active
                yield step
            everyone = torch.ones(len(rows), dtype=torch.bool, device=self.device)
            if async_memory:
                interaction.commit()
            yield Step(torch.full((len(rows),), MEMORY_UPDATE_START, device=self.device), everyone)
            interaction.commit()
            yield Step(torch.full((len(rows),), MEMORY_UPDATE_END, device=self.device), everyone)
        except GeneratorExit:
            interaction.commit()
            raise
        except BaseException:
            interaction.abandon()
            raise
        finally:
            if self._open is interaction:
                self._open = None
