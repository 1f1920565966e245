"""Our models against the upstream library as a black box, in both directions, on random weights and in fp32.

Upstream saves, we load and must answer the same; we save, upstream loads and must answer the same. Its two versions
differ in meaning (experts, rotary layout, defaults), so both are asked. `tests/upstream/` holds the cases and the
oracle that runs upstream in a process of its own; where upstream is not installed these tests skip and say so.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rxt_model.checkpoint import CheckpointError
from rxt_model.checkpoint.grammar import upstream_grammar
from rxt_model.tokenizer import DEFAULT_SPECIAL_TOKENS, train_tokenizer
from tests.upstream import ours
from tests.upstream.cases import VERSIONS, Case, cases, full_cases
from tests.upstream.oracle import INTERACTION_LENGTH, make_inputs, randomise, write
from tests.upstream.runner import Answer, UpstreamRuns, read_answer, run_oracle, why_absent

# Single components do not always show their rotary layout; that loading says so is tested elsewhere.
pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("ignore::rxt_model.checkpoint.CheckpointWarning")]

TOLERANCE = 1e-5  # largest difference over largest value
LEAST_GAP = 1e-4  # between the best two logits of a greedy step; below it, equal tokens would prove nothing

BY_NAME = {version: {case["name"]: case for case in cases(version)} for version in VERSIONS}
LAYOUT = {"0.2.31": "split", "0.3.92": "interleaved"}

#: What upstream's stateless model can be and ours is not (SQA with dense or routed feed-forward layers only).
REFUSED = {
    "llm-moe-dense-first", "llm-moe-1-shared", "llm-moe-2-shared", "llm-tied", "llm-head-norm", "llm-gated",
    "llm-moe-per-expert-2-shared", "llm-moe-local",
}  # fmt: skip


def _reason(version: str) -> pytest.MarkDecorator:
    reason = why_absent(version)
    return pytest.mark.skipif(reason is not None, reason=reason or "present")


def _selected(condition: Any = lambda case: True) -> list[Any]:
    """Test parameters (version, case name), each skipped with a reason where its version is absent."""
    return [
        pytest.param(version, name, id=f"{version}-{name}", marks=_reason(version))
        for version in VERSIONS
        for name, case in BY_NAME[version].items()
        if name not in _refused(version) and condition(case)
    ]


def _refused(version: str) -> set[str]:
    return REFUSED | ({"llm-moe"} if version == "0.3.92" else set())


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> UpstreamRuns:
    return UpstreamRuns(tmp_path_factory.mktemp("upstream"))


def load_ours(case: Case, directory: pathlib.Path, **options: Any) -> Any:
    return ours.our_class(case).from_pretrained(str(directory), **options).eval()


def load_answer(version: str, answer: Answer) -> Any:
    """Our model of a directory saved by upstream.

    What no file of that kind shows, the caller has to say: the rotary layout of a decoder alone, and which of the
    interlayer variants a memory attention without gates is.
    """
    options = {}
    if answer.case["kind"] not in ("full", "memory_attention"):
        options["rope_layout"] = LAYOUT[version]
    if answer.case["name"] == "variant-gated-self-interlayer-none":
        options["memory_attention_variant"] = "gated-self-interlayer"
    if answer.case["kind"] == "mlm_head":
        options = {}
    return load_ours(answer.case, answer.model_directory, **options)


def worst(values: dict[str, float]) -> float:
    return max(values.values())


@pytest.mark.parametrize(("version", "name"), _selected())
def test_we_compute_what_upstream_computes(
    upstream: UpstreamRuns, version: str, name: str, record_property: Any
) -> None:
    answer = upstream.answer(version, name)
    for gap in ("greedy_gap", "greedy_after_updates_gap"):
        assert gap not in answer.outputs or answer.outputs[gap].item() > LEAST_GAP, "choose another seed for this case"
    model = load_answer(version, answer)
    result = ours.errors(ours.evaluate(answer.case, model, answer.inputs), answer.outputs, answer.inputs["mask_batch"])
    record_property("largest_relative_error", worst(result))
    assert worst(result) <= TOLERANCE, result


@pytest.mark.parametrize(
    ("version", "name"), _selected(lambda case: case["name"].startswith(("norm-adaptive", "norm-positional")))
)
def test_running_statistics_of_memory_norms_move_as_upstream_s(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    for suffix in ("", "_batch"):
        actual = ours.evaluate_training(load_answer(version, answer), answer.inputs, suffix)
        assert any(key.startswith("statistics") for key in actual)
        result = ours.errors(actual, answer.outputs, answer.inputs["mask_batch"])
        assert worst(result) <= TOLERANCE, result


@pytest.mark.parametrize(("version", "name"), _selected(lambda case: case.get("interaction")))
def test_streamed_conversation_equals_upstream_s(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    model = load_answer(version, answer)
    model.load_stm_state(answer.inputs["memory"])
    options: dict[str, Any] = {"temperature": 0.0, "max_seq_len": INTERACTION_LENGTH}
    thinking = {"thinking_mode": "fast"} if name.startswith("beta") else {}
    ids = answer.inputs["ids"]
    stream = list(model.interact(ids, attention_mask=torch.ones_like(ids), **options, **thinking))
    assert stream == answer.outputs["interaction"].tolist()
    if "interaction_extended" in answer.outputs:
        again = load_answer(version, answer)
        again.load_stm_state(answer.inputs["memory"])
        extended = again.interact(ids, attention_mask=torch.ones_like(ids), thinking_mode="extended", **options)
        assert list(extended) == answer.outputs["interaction_extended"].tolist()
    actual = {"interaction_memory": model.export_stm_state()}
    result = ours.errors(actual, answer.outputs, answer.inputs["mask_batch"])
    assert worst(result) <= TOLERANCE, result


@pytest.mark.parametrize(("version", "name"), _selected(lambda case: case.get("interaction")))
def test_batched_conversations_equal_upstream_s(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    model = load_answer(version, answer)
    mask = answer.inputs["mask_batch"]
    padding = (0, INTERACTION_LENGTH - mask.shape[1])
    ids = torch.nn.functional.pad(answer.inputs["ids_batch"] * mask, padding)
    padded_mask = torch.nn.functional.pad(mask, padding)
    thinking = {"thinking_mode": "fast"} if name.startswith("beta") else {}
    options: dict[str, Any] = {"temperature": 0.0, "max_seq_len": INTERACTION_LENGTH, **thinking}
    model.set_batch_mode(True, ids.shape[0])
    model.load_stm_state(answer.inputs["memory_batch"])
    steps = torch.stack(list(model.batch_interact(ids, attention_mask=padded_mask, **options)))
    if thinking:  # ours streams the [A] that opens a fast answer, as upstream does for one conversation, not for many
        assert (steps[0] == answer.case["arguments"]["tokenizer_config"]["answer_token_id"]).all()
        steps = steps[1:]
    assert steps.tolist() == answer.outputs["batch_interaction"].tolist()
    result = ours.errors({"batch_interaction_memory": model.export_stm_state()}, answer.outputs, mask)
    assert worst(result) <= TOLERANCE, result
    for kind, answers_only in (("whole", False), ("answers", True)):
        model.load_stm_state(answer.inputs["memory_batch"])
        found, found_mask = model.batch_interactions(
            ids, attention_mask=padded_mask, answers_only=answers_only, **options
        )
        assert found.tolist() == answer.outputs[f"batch_{kind}"].tolist()
        assert found_mask.tolist() == answer.outputs[f"batch_{kind}_mask"].tolist()


@pytest.mark.parametrize(("version", "name"), _selected(lambda case: case.get("saving", "shared") == "shared"))
def test_the_file_grammar_is_upstream_s_to_the_byte(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    file = answer.model_directory / "model.safetensors"
    encoder = answer.case["arguments"].get("encoder_config", answer.case["arguments"])
    keeps_memory = version == "0.2.31" or encoder.get("legacy_stm_in_encoder", False)
    grammar = upstream_grammar(load_answer(version, answer), encoder_memory=keeps_memory)
    with safe_open(file, "pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
    assert grammar.shapes == shapes
    assert grammar.metadata == metadata
    assert grammar.file_size == file.stat().st_size


@pytest.mark.parametrize("version", [pytest.param(version, marks=_reason(version)) for version in VERSIONS])
def test_wrong_rotary_layout_is_seen(upstream: UpstreamRuns, version: str) -> None:
    """The comparison would notice: with the other version's layout the same weights give clearly different answers."""
    answer = upstream.answer(version, "alpha-gated-linear-moe")
    other = "split" if LAYOUT[version] == "interleaved" else "interleaved"
    model = load_ours(answer.case, answer.model_directory, rope_layout=other)
    result = ours.errors(
        {k: v for k, v in ours.evaluate(answer.case, model, answer.inputs).items() if "greedy" not in k},
        answer.outputs,
        answer.inputs["mask_batch"],
    )
    assert result["logits"] > 1e-2
    assert result["memory_after_1"] > 1e-3
    assert result["encoded"] <= TOLERANCE, "self-attention alone does not depend on the layout"


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(version, name, id=f"{version}-{name}", marks=_reason(version))
        for version in VERSIONS
        for name in sorted(_refused(version) & BY_NAME[version].keys())
    ],
)
def test_stateless_models_beyond_ours_are_refused(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    with pytest.raises(CheckpointError):
        load_ours(answer.case, answer.model_directory)


# text: the token ids of prompts and interactions


TEXTS = ["Hello there, my name is Ada.", "what is my name?", "Grüße aus Köln — 東京 🙂\ttabs\nlines", "  spaces  "]
SHORT = ["Hi!", "Why?"]


def _template_calls(beta: bool) -> list[dict[str, Any]]:
    """Calls by upstream's name, and by ours where ours has another."""

    def call(method: str, *positional: Any, ours: dict[str, Any] | None = None, **named: Any) -> dict[str, Any]:
        return {"method": method, "positional": positional, "named": named, "ours": ours}

    calls = [call("tokenize_query", text) for text in TEXTS]
    calls += [
        call("tokenize_full_interaction", text, answer) for text, answer in zip(TEXTS, reversed(TEXTS), strict=True)
    ]
    calls += [call("tokenize_batch", SHORT, max_seq_len=24)]
    if beta:
        parts = {"query": "Hi!", "answer": "Yes.", "think": "Hm, so", "tool_call": "run(1)", "internal": "be kind"}
        calls += [
            call("tokenize_query", "Hi!", internal="be kind"),
            call("tokenize_full_interaction", **parts),
            call("tokenize_full_interaction", query="Hi!", answer="Yes.", think="Hm"),
            call(
                "tokenize_full_interaction",
                tool_use="done",
                answer="Yes.",
                ours={
                    "method": "tokenize_full_interaction",
                    "named": {"query": None, "tool_result": "done", "answer": "Yes."},
                },
            ),
            call(
                "tokenize_tool_result",
                "done",
                ours={"method": "tokenize_query", "named": {"text": None, "tool_result": "done"}},
            ),
        ]
    return calls


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(version, name, id=f"{version}-{name}", marks=_reason(version))
        for version, name in (("0.2.31", "RxTAlpha"), ("0.3.92", "RxTAlpha"), ("0.3.92", "RxTBeta"))
    ],
)
def test_prompts_and_interactions_have_upstream_s_token_ids(tmp_path: pathlib.Path, version: str, name: str) -> None:
    beta = name == "RxTBeta"
    tokenizer = train_tokenizer([*TEXTS, *SHORT] * 3, 320)
    roles = tokenizer.special_tokens
    arguments = json.loads(json.dumps(BY_NAME["0.3.92"]["alpha-grouped"]["arguments"]))
    arguments["memory_attention_variant"] = "self-interlayer"
    arguments["memory_attention_config"].pop("num_groups")
    for part in ("decoder_config", "encoder_config"):
        arguments[part]["vocab_size"] = tokenizer.vocab_size
    wanted = ["bos", "eos", "query", "answer", "pad"] + (["think", "tool_call", "tool_use", "internal"] if beta else [])
    arguments["tokenizer_config"] = {f"{role}_token_id": getattr(roles, role) for role in wanted}
    calls = _template_calls(beta)
    request = {
        "name": "templates",
        "class": name,
        "arguments": arguments,
        "tokenizer": tokenizer.to_json(),
        "control_tokens": DEFAULT_SPECIAL_TOKENS,
        "calls": calls,
    }
    run_oracle(version, "templates", [request], tmp_path)
    error = tmp_path / "templates" / "error.txt"
    assert not error.exists(), error.read_text()
    answers = json.loads((tmp_path / "templates" / "answers.json").read_text())
    model = ours.our_class({"kind": "full", "class": name})(**arguments, tokenizer=tokenizer)
    for call, answer in zip(calls, answers, strict=True):
        asked = call["ours"] or call
        found = getattr(model, asked["method"])(*asked.get("positional", ()), **asked["named"])
        assert found["input_ids"].tolist() == answer["input_ids"], call
        assert found["attention_mask"].long().tolist() == answer["attention_mask"], call


