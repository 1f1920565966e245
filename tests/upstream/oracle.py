"""Stand-alone script that runs the upstream library `rxlm` as a black box; it never imports our package.

    PYTHONPATH=DIR_OF_RXLM python oracle.py REQUESTS.json OUTPUT_DIR

Each request has a `name` (its folder under OUTPUT_DIR) and a `task`:

* `produce` builds a case (see `cases.py` for the fields) with random weights, saves it into `NAME/model/` with upstream's
  own `save_pretrained`, and writes the inputs (`in.*`) and what upstream answered (`out.*`) into
  `NAME/tensors.safetensors`.
* `load` goes the other way: it opens a directory written by us with upstream's `from_pretrained` and answers to the inputs
  of a tensor file as `produce` writes it.
* `templates` asks a model with a tokenizer for the token ids of prompts and interactions, and writes
  `NAME/answers.json`.

A request that fails leaves `NAME/error.txt` and does not stop the others.

Everything known here about upstream was found by running it. The quirks that a caller has to work around:

* The full model has `decoder`, `encoder` and `memory_attention`; until `share_components()` is called each owns its
  embedding and its memory. Sharing keeps the *encoder's* embedding and draws a new random memory, so the memory has to
  be loaded afterwards. The encoder's memory, where it has one, is never shared: an encoder with cross-attention (which
  0.2.31 computes) goes on reading its own constant one.
* The encoder returns (last state, states after each layer stacked); memory attention takes the second. It commits the
  result to the memory itself and returns it.
* Memory attention needs the memory's batch to equal the input's, so a batch wants `set_batch_mode(True, B)`
  (`stm.batched_memory(B)` on a bare component) first; both draw new random memory.
* `interact` of 0.3.92 walks the list of stateless layers although a model without any has none there (TypeError):
  an empty list has to be put in its place by hand. `interact` of 0.2.31 gives the wrong position to cached steps, so
  it is only a reference with `use_self_attn_cache=False`.
* `interact` asks for an attention mask, and greedy decoding is `top_k=1` since temperature 0 is an error.
* `batch_interact` and `batch_interactions` read the attributes `device` and `end_token_id`, which no version sets. With
  both set by hand they work, in 0.2.31 also with the cache, on ids padded to `max_seq_len`.
* The caches of final stateless layers are never cleared, so every conversation here runs on a fresh copy of the model.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import pathlib
import sys
import traceback
import warnings
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)

Tensors = dict[str, torch.Tensor]
MODULE_OF = {"MLMHead": "rxlm.training.models", "DecoderOnlyTransformer": "rxlm.llm.models"}
INTERACTION_LENGTH = 24  # below every seq_len of the case table


def upstream_class(name: str) -> Any:
    """The upstream class called `name`."""
    return getattr(importlib.import_module(MODULE_OF.get(name, "rxlm.rxt.models")), name)


def build(case: dict[str, Any]) -> torch.nn.Module:
    """The model of a case with every parameter random; nothing is left at a value that would hide an omission."""
    torch.manual_seed(case["seed"])
    model = upstream_class(case["class"])(**case["arguments"])
    randomise(model, case["seed"])
    return model.eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter (and the running statistics of memory norms) a value away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if "embedding" in name:
                value = normal(parameter)
            elif "norm" in name and last in ("weight", "scale"):
                value = 1.0 + 0.3 * normal(parameter)
            elif last == "gate":  # static and element-wise residual gates, gates of memory norms
                value = normal(parameter)
            elif last in ("w1", "w2", "shared_w1", "shared_w2"):  # stacked experts are applied as x @ w
                value = normal(parameter) / math.sqrt(parameter.shape[-2])
            elif parameter.ndim >= 2 and last == "weight":
                gain = 3.0 if "router" in name or "slot_status" in name else 1.0
                value = gain * normal(parameter) / math.sqrt(parameter.shape[-1])
            else:
                value = 0.3 * normal(parameter)
            parameter.copy_(value)
        for name, buffer in model.named_buffers():
            if name.endswith("ema_rms"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def make_inputs(case: dict[str, Any]) -> Tensors:
    """Random ids, right-padding masks and memory states for a case; pads carry random ids, so a leak would show."""
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    sizes = case["sizes"]
    layers, slots, dim, vocabulary = (sizes.get(key, 0) for key in ("layers", "slots", "dim", "vocabulary"))
    batch, time, updates = 3, 11, 3
    lengths = torch.tensor([time, 7, 2])
    mask = torch.arange(time) < lengths[:, None]
    inputs: Tensors = {"mask_batch": mask}
    kind = case["kind"]
    if kind in ("full", "decoder", "encoder", "llm"):
        inputs["ids"] = torch.randint(7, vocabulary, (1, time), generator=generator)
        inputs["ids_batch"] = torch.randint(7, vocabulary, (batch, time), generator=generator)
    if kind in ("full", "decoder", "memory_attention", "encoder"):
        inputs["memory"] = torch.randn(layers, 1, slots, dim, generator=generator)
        inputs["memory_batch"] = torch.randn(layers, batch, slots, dim, generator=generator)
    if kind == "full":
        inputs["encoder_memory"] = torch.randn(layers, 1, slots, dim, generator=generator)
        inputs["update_ids"] = torch.randint(7, vocabulary, (updates, 1, time), generator=generator)
        inputs["update_ids_batch"] = torch.randint(7, vocabulary, (updates, batch, time), generator=generator)
    if kind == "memory_attention":
        inputs["encoded"] = torch.randn(updates, layers, 1, time, dim, generator=generator)
        inputs["encoded_batch"] = torch.randn(updates, layers, batch, time, dim, generator=generator)
    if kind == "mlm_head":
        inputs["hidden"] = torch.randn(batch, time, dim, generator=generator)
    return inputs


def greedy(forward: Any, ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue `ids` by uncached argmax; also the smallest gap between the two best logits, to tell ties."""
    gaps = []
    for _ in range(steps):
        best = forward(ids, torch.ones_like(ids, dtype=torch.bool))[:, -1].topk(2, dim=-1)
        gaps.append((best.values[:, 0] - best.values[:, 1]).min())
        ids = torch.cat([ids, best.indices[:, :1]], dim=-1)
    return ids, torch.stack(gaps).min().reshape(1)


