"""The questions of `oracle.py`, asked of our models; outputs carry the same names."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch

from rxt_model import MLMHead, RxTAlpha, RxTBeta, RxTDecoder, RxTEncoder, RxTMemoryAttention, SparseQueryTransformer
from tests.upstream.cases import Case
from tests.upstream.oracle import greedy, randomise
from tests.upstream.runner import Answer

LAYOUT = {"0.2.31": "split", "0.3.92": "interleaved"}
"""Where each version of upstream writes rotated pairs."""

Tensors = dict[str, torch.Tensor]


def our_class(case: Case) -> Any:
    """Our class for a case: upstream has one memory-attention class per variant, we have one for all."""
    classes = {
        "decoder": RxTDecoder,
        "encoder": RxTEncoder,
        "memory_attention": RxTMemoryAttention,
        "mlm_head": MLMHead,
        "llm": SparseQueryTransformer,
    }
    if case["kind"] == "full":
        return {"RxTAlpha": RxTAlpha, "RxTBeta": RxTBeta}[case["class"]]
    return classes[case["kind"]]


def load(case: Case, directory: pathlib.Path, **options: Any) -> Any:
    """Our model of a case from a directory, ready to be asked."""
    return our_class(case).from_pretrained(str(directory), **options).eval()


_kept: dict[pathlib.Path, Any] = {}


def load_answer(version: str, answer: Answer, *, keep: bool = False) -> Any:
    """Our model of a directory saved by upstream; with `keep`, one that is kept and must not be trained or talked to.

    What no file of that kind shows, the caller has to say: the rotary layout of a decoder alone, and which of the
    interlayer variants a memory attention without gates is.
    """
    case = answer.case
    if keep and answer.model_directory in _kept:
        return _kept[answer.model_directory]
    options: dict[str, Any] = {}
    if case["kind"] in ("decoder", "encoder", "llm"):
        options["rope_layout"] = LAYOUT[version]
    if case["name"] == "variant-gated-self-interlayer-none":
        options["memory_attention_variant"] = "gated-self-interlayer"
    model = load(case, answer.model_directory, **options)
    if keep:
        _kept[answer.model_directory] = model
    return model


def make(version: str, case: Case) -> Any:
    """Our model of a complete case, built from its configuration alone, with random weights."""
    arguments = json.loads(json.dumps(case["arguments"]))
    for part in ("decoder_config", "encoder_config", "memory_attention_config"):
        arguments[part]["rope_layout"] = LAYOUT[version]
        if version == "0.2.31" and part != "memory_attention_config":
            arguments[part].update(use_vectorized_moe=False, num_shared_experts=0)
    model = our_class(case)(**arguments)
    randomise(model, case["seed"])
    return model.eval()


@torch.no_grad()
def evaluate(case: Case, model: Any, inputs: Tensors) -> Tensors:
    """All outputs that `oracle.py` computes for a case of this kind, conversations excepted."""
    functions = {
        "full": _full,
        "decoder": _decoder,
        "encoder": _encoder,
        "memory_attention": _memory_attention,
        "mlm_head": lambda model, inputs: {"logits": model(inputs["hidden"])},
        "llm": _language_model,
    }
    return functions[case["kind"]](model, inputs)


def _mask(inputs: Tensors, suffix: str) -> torch.Tensor | None:
    return inputs["mask_batch"] if suffix else None


def _full(model: Any, inputs: Tensors) -> Tensors:
    outputs: Tensors = {}
    for suffix in ("", "_batch"):
        memory, ids, mask = inputs["memory" + suffix], inputs["ids" + suffix], _mask(inputs, suffix)
        if model.encoder.model.stm is not None:
            model.encoder.model.stm.load(inputs["encoder_memory"].expand_as(memory))
        outputs["logits" + suffix] = model.decoder(ids, mask, memory=memory)
        outputs["encoded" + suffix] = model.encoder(ids, mask)
        if not suffix:
            outputs["greedy"] = _greedy(model.decoder, ids, memory)
        for count, update in enumerate(inputs["update_ids" + suffix], start=1):
            memory = model.memory_attention(model.encoder(update, mask), mask, memory)
            outputs[f"memory_after_{count}{suffix}"] = memory
        if not suffix:
            outputs["greedy_after_updates"] = _greedy(model.decoder, ids, memory)
    return outputs


def _greedy(decoder: Any, ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return greedy(lambda x, mask: decoder(x, mask, memory=memory), ids, 12)[0]


def _decoder(model: Any, inputs: Tensors) -> Tensors:
    outputs: Tensors = {}
    for suffix in ("", "_batch"):
        ids, mask, memory = inputs["ids" + suffix], _mask(inputs, suffix), inputs["memory" + suffix]
        outputs["logits" + suffix] = model(ids, mask, memory=memory)
        loss = model.hidden_states(ids, memory=memory).load_balance_loss
        if loss is not None and not model.config.final_stateless_layers_config:  # upstream leaves those layers out
            outputs["load_balance_loss" + suffix] = loss.reshape(1)
    return outputs


def _encoder(model: Any, inputs: Tensors) -> Tensors:
    outputs: Tensors = {}
    for suffix in ("", "_batch"):
        if model.model.stm is not None:
            model.model.stm.load(inputs["memory" + suffix])
        outputs["encoded" + suffix] = model(inputs["ids" + suffix], _mask(inputs, suffix))
    return outputs


def _updates(model: Any, inputs: Tensors, suffix: str) -> Tensors:
    memory = inputs["memory" + suffix]
    outputs: Tensors = {}
    for count, encoded in enumerate(inputs["encoded" + suffix], start=1):
        memory = model(encoded, _mask(inputs, suffix), memory)
        outputs[f"memory_after_{count}{suffix}"] = memory
    return outputs


def _memory_attention(model: Any, inputs: Tensors) -> Tensors:
    return {**_updates(model, inputs, ""), **_updates(model, inputs, "_batch")}


@torch.no_grad()
def evaluate_training(model: Any, inputs: Tensors, suffix: str) -> Tensors:
    """Memory updates in training mode and the running statistics they leave; changes the model's statistics."""
    model.train()
    outputs = {f"training_{name}": value for name, value in _updates(model, inputs, suffix).items()}
    for name, value in model.state_dict().items():
        if name.endswith("ema_rms"):
            outputs[f"statistics{suffix}.{name}"] = value
    return outputs


def _language_model(model: Any, inputs: Tensors) -> Tensors:
    outputs = {"logits" + s: model(inputs["ids" + s], _mask(inputs, s)) for s in ("", "_batch")}
    outputs["greedy"] = greedy(lambda x, mask: model(x, mask), inputs["ids"], 12)[0]
    return outputs


def errors(actual: Tensors, expected: Tensors, mask: torch.Tensor) -> dict[str, float]:
    """Largest difference relative to the largest expected value, per output; rows that are padding do not count.

    Token sequences count as 0 when they are equal and as infinite when they are not.
    """
    result: dict[str, float] = {}
    for name, value in actual.items():
        wanted = expected[name]
        if value.shape != wanted.shape or value.is_floating_point() != wanted.is_floating_point():
            result[name] = float("inf")
            continue
        if not value.is_floating_point():
            result[name] = 0.0 if torch.equal(value, wanted) else float("inf")
            continue
        if name in ("logits_batch", "encoded_batch"):  # (..., B, T, width)
            value, wanted = value[..., mask, :], wanted[..., mask, :]
        difference = (value - wanted).abs().max() / wanted.abs().max()
        result[name] = float(difference) if torch.isfinite(difference) else float("inf")
    return result