# the other direction: upstream reads what we write


@pytest.fixture(scope="session")
def reread(upstream: UpstreamRuns, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every case through our loader and our `save_pretrained`, and what upstream answers to the result."""
    finished: dict[str, tuple[pathlib.Path, dict[str, str]]] = {}

    def read(version: str, name: str) -> Answer:
        if version not in finished:
            directory = tmp_path_factory.mktemp(f"resaved-{version}")
            finished[version] = (directory, _resave(upstream, version, directory))
        directory, failures = finished[version]
        if name in failures:
            pytest.fail(failures[name])
        return read_answer(BY_NAME[version][name], directory)

    return read


def _resave(upstream: UpstreamRuns, version: str, directory: pathlib.Path) -> dict[str, str]:
    requests, failures = [], {}
    for name, case in BY_NAME[version].items():
        if name in _refused(version):
            continue
        answer = upstream.answer(version, name)
        target = directory / name / "model"
        try:
            load_answer(version, answer).save_pretrained(str(target))
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
            continue
        requests.append(_request(case, target, answer.directory / "tensors.safetensors"))
    run_oracle(version, "load", requests, directory)
    return failures


def _request(case: Case, path: pathlib.Path, inputs: pathlib.Path) -> Case:
    return {
        "name": case["name"],
        "kind": case["kind"],
        "class": case["class"],
        "path": str(path),
        "inputs": str(inputs),
    }


@pytest.mark.parametrize(("version", "name"), _selected())
def test_upstream_reads_a_checkpoint_that_passed_through_us(
    upstream: UpstreamRuns, reread: Any, version: str, name: str
) -> None:
    original, again = upstream.answer(version, name), reread(version, name)
    outputs = {k: v for k, v in again.outputs.items() if not k.endswith("gap")}
    result = ours.errors(outputs, original.outputs, original.inputs["mask_batch"])
    assert worst(result) == 0.0, result


#: Models of one version that the other can express. 0.3.92 skips cross-attention in encoders, cannot build the
#: interlayer variant, and needs more token ids for RxT-Beta; 0.2.31 knows nothing that came later.
CONVERTIBLE = {
    "0.2.31": [
        "alpha-gated-linear-moe", "alpha-elementwise-dense", "alpha-static-tanh", "alpha-ungated", "alpha-reversed-heads",
        "alpha-norm-rms",
    ],
    "0.3.92": ["alpha-elementwise-dense", "alpha-static-tanh", "alpha-ungated", "alpha-per-expert-moe"],
}  # fmt: skip


@pytest.fixture(scope="session")
def converted(upstream: UpstreamRuns, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models of one upstream version, saved by us in the other's rotary layout, and what that other version answers."""
    finished: dict[str, pathlib.Path] = {}

    def read(source: str, name: str) -> Answer:
        target = _other(source)
        if source not in finished:
            directory = finished[source] = tmp_path_factory.mktemp(f"converted-from-{source}")
            requests = []
            for each in CONVERTIBLE[source]:
                answer = upstream.answer(source, each)
                saved = directory / each / "model"
                load_answer(source, answer).save_pretrained(str(saved), rope_layout=LAYOUT[target])
                requests.append(_request(answer.case, saved, answer.directory / "tensors.safetensors"))
            run_oracle(target, "load", requests, directory)
        return read_answer(BY_NAME[source][name], finished[source])

    return read


def _other(version: str) -> str:
    return next(other for other in VERSIONS if other != version)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(version, name, id=f"{version}-{name}", marks=[_reason(version), _reason(_other(version))])
        for version in VERSIONS
        for name in CONVERTIBLE[version]
    ],
)
def test_upstream_s_other_version_computes_the_same_from_a_file_converted_by_us(
    upstream: UpstreamRuns, converted: Any, version: str, name: str
) -> None:
    original, again = upstream.answer(version, name), converted(version, name)
    outputs = {k: v for k, v in again.outputs.items() if not k.endswith("gap")}
    result = ours.errors(outputs, original.outputs, original.inputs["mask_batch"])
    assert worst(result) <= TOLERANCE, result