def set_memory(stm: Any, memory: torch.Tensor) -> None:
    """Load an explicit memory into a bare component's store."""
    stm.batched_memory(memory.shape[1]) if memory.shape[1] > 1 else stm.single_memory()
    stm.update_all(memory.clone())


def evaluate_full(model: Any, inputs: Tensors) -> Tensors:
    outputs: Tensors = {}
    model.share_components()
    for suffix in ("", "_batch"):
        memory, ids, updates = inputs["memory" + suffix], inputs["ids" + suffix], inputs["update_ids" + suffix]
        mask = inputs["mask_batch"] if suffix else torch.ones_like(ids, dtype=torch.bool)
        model.set_batch_mode(True, memory.shape[1]) if suffix else model.set_batch_mode(False)
        model.load_stm_state(memory.clone())
        if getattr(model.encoder.model, "stm", None) is not None:
            set_memory(model.encoder.model.stm, inputs["encoder_memory"].expand_as(memory))
        outputs["logits" + suffix] = model.decoder(ids, attention_mask=mask)
        outputs["encoded" + suffix] = model.encoder(ids, attention_mask=mask)[1]
        if not suffix:
            outputs["greedy"], outputs["greedy_gap"] = greedy(lambda x, m: model.decoder(x, attention_mask=m), ids, 12)
        for count, update in enumerate(updates, start=1):
            encoded = model.encoder(update, attention_mask=mask)[1]
            model.memory_attention(encoded, attention_mask=mask)
            outputs[f"memory_after_{count}{suffix}"] = model.export_stm_state().clone()
        if not suffix:
            outputs["greedy_after_updates"], outputs["greedy_after_updates_gap"] = greedy(
                lambda x, m: model.decoder(x, attention_mask=m), ids, 12
            )
    return outputs


