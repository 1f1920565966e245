"""Stand-alone script that accelerates models of the upstream library and compares them with what they were.

    PYTHONPATH=DIR_OF_RXLM:REPOSITORY python drop_in.py REQUESTS.json ANSWERS.json

Upstream is run as a black box, as in `oracle.py`, this time in one process with our package. Each request has a `name`, a
`check` (a function of this file) and whatever else that function wants; its answer is what the function returned, or
`{"failed": traceback}`. What is expected of the answers stands in `tests/test_rxlm_integration.py`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import json
import pathlib
import sys
import tempfile
import traceback
import warnings
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from rxt_kernels import native_runtime  # noqa: E402
from rxt_kernels.integrations.rxlm import Report, accelerate, restore  # noqa: E402
from tests.upstream.oracle import (  # noqa: E402
    EVALUATE,
    INTERACTION_LENGTH,
    Tensors,
    build,
    evaluate_interaction,
    make_inputs,
    set_memory,
)
from tests.upstream.ours import errors  # noqa: E402

Answer = dict[str, Any]


def quietly(model: nn.Module, **options: Any) -> Report:
    """`accelerate` without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return accelerate(model, **options)


def no_gaps(outputs: Tensors) -> Tensors:
    return {name: value for name, value in outputs.items() if not name.endswith("gap")}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    return float((ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max())


def shared(model: Any) -> Any:
    """The same memory for every run: sharing draws a new one."""
    model.share_components()
    memory = torch.randn(model.export_stm_state().shape, generator=torch.Generator().manual_seed(3))
    model.load_stm_state(memory)
    return model


# parity


def parity(case: Answer, parity: str) -> Answer:
    """Everything that `oracle.py` asks of a case, before and after."""
    inputs = make_inputs(case)
    with torch.no_grad():
        expected = EVALUATE[case["kind"]](build(case), inputs)
    model = build(case)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = quietly(model, parity=parity)
    same_keys = list(model.state_dict()) == keys
    same_parameters = all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad():
        found = EVALUATE[case["kind"]](model, inputs)
    if parity == "exact" and case["arguments"].get("final_stateless_layers_config"):
        for suffix in ("", "_batch"):  # upstream leaves the final layers out (defect 40)
            del found[f"load_balance_loss{suffix}"]
    return {
        "worst": max(errors(no_gaps(found), expected, inputs["mask_batch"]).values()),
        "replaced": [str(entry) for entry in report.replaced],
        "skipped": [str(entry) for entry in report.skipped],
        "differences": [entry.difference for entry in report.replaced],
        "same_keys": same_keys,
        "same_parameters": same_parameters,
    }


def training(case: Answer, parity: str) -> Answer:
    """Losses and weights of a few steps: encode, update the memory, decode with its gradients, with the router's loss."""

    def run(model: Any) -> tuple[list[float], Tensor]:
        shared(model).train()
        # Adam divides a gradient by its own size: of one that is rounding only, it would make a step of full length.
        optimizer = torch.optim.SGD({id(p): p for p in model.parameters()}.values(), lr=0.02, momentum=0.9)
        losses = []
        generator = torch.Generator().manual_seed(5)
        for _ in range(4):
            ids = torch.randint(7, case["sizes"]["vocabulary"], (2, 12), generator=generator)
            mask = torch.arange(12) < torch.tensor([12, 7])[:, None]
            model.set_batch_mode(True, 2)
            model.load_stm_state(torch.randn(model.export_stm_state().shape, generator=generator))
            encoded = model.encoder(ids, attention_mask=mask)[1]
            model.memory_attention(encoded, attention_mask=mask)
            logits = model.decoder(ids, attention_mask=mask)
            targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
            balance = model.decoder.model.moe_router_loss()
            if balance is not None:
                loss = loss + 0.01 * balance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return losses, torch.cat(gradients)

    expected, expected_gradients = run(build(case))
    model = build(case)
    quietly(model, parity=parity)
    found, gradients = run(model)
    same = gradients.shape == expected_gradients.shape
    return {
        "losses": [expected, found],
        "gradients": float((gradients - expected_gradients).norm() / expected_gradients.norm()) if same else None,
    }


def half_precision(case: Answer, autocast: bool) -> Answer:
    """How far both parities are from upstream at positions where angles are coarse in bfloat16."""
    ids = torch.randint(7, case["sizes"]["vocabulary"], (1, case["arguments"]["seq_len"]))
    memory = torch.randn(case["sizes"]["layers"], 1, case["sizes"]["slots"], case["sizes"]["dim"])

    def run(model: Any) -> Tensor:
        set_memory(model.model.stm, memory.to(next(model.parameters()).dtype))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits: Tensor = model(ids, attention_mask=torch.ones_like(ids, dtype=torch.bool)).float()
        return logits

    def made() -> nn.Module:
        return build(case) if autocast else build(case).bfloat16()

    reference = run(made())
    answer: Answer = {}
    for aim in ("exact", "upstream"):
        model = made()
        quietly(model, parity=aim)
        answer[aim] = float((run(model) - reference).norm() / reference.norm())
    return answer


def dilution(case: Answer) -> Answer:
    """A padded batch under flash attention: rows of zeros in the softmax, or a true mask."""
    inputs = make_inputs(case)
    mask = inputs["mask_batch"]

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            states: Tensor = model(inputs["ids_batch"], attention_mask=mask)[1][:, mask]
        return states

    flash = {**case, "arguments": {**case["arguments"], "use_flash_attention": True}}
    answer: Answer = {"flash_differs": difference(run(build(flash)), run(build(case)))}
    for aim, reference in (("upstream", flash), ("exact", case)):
        model = build(flash)
        quietly(model, parity=aim)
        answer[aim] = difference(run(model), run(build(reference)))
    return answer


def padding(case: Answer) -> Answer:
    """Padded batches from both sides: every position under parity with upstream, real tokens of right-padded ones else."""
    inputs = make_inputs(case)
    answer: Answer = {}
    for side, mask in (("right", inputs["mask_batch"]), ("left", inputs["mask_batch"].flip(1))):

        def run(model: Any, mask: Tensor = mask) -> tuple[Tensor, Tensor | None]:
            if getattr(model.model, "stm", None) is not None:
                set_memory(model.model.stm, inputs["memory_batch"])
            model.train()
            logits = model(inputs["ids_batch"], attention_mask=mask)
            return logits if isinstance(logits, Tensor) else logits[1][-1], model.model.moe_router_loss()

        expected, expected_loss = run(build(case))
        for aim in ("exact", "upstream"):
            model = build(case)
            quietly(model, parity=aim)
            found, loss = run(model)
            answer[f"{aim}-{side}"] = difference(found, expected)
            answer[f"{aim}-{side}-real"] = difference(found[mask], expected[mask])
            if aim == "upstream" and expected_loss is not None and loss is not None:
                answer[f"{aim}-{side}-loss"] = difference(loss, expected_loss)
    return answer


# what stays as it was


def restoring(case: Answer) -> Answer:
    model, other = build(case), build(case)
    inputs = make_inputs(case)
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        before = EVALUATE[case["kind"]](build(case), inputs)
        quietly(model)
        untouched = EVALUATE[case["kind"]](other, inputs)
        accelerated_twice = refusal(model)
        restore(model)
        clean = names == {name: set(vars(module)) for name, module in model.named_modules()}
        after = EVALUATE[case["kind"]](model, inputs)
    try:
        restore(model)
        again = None
    except ValueError as error:
        again = str(error)
    return {
        "bitwise": all(torch.equal(after[name], value) for name, value in before.items()),
        "other_instance": all(torch.equal(untouched[name], value) for name, value in before.items()),
        "clean": clean,
        "accelerated_twice": accelerated_twice,
        "restored_twice": again,
    }


def refusal(model: Any, **options: Any) -> str | None:
    """The message with which acceleration is refused."""
    try:
        quietly(model, **options)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def copying(case: Answer) -> Answer:
    """A deep copy is accelerated on its own parameters, and its memory is its own."""
    model = shared(build(case))
    quietly(model)
    inputs = make_inputs(case)
    model.load_stm_state(inputs["memory"])
    ids = inputs["ids"]
    with torch.no_grad():
        before = model.decoder(ids)
        duplicate = copy.deepcopy(model)
        same = torch.equal(duplicate.decoder(ids), before)
        for parameter in duplicate.parameters():
            parameter.mul_(1.1)
        changed = difference(duplicate.decoder(ids), before)
        duplicate.memory_attention(duplicate.encoder(ids)[1])
        expected = copy.deepcopy(duplicate)
        restore(expected)
        return {
            "same": same,
            "changed": changed,
            "original_kept": torch.equal(model.decoder(ids), before),
            "memory_kept": torch.equal(model.export_stm_state(), inputs["memory"]),
            "accelerated": "forward" in vars(duplicate.decoder.model) and "interact" in vars(duplicate),
            "own": vars(duplicate.decoder.model)["forward"].__self__.target is duplicate.decoder.model,
            "computes": difference(duplicate.decoder(ids), expected.decoder(ids)),
        }


def saving(case: Answer) -> Answer:
    """What an accelerated model saves, upstream loads."""
    model = shared(build(case))
    with tempfile.TemporaryDirectory() as directory:
        plain, fast = pathlib.Path(directory, "plain"), pathlib.Path(directory, "fast")
        model.save_pretrained(str(plain))
        quietly(model)
        model.save_pretrained(str(fast))
        # Not the bytes: upstream's own order of shared tensors changes from save to save.
        slow_weights, fast_weights = (load_file(directory / "model.safetensors") for directory in (plain, fast))
        same = plain.joinpath("config.json").read_bytes() == fast.joinpath("config.json").read_bytes()
        same = same and slow_weights.keys() == fast_weights.keys()
        same = same and all(torch.equal(slow_weights[name], fast_weights[name]) for name in slow_weights)
        again = type(model).from_pretrained(str(fast)).eval()
    with torch.no_grad():
        again.decoder.model.embedding.weight.copy_(model.decoder.model.embedding.weight)
        again.decoder.model.stm.memory.copy_(model.decoder.model.stm.memory)
        ids = make_inputs(case)["ids"]
        return {"same_files": same, "reloaded": difference(again.decoder(ids), model.decoder(ids))}


def exchanging(case: Answer) -> Answer:
    """Components that are shared, parameters that are replaced and hooks that are added after the acceleration."""
    fast, slow = build(case), build(case)
    quietly(fast)
    ids = make_inputs(case)["ids"]
    answer: Answer = {}

    def compare(name: str) -> None:
        with torch.no_grad():
            answer[name] = difference(fast.decoder(ids), slow.decoder(ids))

    for model in (fast, slow):
        shared(model)
    compare("shared")
    for model in (fast, slow):
        linear = nn.Linear(32, 97)
        with torch.no_grad():
            linear.weight.fill_(0.01)
            linear.bias.copy_(torch.arange(97.0))
        model.decoder.model.head = linear
    compare("module")
    for model in (fast, slow):
        model.decoder.model.layers[0].norm1.weight = nn.Parameter(torch.full((32,), 0.5))
    compare("parameter")
    for model in (fast, slow):
        model.decoder.model.stm.make_trainable()
    compare("trainable_memory")

    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for model in (fast, slow):
        inner = model.decoder.model.layers[0].attention
        kept, inner.q_proj = inner.q_proj, Doubling(32, inner.q_proj.out_features, bias=False)
        inner.q_proj.weight = kept.weight
    compare("adapter")
    for model in (fast, slow):
        model.encoder.model.layers[0].ff.fc1.activation = nn.ReLU()
    with torch.no_grad():
        answer["activation"] = difference(fast.encoder(ids)[1], slow.encoder(ids)[1])
    for model in (fast, slow):
        model.decoder.model.layers[0].attention.q_proj = kept
        model.encoder.model.layers[0].ff.fc1.activation = nn.SiLU()
    compare("adapter_removed")
    called: list[str] = []
    handle = fast.decoder.model.layers[0].attention.register_forward_hook(lambda *_: called.append("hook"))
    compare("hooked")
    answer["hook_called"] = bool(called)
    handle.remove()
    called.clear()
    compare("unhooked")
    answer["hook_called_again"] = bool(called)
    fast.double()
    slow.double()
    compare("double")
    return answer


def calling(case: Answer) -> Answer:
    """The other ways in which upstream calls its components, and what changes a model in place."""
    actions = importlib.import_module("rxlm.rxt.models").RxTForwardAction
    slow, fast = shared(build(case)), shared(build(case))
    quietly(fast)
    ids = make_inputs(case)["ids"]
    mask = torch.ones_like(ids, dtype=torch.bool)
    longer = torch.randint(7, case["sizes"]["vocabulary"], (1, 80))
    answer: Answer = {}

    def compare(name: str, call: Any) -> None:
        answer[name] = difference(call(fast), call(slow))

    def updated(model: Any, ids: Tensor = ids) -> Tensor:
        model(ids, attention_mask=torch.ones_like(ids, dtype=torch.bool), action=actions.UPDATE)
        memory: Tensor = model.export_stm_state()
        return memory

    with torch.no_grad():
        compare("whole model", lambda model: model(ids, attention_mask=mask))
        compare("projected memory", lambda model: model.decoder(ids, mask, stm_kv_cache=model.prepare_stm_kv_cache()))
        compare("cached", lambda model: model.decoder(ids, mask, use_self_attn_cache=True))
        compare("update", updated)
        for model in (slow, fast):
            base = {"base": 500} if "base" in inspect.signature(model.decoder.update_max_len).parameters else {}
            model.decoder.update_max_len(100, **base)
            model.encoder.update_max_len(100, **base)
            model.memory_attention.update_max_len(100)
        compare("longer", lambda model: model.decoder(longer))
        compare("longer update", lambda model: updated(model, longer))
        stored = io.BytesIO()
        torch.save(fast, stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=False)
        answer["stored"] = difference(loaded.decoder(ids), fast.decoder(ids))
        answer["stored is accelerated"] = "forward" in vars(loaded.decoder.model)
    return answer


def trainers(decoder: Answer, encoder: Answer, memory: Answer, head: Answer) -> Answer:
    """Upstream's own training models, accelerated as a whole: outputs and gradients under the same random numbers."""
    models = importlib.import_module("rxlm.training.models")
    ids = torch.randint(7, decoder["sizes"]["vocabulary"], (2, 12))
    mask = torch.arange(12) < torch.tensor([12, 7])[:, None]

    def joint() -> tuple[nn.Module, Any]:
        model = models.JointTrainingModel(build(encoder), build(decoder), build(head))
        return model, lambda: model(ids, ids, attention_mask=mask)

    def memory_aware() -> tuple[nn.Module, Any]:
        model = models.SupervisedMemoryAwareModel(build(encoder), build(decoder), build(memory))
        for part in (model.decoder, model.memory_attention):
            part.load_shared_memory(model.decoder.model.stm)
        model.decoder.model.stm.batched_memory(2)
        return model, lambda: (model(ids, ids, encoder_mask=mask, decoder_mask=mask),)

    answer: Answer = {}
    for make in (joint, memory_aware):
        found = []
        for fast in (False, True):
            torch.manual_seed(0)
            model, call = make()
            if fast:
                answer[f"{make.__name__} replaced"] = len(quietly(model, parity="upstream").replaced)
            model.train()
            set_memory(model.decoder.model.stm, torch.randn(3, 2, 8, 32, generator=torch.Generator().manual_seed(1)))
            torch.manual_seed(1)
            outputs = call()
            sum(output.square().mean() for output in outputs).backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append(torch.cat([*(output.detach().flatten() for output in outputs), gradients]))
        answer[make.__name__] = difference(found[1], found[0])
    return answer


def dropping(case: Answer) -> Answer:
    """Dropout follows `train` and `eval` of upstream's modules."""
    model = build(case)
    quietly(model)
    ids = make_inputs(case)["ids"]
    with torch.no_grad():
        model.eval()
        calm = torch.equal(model(ids), model(ids))
        model.train()
        return {"eval_repeats": calm, "train_repeats": torch.equal(model(ids), model(ids))}


def lying(case: Answer) -> Answer:
    """A model that is not what its configuration says is left alone."""
    model = build(case)
    model._hub_mixin_config = {**model._hub_mixin_config, "ff_activation": "relu"}
    return {"message": refusal(model), "clean": "forward" not in vars(model.model)}


def refusing(case: Answer) -> Answer:
    model = build(case)
    unknown = refusal(model, parity="fast")
    alone = refusal(model.decoder)
    model.decoder.model.forward = lambda *_, **__: None
    with contextlib.redirect_stdout(io.StringIO()):
        partly = accelerate(model)
    return {"unknown_parity": unknown, "part": alone, "partly": [str(entry) for entry in partly.skipped]}


def inside(case: Answer) -> Answer:
    """A module of somebody else's that has upstream's components in it, as trainers do."""

    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = build(case), build(case)

    trainer = Trainer()
    report = quietly(trainer)
    return {"replaced": [entry.path for entry in report.replaced]}


# answers


def interaction(case: Answer) -> Answer:
    """Streams and memories of an accelerated model against upstream's own, where those can be brought to work."""
    inputs = make_inputs(case)
    end = case["arguments"]["tokenizer_config"]["eos_token_id"]
    with torch.no_grad():
        model = build(case)
        model.share_components()
        expected = evaluate_interaction(model, inputs, end)
        model = build(case)
        report = quietly(model)
        model.share_components()
        found = evaluate_interaction(model, inputs, end)
    return {
        "replaced": [str(entry) for entry in report.replaced],
        "worst": max(errors(found, expected, inputs["mask_batch"]).values()),
    }


def crashing(case: Answer) -> Answer:
    """The calls that upstream fails in, made as anybody would: nothing is set by hand, and no mask is given."""
    inputs = make_inputs(case)
    model = build(case)
    options: dict[str, Any] = {"top_k": 1, "max_seq_len": INTERACTION_LENGTH}
    answer: Answer = {"upstream": {}}
    for name in ("interact", "batch_interact"):
        try:
            slow = copy.deepcopy(model)
            slow.share_components()
            rows = 1 if name == "interact" else 3
            if rows > 1:
                slow.set_batch_mode(True, rows)
            list(getattr(slow, name)(inputs["ids" if rows == 1 else "ids_batch"].clone(), **options))
            answer["upstream"][name] = "works"
        except Exception as error:
            answer["upstream"][name] = type(error).__name__
    quietly(model)
    before_sharing = None
    try:
        list(model.interact(inputs["ids"], **options))
    except RuntimeError as error:
        before_sharing = str(error)
    model.share_components()
    model.load_stm_state(inputs["memory"])
    ids = inputs["ids"].clone()
    stream = model.interact(ids, **options)
    answer["gradients_enabled"] = torch.is_grad_enabled() and next(stream) >= 0 and torch.is_grad_enabled()
    rest = list(stream)
    answer["sentinels"] = rest[-2:]
    answer["input_kept"] = torch.equal(ids, inputs["ids"])
    answer["memory_moved"] = difference(model.export_stm_state(), inputs["memory"])
    answer["memory_has_graph"] = model.export_stm_state().requires_grad or model.decoder.model.stm.memory.requires_grad
    before = model.export_stm_state()
    stopped = model.interact(ids, **options)
    next(stopped)
    stopped.close()
    answer["written_when_stopped"] = difference(model.export_stm_state(), before)
    model.set_batch_mode(True, 3)
    steps = list(model.batch_interact(inputs["ids_batch"], inputs["mask_batch"], **options))
    answer["batch"] = [list(steps[0].shape), steps[-2].tolist(), steps[-1].tolist()]
    whole, mask = model.batch_interactions(inputs["ids_batch"], inputs["mask_batch"], **options)
    answer["interactions"] = [list(whole.shape), list(mask.shape)]
    model.set_batch_mode(False)
    model.reset_self_attn_cache()
    model.init_stm_state(inputs["ids"], torch.ones_like(inputs["ids"], dtype=torch.bool))
    answer["initialised_has_graph"] = model.decoder.model.stm.memory.requires_grad
    answer["before_sharing"] = before_sharing
    answer["signature"] = "thinking_mode" in inspect.signature(type(model).interact).parameters
    if answer[
        "signature"
    ]:  # upstream applies automatic thinking at every step, so it yields [A] and [T] only (defect 4)
        opening = list(model.interact(inputs["ids"], **options))
        ids_of = case["arguments"]["tokenizer_config"]
        answer["auto_opens"] = opening[0] in (ids_of["answer_token_id"], ids_of["think_token_id"])
        answer["auto_goes_on"] = len(set(opening[1:-2]))
    return answer


def generating(case: Answer) -> Answer:
    """A stateless model's answer, with and without a cache, against upstream's own without one."""
    ids = make_inputs(case)["ids"]
    mask = torch.ones_like(ids, dtype=torch.bool)
    slow, fast = build(case), build(case)
    report = quietly(fast)
    options: dict[str, Any] = {"top_k": 1, "max_seq_len": INTERACTION_LENGTH}
    with torch.no_grad():
        expected = list(slow.generate(ids.clone(), mask.clone(), use_self_attn_cache=False, **options))
        ended = list(
            slow.generate(ids.clone(), mask.clone(), use_self_attn_cache=False, eos_token_id=expected[3], **options)
        )
        cached = list(slow.generate(ids.clone(), mask.clone(), **options))
    return {
        "engine": "decoded by the native engine" in str(report) or not native_runtime.available(),
        "cached": list(fast.generate(ids, **options)) == expected,
        "uncached": list(fast.generate(ids, mask, use_self_attn_cache=False, **options)) == expected,
        "ended": list(fast.generate(ids, mask, eos_token_id=expected[3], **options)) == ended,
        "upstream_cached": cached == expected,
    }


def main() -> None:
    requests, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    answers = {}
    for request in json.loads(requests.read_text()):
        options = {name: value for name, value in request.items() if name not in ("name", "check")}
        torch.manual_seed(0)
        try:
            answers[request["name"]] = globals()[request["check"]](**options)
        except Exception:
            answers[request["name"]] = {"failed": traceback.format_exc(limit=-6)}
    output.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