@pytest.fixture(scope="session")
def born_here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Complete models made by our classes from scratch, saved, and what upstream answers to them."""
    finished: dict[str, tuple[pathlib.Path, dict[str, dict[str, torch.Tensor]]]] = {}

    def read(version: str, name: str) -> tuple[Answer, dict[str, torch.Tensor]]:
        if version not in finished:
            directory = tmp_path_factory.mktemp(f"born-here-{version}")
            outputs, requests = {}, []
            for case in full_cases(version):
                model = _make(version, case)
                target = directory / case["name"] / "model"
                model.save_pretrained(str(target))
                inputs = make_inputs(case)
                outputs[case["name"]] = ours.evaluate(case, model, inputs)
                write(target.parent, inputs, {})
                requests.append(_request(case, target, target.parent / "tensors.safetensors"))
            run_oracle(version, "load", requests, directory)
            finished[version] = (directory, outputs)
        directory, outputs = finished[version]
        return read_answer(BY_NAME[version][name], directory), outputs[name]

    return read


def _make(version: str, case: Case) -> Any:
    """Our model of a case, built from its configuration alone, with random weights."""
    arguments = json.loads(json.dumps(case["arguments"]))
    for part in ("decoder_config", "encoder_config", "memory_attention_config"):
        arguments[part]["rope_layout"] = LAYOUT[version]
        if version == "0.2.31" and part != "memory_attention_config":
            arguments[part].update(use_vectorized_moe=False, num_shared_experts=0)
    model = ours.our_class(case)(**arguments)
    randomise(model, case["seed"])
    return model.eval()


def _upstream_can_build(version: str, case: Case) -> bool:
    """Whether upstream builds the memory attention that the file names: 0.3.92 never builds the interlayer variant."""
    is_full = case["kind"] == "full"
    return is_full and (version == "0.2.31" or case["arguments"].get("memory_attention_variant") != "interlayer")


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(version, name, id=f"{version}-{name}", marks=_reason(version))
        for version in VERSIONS
        for name, case in BY_NAME[version].items()
        if _upstream_can_build(version, case)
    ],
)
def test_upstream_reads_a_model_made_by_us(born_here: Any, version: str, name: str) -> None:
    answer, actual = born_here(version, name)
    result = ours.errors(actual, answer.outputs, answer.inputs["mask_batch"])
    assert worst(result) <= TOLERANCE, result
