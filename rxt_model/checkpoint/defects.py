"""Known defects of the upstream library that affect a checkpoint, and what this package does about each (spec 7).

What is told here follows from the files alone: their tensors, their configuration, and the model that was read from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rxt_model.checkpoint.loading import find_weights
from rxt_model.checkpoint.protocol import LoadableModule
from rxt_model.checkpoint.reader import CONFIG_NAME, SafetensorsFile, TensorEntry, read_json_object

__all__ = ["Defect", "Facts", "defects_of"]

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint.

    Attributes:
        component: `PretrainedModel.component`.
        parts: configuration of every component, as it was read, by its name ("" for a single one).
        stated: `config.json` as it is.
        entries: the tensors of the file.
        tokenizer: whether there is a `tokenizer.json`.
    """

    component: str
    parts: Mapping[str, Any]
    stated: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    tokenizer: bool

    @property
    def is_full(self) -> bool:
        """Whether it is a complete model."""
        return self.component in ("rxt_alpha", "rxt_beta")

    def any(self, name: str, *values: Any) -> bool:
        """Whether a component has one of these values for a field, or any that counts as true where none are given."""
        found = [getattr(config, name, None) for config in self.parts.values()]
        return any(value in values for value in found) if values else any(found)

    @property
    def is_half(self) -> bool:
        """Whether weights are in half precision."""
        return any(entry.dtype in _HALF for entry in self.entries.values())

    def has(self, ending: str) -> bool:
        """Whether a tensor's name ends like this."""
        return any(name.endswith(ending) for name in self.entries)

    def states(self, name: str) -> bool:
        """Whether `config.json` has this key, in the part of any component."""
        parts = [value for value in self.stated.values() if isinstance(value, dict)]
        return any(name in part for part in (self.stated, *parts))


@dataclass(frozen=True)
class Defect:
    """One defect.

    Attributes:
        name: a word for it.
        number: in the table of specification section 7, or None.
        affects: whether a checkpoint is affected.
        upstream: what upstream does.
        state: "repaired": computed right here; "choice": weights may depend on it, so an argument decides; "kept": weights
            depend on it, so it is computed as upstream does.
        here: what this package does; ``{rope_layout}`` stands for that of the checkpoint.
    """

    name: str
    number: int | None
    affects: Callable[[Facts], bool]
    upstream: str
    state: Literal["repaired", "choice", "kept"]
    here: str


def _is_split(facts: Facts) -> bool:
    return facts.any("rope_layout", "split")


def _rotates_one_side(facts: Facts) -> bool:
    return facts.is_full or facts.component in ("memory_attention", "decoder")


def _loses_embedding(facts: Facts) -> bool:
    return facts.is_full and "encoder.model.embedding.weight" not in facts.entries


def _loses_experts(facts: Facts) -> bool:
    return facts.has(".ff.experts.0.fc2.weight") and not facts.states("use_vectorized_moe")


def _token_id(facts: Facts, role: str) -> int | None:
    found: int | None = (facts.stated.get("tokenizer_config") or {}).get(f"{role}_token_id")
    return found


def _lacks_token_ids(facts: Facts) -> bool:
    wanted = ("pad", "think", "tool_call", "tool_use", "internal") if facts.component == "rxt_beta" else ("pad",)
    return facts.is_full and any(_token_id(facts, role) is None for role in wanted)


def _is_interlayer(facts: Facts) -> bool:
    return facts.stated.get("memory_attention_variant") == "interlayer"


def _has_wide_memory(facts: Facts) -> bool:
    return any(name.endswith("stm.memory") and entry.shape[1] > 1 for name, entry in facts.entries.items())


def _is_flash(facts: Facts) -> bool:
    return facts.any("use_flash_attention")