def evaluate_interaction(model: Any, inputs: Tensors, end_token: int) -> Tensors:
    """The streaming calls themselves, greedily: their ids with the two sentinels, and the memory they leave behind."""
    inner = model.decoder.model
    if getattr(inner, "stateless_layers", ()) is None:
        inner.stateless_layers = torch.nn.ModuleList()
    cached = hasattr(inner, "stateless_layers")  # 0.2.31 has no such attribute: its cached positions are wrong
    model.device, model.end_token_id = torch.device("cpu"), end_token
    arguments: dict[str, Any] = {"top_k": 1, "max_seq_len": INTERACTION_LENGTH}
    outputs: Tensors = {}

    model.set_batch_mode(False)
    alone = copy.deepcopy(model)
    alone.load_stm_state(inputs["memory"].clone())
    ids = inputs["ids"].clone()
    thinking = {"thinking_mode": "fast"} if cached and type(model).__name__ == "RxTBeta" else {}
    stream = alone.interact(
        ids, attention_mask=torch.ones_like(ids), use_self_attn_cache=cached, **arguments, **thinking
    )
    outputs["interaction"] = torch.tensor(list(stream))
    outputs["interaction_memory"] = alone.export_stm_state().clone()

    if thinking:
        alone = copy.deepcopy(model)
        alone.load_stm_state(inputs["memory"].clone())
        ids = inputs["ids"].clone()
        stream = alone.interact(ids, attention_mask=torch.ones_like(ids), thinking_mode="extended", **arguments)
        outputs["interaction_extended"] = torch.tensor(list(stream))

    ids, mask = inputs["ids_batch"], inputs["mask_batch"]
    padding = INTERACTION_LENGTH - ids.shape[1]
    ids = torch.nn.functional.pad(ids * mask, (0, padding))
    mask = torch.nn.functional.pad(mask, (0, padding))
    model.set_batch_mode(True, ids.shape[0])
    model.load_stm_state(inputs["memory_batch"].clone())
    batch = copy.deepcopy(model)
    steps = batch.batch_interact(ids.clone(), attention_mask=mask.clone(), **arguments)
    outputs["batch_interaction"] = torch.stack(list(steps))
    outputs["batch_interaction_memory"] = batch.export_stm_state().clone()
    for name, with_queries in (("whole", True), ("answers", False)):
        batch = copy.deepcopy(model)
        ids_out, mask_out = batch.batch_interactions(
            ids.clone(), attention_mask=mask.clone(), return_interactions_with_queries=with_queries, **arguments
        )
        outputs[f"batch_{name}"], outputs[f"batch_{name}_mask"] = ids_out.clone(), mask_out.clone()
    return outputs


def evaluate_decoder(model: Any, inputs: Tensors) -> Tensors:
    outputs: Tensors = {}
    for suffix in ("", "_batch"):
        ids = inputs["ids" + suffix]
        mask = inputs["mask_batch"] if suffix else torch.ones_like(ids, dtype=torch.bool)
        set_memory(model.model.stm, inputs["memory" + suffix])
        outputs["logits" + suffix] = model(ids, attention_mask=mask)
        model.train()  # the load-balance loss is zero otherwise; there is no dropout in any case
        model(
            ids, attention_mask=torch.ones_like(ids, dtype=torch.bool)
        )  # pads would count, and their rows mean nothing
        loss = model.model.moe_router_loss()
        if loss is not None:
            outputs["load_balance_loss" + suffix] = loss.reshape(1)
        model.eval()
    return outputs


def evaluate_encoder(model: Any, inputs: Tensors) -> Tensors:
    outputs: Tensors = {}
    for suffix in ("", "_batch"):
        ids = inputs["ids" + suffix]
        mask = inputs["mask_batch"] if suffix else torch.ones_like(ids, dtype=torch.bool)
        if getattr(model.model, "stm", None) is not None:
            set_memory(model.model.stm, inputs["memory" + suffix])
        outputs["encoded" + suffix] = model(ids, attention_mask=mask)[1]
    return outputs


def run_updates(model: Any, inputs: Tensors, suffix: str) -> Tensors:
    """The memory after each of several updates from an explicit state."""
    updates = inputs["encoded" + suffix]
    mask = inputs["mask_batch"] if suffix else torch.ones(1, updates.shape[-2], dtype=torch.bool)
    set_memory(model.model.stm, inputs["memory" + suffix])
    return {
        f"memory_after_{count}{suffix}": model(encoded, attention_mask=mask).clone()
        for count, encoded in enumerate(updates, start=1)
    }


def evaluate_memory_attention(model: Any, inputs: Tensors) -> Tensors:
    outputs = {**run_updates(model, inputs, ""), **run_updates(model, inputs, "_batch")}
    if any(name.endswith("ema_rms") for name, _ in model.named_buffers()):
        outputs.update(evaluate_training(model, inputs))
    return outputs


def evaluate_training(model: Any, inputs: Tensors) -> Tensors:
    """Memory updates in training mode, where the running statistics of two memory norms move; and those statistics."""
    outputs: Tensors = {}
    for suffix in ("", "_batch"):
        trained = copy.deepcopy(model).train()
        outputs.update({f"training_{k}": v for k, v in run_updates(trained, inputs, suffix).items()})
        statistics = {k: v for k, v in trained.named_buffers() if k.endswith("ema_rms")}
        outputs.update({f"statistics{suffix}.{k}": v for k, v in statistics.items()})
    return outputs


