"""Our models against the upstream library as a black box, in both directions, on random weights and in fp32.

Upstream saves, we load and must answer the same; we save, upstream loads and must answer the same. Its two versions
differ in meaning (experts, rotary layout, defaults), so both are asked. `tests/upstream/` holds the cases and the
oracle that runs upstream in a process of its own; where upstream is not installed these tests skip and say so.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rxt_model import RxTAlpha, RxTBeta
from rxt_model.checkpoint import CheckpointError
from rxt_model.checkpoint.grammar import upstream_grammar
from tests.upstream import ours, templates
from tests.upstream.cases import VERSIONS, Case, cases
from tests.upstream.oracle import INTERACTION_LENGTH
from tests.upstream.reread import CONVERTIBLE, Reread, other
from tests.upstream.runner import UpstreamRuns, failure, why_absent

# Single components do not always show their rotary layout; that loading says so is tested elsewhere.
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.filterwarnings("ignore::rxt_model.checkpoint.CheckpointWarning"),
    pytest.mark.timeout(900),  # the first test of each direction waits for the oracle, on a busy machine for long
]

TOLERANCE = 1e-5  # largest difference over largest value
LEAST_GAP = 1e-4  # between the best two logits of a greedy step; below it, equal tokens would prove nothing

#: Models whose prompts are compared; RxTBeta of 0.2.31 has those of RxTAlpha.
TEMPLATES = (("0.2.31", "RxTAlpha"), ("0.3.92", "RxTAlpha"), ("0.3.92", "RxTBeta"))
BY_NAME = {version: {case["name"]: case for case in cases(version)} for version in VERSIONS}

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
    def others(version: str) -> list[dict[str, Any]]:
        return [templates.request(name) for at, name in TEMPLATES if at == version]

    return UpstreamRuns(tmp_path_factory.mktemp("upstream"), others)


def worst(values: dict[str, float]) -> float:
    return max(values.values())


@pytest.mark.parametrize(("version", "name"), _selected())
def test_we_compute_what_upstream_computes(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    for gap in ("greedy_gap", "greedy_after_updates_gap"):
        assert gap not in answer.outputs or answer.outputs[gap].item() > LEAST_GAP, "choose another seed for this case"
    model = ours.load_answer(version, answer, keep=True)
    result = ours.errors(ours.evaluate(answer.case, model, answer.inputs), answer.outputs, answer.inputs["mask_batch"])
    assert worst(result) <= TOLERANCE, result


@pytest.mark.parametrize(
    ("version", "name"), _selected(lambda case: case["name"].startswith(("norm-adaptive", "norm-positional")))
)
def test_running_statistics_of_memory_norms_move_as_upstream_s(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    for suffix in ("", "_batch"):
        actual = ours.evaluate_training(ours.load_answer(version, answer), answer.inputs, suffix)
        assert any(key.startswith("statistics") for key in actual)
        result = ours.errors(actual, answer.outputs, answer.inputs["mask_batch"])
        assert worst(result) <= TOLERANCE, result


@pytest.mark.parametrize(("version", "name"), _selected(lambda case: case.get("interaction")))
def test_streamed_conversation_equals_upstream_s(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    model = ours.load_answer(version, answer)
    model.load_stm_state(answer.inputs["memory"])
    options: dict[str, Any] = {"temperature": 0.0, "max_seq_len": INTERACTION_LENGTH}
    thinking = {"thinking_mode": "fast"} if name.startswith("beta") else {}
    ids = answer.inputs["ids"]
    stream = list(model.interact(ids, attention_mask=torch.ones_like(ids), **options, **thinking))
    assert stream == answer.outputs["interaction"].tolist()
    if "interaction_extended" in answer.outputs:
        again = ours.load_answer(version, answer)
        again.load_stm_state(answer.inputs["memory"])
        extended = again.interact(ids, attention_mask=torch.ones_like(ids), thinking_mode="extended", **options)
        assert list(extended) == answer.outputs["interaction_extended"].tolist()
    actual = {"interaction_memory": model.export_stm_state()}
    result = ours.errors(actual, answer.outputs, answer.inputs["mask_batch"])
    assert worst(result) <= TOLERANCE, result


@pytest.mark.parametrize(("version", "name"), _selected(lambda case: case.get("interaction")))
def test_batched_conversations_equal_upstream_s(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    model = ours.load_answer(version, answer)
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
            ids, attention_mask=padded_mask, return_interactions_with_queries=not answers_only, **options
        )
        assert found.tolist() == answer.outputs[f"batch_{kind}"].tolist()
        assert found_mask.tolist() == answer.outputs[f"batch_{kind}_mask"].tolist()


@pytest.mark.parametrize(("version", "name"), _selected(lambda case: case.get("saving", "shared") == "shared"))
def test_the_file_grammar_is_upstream_s_to_the_byte(upstream: UpstreamRuns, version: str, name: str) -> None:
    answer = upstream.answer(version, name)
    file = answer.model_directory / "model.safetensors"
    encoder = answer.case["arguments"].get("encoder_config", answer.case["arguments"])
    keeps_memory = version == "0.2.31" or encoder.get("legacy_stm_in_encoder", False)
    grammar = upstream_grammar(ours.load_answer(version, answer, keep=True), encoder_memory=keeps_memory)
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
    model = ours.load(answer.case, answer.model_directory, rope_layout=ours.LAYOUT[other(version)])
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
        ours.load(answer.case, answer.model_directory)


# text: the token ids of prompts and interactions


@pytest.mark.parametrize(
    ("version", "name"),
    [pytest.param(version, name, id=f"{version}-{name}", marks=_reason(version)) for version, name in TEMPLATES],
)
def test_prompts_and_interactions_have_upstream_s_token_ids(upstream: UpstreamRuns, version: str, name: str) -> None:
    directory = upstream.directory(version)
    assert failure(directory, f"templates-{name}") is None
    answers = json.loads((directory / f"templates-{name}" / "answers.json").read_text())
    model = {"RxTAlpha": RxTAlpha, "RxTBeta": RxTBeta}[name](
        **templates.arguments(name), tokenizer=templates.tokenizer()
    )
    for call, answer in zip(templates.calls(name == "RxTBeta"), answers, strict=True):
        asked = call["ours"] or call
        found = getattr(model, asked["method"])(*asked.get("positional", ()), **asked["named"])
        assert found["input_ids"].tolist() == answer["input_ids"], call
        assert found["attention_mask"].long().tolist() == answer["attention_mask"], call


# the other direction: upstream reads what we write


@pytest.fixture(scope="session")
def reread(upstream: UpstreamRuns, tmp_path_factory: pytest.TempPathFactory) -> Reread:
    return Reread(upstream, tmp_path_factory.mktemp("reread"), {version: _refused(version) for version in VERSIONS})


def _without_gaps(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in outputs.items() if not name.endswith("gap")}


@pytest.mark.parametrize(("version", "name"), _selected())
def test_upstream_reads_a_checkpoint_that_passed_through_us(
    upstream: UpstreamRuns, reread: Reread, version: str, name: str
) -> None:
    original, again = upstream.answer(version, name), reread.answer(version, "again", name)
    result = ours.errors(_without_gaps(again.outputs), original.outputs, original.inputs["mask_batch"])
    assert worst(result) == 0.0, result


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
def test_upstream_reads_a_model_made_by_us(reread: Reread, version: str, name: str) -> None:
    answer = reread.answer(version, "made", name)
    result = ours.errors(reread.ours(version, name), answer.outputs, answer.inputs["mask_batch"])
    assert worst(result) <= TOLERANCE, result


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(version, name, id=f"{version}-{name}", marks=[_reason(version), _reason(other(version))])
        for version in VERSIONS
        for name in CONVERTIBLE[version]
    ],
)
def test_upstream_s_other_version_computes_the_same_from_a_file_converted_by_us(
    upstream: UpstreamRuns, reread: Reread, version: str, name: str
) -> None:
    original, again = upstream.answer(version, name), reread.answer(other(version), "converted", name)
    result = ours.errors(_without_gaps(again.outputs), original.outputs, original.inputs["mask_batch"])
    assert worst(result) <= TOLERANCE, result