DEFECTS: tuple[Defect, ...] = (
    Defect(
        "interlayer variant", 1, _is_interlayer,
        "releases from 0.3 on build the gated self-interlayer variant where 'interlayer' is asked for",
        "repaired", "the variant that the tensors are of is built",
    ),
    Defect(
        "generation crashes", 2,
        lambda facts: facts.is_full and not facts.any("stateless_layers_config"),
        "since 0.2.38 every answer of a model without stateless layers ends in a TypeError",
        "repaired", "answers are decoded with or without stateless layers",
    ),
    Defect(
        "caches are kept", 2, lambda facts: facts.is_full and facts.any("final_stateless_layers_config"),
        "caches of the final stateless layers are not cleared between interactions",
        "repaired", "every message has its own cache",
    ),
    Defect(
        "batches crash", 3, lambda facts: facts.is_full,
        "batch_interact and batch_interactions read attributes that do not exist",
        "repaired", "both work",
    ),
    Defect(
        "automatic thinking", 4, lambda facts: facts.component == "rxt_beta" and _token_id(facts, "think") is not None,
        "automatic thinking is applied at every step, so that an answer is [A] and [T] only",
        "repaired", "it chooses the first token",
    ),
    Defect(
        "interrupted answers", 5, lambda facts: facts.is_full,
        "no_grad leaks to the caller of interact, and a caller that stops reading loses the interaction",
        "repaired", "gradients are the caller's own, and memory is written once, whoever stops when",
    ),
    Defect(
        "missing mask", 6, lambda facts: facts.is_full,
        "interact without an attention mask crashes, and inputs are changed in place (7)",
        "repaired", "the mask may be left out, and inputs are copied",
    ),
    Defect(
        "long answers", 10, lambda facts: facts.is_full or facts.component in ("decoder", "stateless"),
        "decoding beyond seq_len indexes out of range",
        "repaired", "caches grow",
    ),
    Defect(
        "rotary layout", 12, _rotates_one_side,
        "release 0.3.40 writes rotated pairs to other places, and files do not say which release they are for",
        "choice", "this file is read as {rope_layout}; rope_layout= of from_pretrained decides otherwise",
    ),
    Defect(
        "position of answers", 12, lambda facts: _is_split(facts) and (facts.is_full or facts.component == "decoder"),
        "cached answers to single messages skip the position behind the message, before 0.3.92",
        "repaired", "tokens stand where they were trained to stand",
    ),
    Defect(
        "coarse angles", 13, lambda facts: facts.is_half and not facts.any("use_nope"),
        "rotary angles are rounded to half precision: by 2 radians at position 256, by 4 at 512",
        "choice", "exact by default; rope_angle_dtype='match', or parity='upstream', for weights trained so",
    ),
    Defect(
        "lost embedding", 15, _loses_embedding,
        "the file has one embedding for both components; upstream loads a random one for the encoder, and sharing "
        "overwrites the good one with it",
        "repaired", "either name is restored from the other",
    ),
    Defect(
        "lost experts", 16, _loses_experts,
        "current releases expect experts in one tensor, drop those of this file without a word, and leave random ones",
        "repaired", "the layout is read from the tensors",
    ),
    Defect(
        "missing token ids", 16, _lacks_token_ids,
        "current releases raise a KeyError for control tokens that this configuration does not name",
        "repaired", "they are looked up in the tokenizer, or their use is refused in a sentence",
    ),
    Defect(
        "wiped memory", 18, lambda facts: facts.is_full,
        "share_components and set_batch_mode draw a new random memory",
        "repaired", "models of this package keep theirs",
    ),
    Defect(
        "memory of a batch", None, _has_wide_memory,
        "the file stores the memory of several conversations, which upstream cannot load into a new model",
        "repaired", "stored memories are not weights and are not read",
    ),
    Defect(
        "norms of memory", 28, lambda facts: facts.any("norm_type", "rms", "adaptive", "positional"),
        "memory norms divide by the square root of what their name says, and one differs between training and use",
        "kept", "weights were trained with it",
    ),
    Defect(
        "samplers", 29, lambda facts: facts.is_full,
        "single and batched answers treat top_p differently, and batches draw filtered tokens",
        "repaired", "one sampler",
    ),
    Defect(
        "text of tokens", 38, lambda facts: facts.tokenizer,
        "decoded text has dashes replaced by other characters",
        "repaired", "bytes are decoded as they are",
    ),
    Defect(
        "heads for tokens", 39, lambda facts: _is_flash(facts) and _is_split(facts),
        "before 0.3.32 flash attention ran across heads instead of tokens",
        "repaired", "attention runs across tokens; if the model was trained across heads, its weights need that, and no "
        "release since computes it",
    ),
    Defect(
        "diluted padding", None, _is_flash,
        "with flash attention, padded keys count as rows of zeros in the softmax",
        "choice", "a true mask by default; padding='dilute', or parity='upstream', for weights trained so",
    ),
    Defect(
        "load-balance loss", 40, lambda facts: facts.any("final_stateless_layers_config"),
        "the router's loss leaves out the final stateless layers",
        "repaired", "mean over all layers (as upstream with parity='upstream')",
    ),
    Defect(
        "cached generation", None, lambda facts: facts.component == "stateless",
        "generate of 0.3.92 answers differently with its cache than without",
        "repaired", "both give the same",
    ),
)  # fmt: skip
"""Every defect that files can show. Those of training alone are not among them, but for the loss."""


def defects_of(model: LoadableModule, directory: Path) -> Iterator[Defect]:
    """The defects that affect a checkpoint, in the order of the specification.

    Args:
        model: what was loaded from it; on the meta device is enough.
        directory: where its files are.
    """
    with SafetensorsFile(find_weights(directory)) as weights:
        entries = dict(weights.entries)
    full = model.component in ("rxt_alpha", "rxt_beta")
    names = ("decoder", "encoder", "memory_attention") if full else ("",)
    parts = {name: getattr(getattr(model, name) if name else model, "config", None) for name in names}
    facts = Facts(
        model.component,
        parts,
        read_json_object(directory / CONFIG_NAME),
        entries,
        (directory / "tokenizer.json").is_file(),
    )
    layout = next((found for part in parts.values() if (found := getattr(part, "rope_layout", None)) is not None), "")
    for defect in DEFECTS:
        if defect.affects(facts):
            yield dataclasses.replace(defect, here=defect.here.format(rope_layout=layout))