def evaluate_mlm_head(model: Any, inputs: Tensors) -> Tensors:
    return {"logits": model(inputs["hidden"])}


def evaluate_llm(model: Any, inputs: Tensors) -> Tensors:
    outputs: Tensors = {}
    for suffix in ("", "_batch"):
        ids = inputs["ids" + suffix]
        mask = inputs["mask_batch"] if suffix else torch.ones_like(ids, dtype=torch.bool)
        outputs["logits" + suffix] = model(ids, attention_mask=mask)
    outputs["greedy"], outputs["greedy_gap"] = greedy(lambda x, m: model(x, attention_mask=m), inputs["ids"], 12)
    return outputs


EVALUATE = {
    "full": evaluate_full,
    "decoder": evaluate_decoder,
    "encoder": evaluate_encoder,
    "memory_attention": evaluate_memory_attention,
    "mlm_head": evaluate_mlm_head,
    "llm": evaluate_llm,
}


def save_upstream(model: Any, case: dict[str, Any], directory: pathlib.Path) -> None:
    """Save as a user of upstream would have: before or after the embeddings were shared."""
    if case["kind"] == "full":
        embeddings = [part.model.embedding.weight for part in (model.decoder, model.encoder)]
        saving = case["saving"]
        if saving == "shared":
            model.share_components()
        elif saving == "separate-equal":  # both names in the file, with the same values
            embeddings[1].copy_(embeddings[0])
        elif (
            saving != "separate"
        ):  # "separate": both names, different values; sharing after loading keeps the encoder's
            raise ValueError(f"unknown way of saving {saving!r}")
    model.save_pretrained(str(directory))


def produce(case: dict[str, Any], directory: pathlib.Path) -> None:
    inputs = make_inputs(case)
    model = build(case)
    save_upstream(model, case, directory / "model")
    outputs = EVALUATE[case["kind"]](model, inputs)
    if case.get("interaction"):
        end_token = case["arguments"]["tokenizer_config"]["eos_token_id"]
        outputs.update(evaluate_interaction(model, inputs, end_token))
    write(directory, inputs, outputs)


def load(request: dict[str, Any], directory: pathlib.Path) -> None:
    """Open a directory that was not saved by upstream, and answer to given inputs."""
    stored = load_file(request["inputs"])
    inputs = {name[len("in.") :]: value for name, value in stored.items() if name.startswith("in.")}
    torch.manual_seed(0)
    model = upstream_class(request["class"]).from_pretrained(request["path"]).eval()
    write(directory, inputs, EVALUATE[request["kind"]](model, inputs))


def templates(request: dict[str, Any], directory: pathlib.Path) -> None:
    """Token ids of prompts and interactions, with a `tokenizer.json` that the request carries."""
    from transformers import PreTrainedTokenizerFast

    tokenizer_file = directory / "tokenizer.json"
    tokenizer_file.write_text(request["tokenizer"], encoding="utf-8")
    control = request["control_tokens"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        **{f"{role}_token": control[role] for role in ("pad", "unk", "bos", "eos", "mask")},
        additional_special_tokens=[
            control[role] for role in control if role not in ("pad", "unk", "bos", "eos", "mask")
        ],
    )
    model = upstream_class(request["class"])(**request["arguments"])
    model.set_tokenizer(tokenizer)
    answers = []
    for call in request["calls"]:
        result = getattr(model, call["method"])(*call["positional"], **call["named"])
        answers.append({name: result[name].long().tolist() for name in ("input_ids", "attention_mask")})
    (directory / "answers.json").write_text(json.dumps(answers))


def write(directory: pathlib.Path, inputs: Tensors, outputs: Tensors) -> None:
    tensors = {f"in.{name}": value for name, value in inputs.items()}
    tensors.update({f"out.{name}": value for name, value in outputs.items()})
    save_file(
        {name: value.detach().contiguous().clone() for name, value in tensors.items()},
        directory / "tensors.safetensors",
    )


TASKS = {"produce": produce, "load": load, "templates": templates}


def main() -> None:
    requests, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    for request in json.loads(requests.read_text()):
        directory = output / request["name"]
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with torch.no_grad():
                TASKS[request["task"]](request, directory)
        except Exception:
            (directory / "error.txt").write_text(traceback.format_exc(limit=0))


if __name__ == "__main__":
    main()
