"""Benchmarks: what is timed computes the right thing, what is counted is what torch counts, and no result is ever lost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rxt_benchmarks import (
    BENCHMARKS,
    dialogue_steps,
    environment,
    plotting,
    results,
    scaling,
    scaling_report,
    statistics,
    systems,
)
from rxt_benchmarks.costs import RxTCosts, StatelessCosts, causal_pairs
from rxt_benchmarks.dialogues import Turn, conversation_turns, dialogue_tokenizer, load_dialogues
from rxt_benchmarks.systems import TurnTimes
from torch.utils.flop_counter import FlopCounterMode

from rxt_kernels import use_backend
from rxt_model import (
    MemoryAttentionConfig,
    RxTAlpha,
    RxTBeta,
    SparseQueryTransformer,
    StatelessConfig,
    TokenIds,
    TransformerConfig,
)

TOKENS = TokenIds(bos_token_id=2, eos_token_id=3, query_token_id=5, answer_token_id=6)
LIMITS = {"read_bandwidth_bytes_per_second": 3e10, "fma_flops_per_second": 2e11}


def tiny_configs(
    vocab_size: int = 60, **changes: Any
) -> tuple[TransformerConfig, TransformerConfig, MemoryAttentionConfig]:
    common: dict[str, Any] = {"num_layers": 2, "embed_dim": 32, "att_heads": 4, "att_groups": 2, "stm_size": 12}
    both: dict[str, Any] = {"vocab_size": vocab_size, "ff_dim": 24, "att_query_groups": 4, **common}
    both |= {"num_shared_experts": 0, "moe_bias_mode": "local"}
    gates: dict[str, Any] = {"use_gated_residual": True, "residual_gate_type": "linear"}
    return (
        TransformerConfig(**{**both, "use_moe": True, "num_experts": 6, "moe_top_k": 2, **changes}),
        TransformerConfig(skip_memory_cross_attention=True, **both),
        MemoryAttentionConfig(att_query_groups=2, **gates, **common),
    )


def tiny_model(family: type[RxTAlpha] | type[RxTBeta] = RxTAlpha, **changes: Any) -> RxTAlpha | RxTBeta:
    torch.manual_seed(0)
    return family(*tiny_configs(**changes), TOKENS, "gated-self-interlayer").eval()


def turns_of(count: int, prompt: int = 6, answer: int = 5) -> list[Turn]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 60, (length,), generator=generator).tolist())

    return [Turn((2, 5, *ids(prompt - 3), 6), (*ids(answer - 1), 3)) for _ in range(count)]


# statistics


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponent_is_exact_on_powers_and_ignores_a_stray_turn(power: float) -> None:
    costs = [7.0 * n**power for n in range(1, 65)]
    assert statistics.exponent(costs) == pytest.approx(power, abs=1e-9)
    costs[50] *= 20
    assert statistics.exponent(costs) == pytest.approx(power, abs=0.01)


@pytest.mark.parametrize("costs", [[1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 1.0], []])
def test_exponent_refuses_what_has_none(costs: list[float]) -> None:
    with pytest.raises(ValueError, match="costs holds"):
        statistics.exponent(costs)


def test_interval_is_student_t() -> None:
    estimate = statistics.mean_with_interval([1.0, 2.0, 3.0])
    assert estimate.value == 2.0
    assert estimate.high == pytest.approx(2.0 + 4.303 / math.sqrt(3), rel=1e-3)
    assert statistics.mean_with_interval([5.0]) == (5.0, None, None)
    assert statistics.mean_with_interval([1.0, 2.0] * 40).high == pytest.approx(
        1.5 + 1.96 * 0.5 / math.sqrt(79), rel=0.01
    )


@pytest.mark.parametrize(
    ("ratios", "turn"),
    [([2.0, 2.0], 1), ([0.5, 1.5, 2.0], 2), ([0.5, 1.5, 0.9, 2.0], 4), ([2.0, 1.0], None), ([0.5] * 3, None)],
)
def test_overtaking_is_for_good(ratios: list[float], turn: int | None) -> None:
    assert statistics.overtaking_turn(ratios) == turn


# results


def a_result(**changes: Any) -> results.Results:
    row = {"name": "x", "backend": "reference", "dtype": "float32", "shape": {}, "p20": 1.0, "p50": 2.0, "p80": 3.0}
    return results.Results("scaling", {"turns": 4}, {"cpu": "any"}, LIMITS, [{**row, **changes}], {"said": 1})


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    written = a_result()
    path = results.write_results(written, tmp_path / "new" / "result.json")
    assert results.read_results(path, name="scaling") == written
    content = json.loads(path.read_text())
    assert {"name", "created", "environment", "limits", "rows", "summary"} <= content.keys()
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"p20": 2.5}, "out of order"),
        ({"p80": math.inf}, "not finite"),
        ({"dtype": None}, "dtype"),
        ({"p50": "2"}, "p50"),
    ],
)
def test_rows_that_break_the_schema_are_not_written(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(results.ResultsError, match=sentence):
        results.write_results(a_result(**changes), tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not JSON"),
        ("[]", "not the result of a benchmark"),
        ('{"format": "rxt-benchmark", "format_version": 2}', "format version 2"),
        ('{"format": "rxt-benchmark", "format_version": 1, "name": "kernels"}', "'kernels'"),
        ('{"format": "rxt-benchmark", "format_version": 1, "name": "scaling"}', "no settings"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(results.ResultsError, match=sentence):
        results.read_results(path, name="scaling")


# environment


def test_environment_says_what_a_reader_needs_and_no_more() -> None:
    stamp = environment.describe_environment()
    assert {"cpu", "cores", "threads", "python", "torch", "rxt_kernels", "commit"} <= stamp.keys()
    assert json.loads(json.dumps(stamp)) == stamp
    assert str(Path.home()) not in json.dumps(stamp)
    limits = environment.machine_limits(megabytes=4, matrix=64, repeats=1)
    assert all(limit > 0 for limit in limits.values())


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_thread_counts_this_machine_does_not_have_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads is {threads}"):
        environment.use_threads(threads)


# dialogues


def test_own_conversations_suffice_for_any_number_of_turns() -> None:
    dialogues = load_dialogues(64, use_package=False)
    assert all(len(conversation) >= 128 for conversation in dialogues.conversations)
    assert len(set(dialogues.conversations)) == len(dialogues.conversations)


@pytest.mark.parametrize("lengths", ["equal", "real"])
def test_turns_are_real_text_in_the_template(lengths: Any) -> None:
    dialogues = load_dialogues(20, use_package=False)
    tokenizer = dialogue_tokenizer(dialogues, 1000)
    messages = dialogues.conversations[0]
    turns = conversation_turns(messages, tokenizer, TOKENS, 20, lengths=lengths, query_tokens=9, answer_tokens=7)
    assert len(turns) == 20
    for turn in turns:
        assert turn.prompt[:2] == (2, 5)
        assert turn.prompt[-1] == 6
        assert turn.answer[-1] == 3
    sizes = {(len(turn.prompt), len(turn.answer)) for turn in turns}
    if lengths == "equal":
        assert sizes == {(12, 8)}
        said = "".join(tokenizer.decode(list(turn.answer[:-1])) for turn in turns)
        spoken = "".join(messages[1::2])
        assert said.replace(" ", "")[:60] == spoken.replace(" ", "")[:60]
    else:
        assert len(sizes) > 1
        assert max(prompt for prompt, _ in sizes) <= 12
        assert tokenizer.decode(list(turns[0].prompt[2:-1])) in messages[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"turns": 11}, "11 turns need 22"), ({"query_tokens": 0}, "query_tokens"), ({"lengths": "short"}, "lengths is")],
)
def test_turns_that_cannot_be_made_are_refused(changes: dict[str, Any], sentence: str) -> None:
    dialogues = load_dialogues(10, use_package=False)
    arguments: dict[str, Any] = {"turns": 10, "lengths": "equal", "query_tokens": 4, "answer_tokens": 4, **changes}
    with pytest.raises(ValueError, match=sentence):
        conversation_turns(dialogues.conversations[0][:20], dialogue_tokenizer(dialogues, 400), TOKENS, **arguments)


# arithmetic


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # What torch's counter leaves out on processors: scores and weighted sum, every pair of query and key.
    batch, heads, queries, width = query
    return 2 * 2 * int(batch) * int(heads) * int(queries) * int(key[2]) * int(width)


def counted(work: Callable[[], object]) -> int:
    names = ("_scaled_dot_product_flash_attention_for_cpu",)
    mapping = {getattr(torch.ops.aten, name): _attention_flops for name in names}
    # The counter knows torch's operations: natively, a layer is one of ours.
    with use_backend("reference"), FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


VARIANTS = [
    ("simple", {}),
    ("self", {"use_gate_for_self_attention": True}),
    ("interlayer", {}),
    ("gated-self-interlayer", {}),
    ("grouped-self-interlayer", {"num_groups": 2}),
    ("interlayer", {"residual_gate_type": "static"}),
    ("gated-self-interlayer", {"residual_gate_type": "elementwise", "residual_gate_slot_status_type": "linear"}),
    ("interlayer", {"use_gated_residual": False}),
]


@pytest.mark.parametrize(("variant", "changes"), VARIANTS)
def test_counted_memory_update_is_what_torch_counts(variant: str, changes: dict[str, Any]) -> None:
    decoder, encoder, memory_attention = tiny_configs()
    memory_attention = memory_attention.replace(**changes)
    model = RxTAlpha(decoder, encoder, memory_attention, TOKENS, variant).eval()
    costs = RxTCosts(decoder, encoder, model.memory_attention.config)
    ids = torch.randint(10, 60, (1, 9))
    seen = counted(lambda: model.memory_attention(model.encoder(ids), None, model.stm.memory))
    assert costs.memory_update(9) == seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_gated_attention": True},
        {"use_moe": False, "use_gated": False},
        {"num_shared_experts": 2, "shared_expert_dim": 16, "stateless_layers_config": ("dense", "moe")},
        {"att_query_groups": 2, "att_groups": 4, "cross_att_query_groups": 4, "cross_att_groups": 1},
    ],
)
def test_counted_answer_is_what_torch_counts(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    costs = RxTCosts(model.decoder.config, model.encoder.config, model.memory_attention.config)

    def answer() -> None:  # one token at a time, so that no causal mask hides pairs from the counter
        memory, cache = model.decoder.project_memory(), model.decoder.new_cache(1)
        for _ in range(7):
            model.decoder.logits(model.decoder.hidden_states(torch.tensor([[20]]), None, memory, cache).hidden)
            cache.advance(1)

    assert costs.answer(1, 7) == counted(answer)


def test_counted_stateless_answer_is_what_torch_counts() -> None:
    config = StatelessConfig.like(tiny_configs()[0])
    model = SparseQueryTransformer(config).eval()
    costs = StatelessCosts(config.transformer_config())
    cache = model.new_cache(1)
    with torch.no_grad():
        model(torch.randint(10, 60, (1, 11)), None, cache)
    cache.advance(11)

    def answer() -> None:
        for _ in range(5):
            model(torch.tensor([[20]]), None, cache)
            cache.advance(1)

    assert costs.answer(1, 11, 5) == counted(answer)
    assert costs.answer(12, 0, 5) > costs.answer(1, 11, 5)
    assert costs.key_value_bytes(16, 4) == cache.state_bytes()
    assert causal_pairs(16) == causal_pairs(5, 11) + causal_pairs(11)


def test_bytes_of_one_more_token() -> None:
    model = tiny_model()
    costs = RxTCosts(model.decoder.config, model.encoder.config, model.memory_attention.config)
    network = model.decoder.model
    idle = (6 - 2) * 3 * 24 * 32 * 2  # experts that one token does not use, in two layers
    projections = sum(
        layer.memory_cross_attention.k_proj.weight.numel() + layer.memory_cross_attention.v_proj.weight.numel()
        for layer, _ in network.layers_in_order()
    )
    matrices = sum(
        weight.numel()
        for name, weight in network.named_parameters()
        if weight.dim() > 1 and not name.endswith(("embedding.weight", ".b1", ".b2"))
    )
    memory = sum(part.numel() for layer in network.project_memory(model.stm.memory) for part in layer)
    assert costs.bytes_per_step(0, 4) == 4 * (matrices - idle - projections + memory)
    assert costs.memory_bytes(4) == 4 * model.stm.memory.numel()


# systems


@pytest.mark.parametrize("family", [RxTAlpha, RxTBeta])
def test_every_system_computes_what_it_should(family: type[RxTAlpha] | type[RxTBeta]) -> None:
    turns = turns_of(6)
    for system in systems.make_systems(tiny_model(family), seed=0):
        assert systems.check_system(system, turns) < 1e-5
        times = [system.turn(turn) for turn in turns]
        assert all(0 < one.first_token <= one.latency for one in times)
        assert all((one.memory_update > 0) == (system.name == "rxt") for one in times)


def test_stateless_systems_end_with_the_same_history_and_state() -> None:
    turns = turns_of(4)
    ours, reread, cached = systems.make_systems(tiny_model(), seed=0)
    for system in (ours, reread, cached):
        system.reset()
        for turn in turns:
            times = system.turn(turn)
    tokens = [token for turn in turns for token in (*turn.prompt, *turn.answer)]
    assert reread.conversation.history == cached.conversation.history == tokens
    assert times.state_bytes == 8 * len(tokens) + cached.costs.key_value_bytes(len(tokens) - 1, 4)
    assert ours.model.turns == 4


def test_what_is_timed_is_what_a_user_gets() -> None:
    """Forced to its own greedy answer, the timed path leaves the memory that interact leaves."""
    model = tiny_model()
    ours = systems.make_systems(model, seed=0)[0]
    ours.reset()
    prompt = turns_of(1)[0].prompt
    answer = list(model.interact(torch.tensor([prompt[:-1]]), temperature=0.0, max_seq_len=len(prompt) + 8))
    assert answer[-2:] == [-1, -2]
    memory = model.export_stm_state()
    ours.reset()
    ours.turn(Turn(prompt, tuple(answer[:-2])))
    assert torch.equal(model.export_stm_state(), memory)


def test_a_system_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = systems.make_systems(tiny_model(), seed=0)[2]
    cached.conversation.decode_engine = "modules"
    model = cached.conversation.model
    honest = model.hidden_states
    monkeypatch.setattr(  # a cache that forgets where it is
        model,
        "hidden_states",
        lambda ids, mask=None, cache=None: honest(ids, mask, None if cache is None else model.new_cache(1)),
    )
    with pytest.raises(RuntimeError, match="nothing is timed"):
        systems.check_system(cached, turns_of(2))


# the report, on costs that are known


@dataclasses.dataclass
class Known:
    """A system whose cost is a formula."""

    system: Any
    cost: Callable[[int], TurnTimes]

    @property
    def name(self) -> str:
        return str(self.system.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)


def known_results(turns: int = 64, repeats: int = 3) -> tuple[results.Results, Any]:
    model = tiny_model()
    made = systems.make_systems(model, seed=0)
    costs: list[Callable[[int], TurnTimes]] = [
        lambda n: TurnTimes(0.1, 1.0, 0.5, 1000),
        lambda n: TurnTimes(0.01 * n, 0.5 + 0.05 * n, 0.0, 8 * n),
        lambda n: TurnTimes(0.1, 0.9, 0.0, 100 * n),
    ]
    samples = {
        system.name: [[cost(n)] * repeats for n in range(1, turns + 1)]
        for system, cost in zip(made, costs, strict=True)
    }
    rows = scaling_report.make_rows(made, [turns_of(turns)] * repeats, samples, backend="reference")
    settings = dataclasses.asdict(scaling.Settings(turns=turns, repeats=repeats)) | {"dialogues": "none"}
    result = results.Results("scaling", settings, environment.describe_environment(), LIMITS, rows)
    result.summary = {
        "parameters": scaling_report.parameters(model, made[1].conversation.model),
        "decoding": {system.name: system.decoding() for system in made},
        **scaling_report.summarise(result, made),
    }
    return result, made


def test_report_finds_what_was_put_in() -> None:
    result, made = known_results()
    summary = result.summary
    exponents = {name: of["exponents"] for name, of in summary["systems"].items()}
    assert exponents["rxt"]["cost_per_turn"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert exponents["rxt"]["cumulative_cost"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert 0.7 < exponents["stateless-reread"]["latency_per_turn"]["value"] < 1.0
    turn = {(found["measure"], found["against"]): found["turn"] for found in summary["overtaking"]}
    assert turn["latency", "stateless-reread"] == 11
    assert turn["latency", "stateless-cached"] is None
    assert turn["first_token", "stateless-reread"] == 11
    assert turn["cumulative", "stateless-reread"] == 40  # 1.5 N < 0.5 N + 0.025 N (N + 1)
    assert turn["state_bytes", "stateless-cached"] == 11
    assert turn["state_bytes", "stateless-reread"] is None
    sentences = [found["sentence"] for found in summary["overtaking"]]
    assert sentences[2] == (
        "Waiting for the whole answer, RxT against the LLM that re-reads its history: ahead from turn 11 on; 3.52 times as "
        "fast over the last 8 turns (turn 1: 1.82 times as long)."
    )
    assert sentences[3] == (
        "Waiting for the whole answer, RxT against the LLM that keeps its KV cache: behind, not overtaking within 64 turns; "
        "1.11 times as long over the last 8 turns (turn 1: 1.11 times as long)."
    )
    report = scaling_report.text_report(result, made)
    for found in summary["overtaking"]:
        assert found["sentence"].partition(": ")[2][:-1] in report


def test_states_of_very_different_size_compare() -> None:
    _, made = known_results(turns=4, repeats=1)
    samples = {
        system.name: [[TurnTimes(0.1, 0.2, 0.0, size)] for _ in range(4)]
        for system, size in zip(made, (10**9, 8, 100), strict=True)
    }
    rows = scaling_report.make_rows(made, [turns_of(4)], samples, backend="reference")
    summary = scaling_report.summarise(results.Results("scaling", {}, {}, LIMITS, rows), made)
    assert [of["verdict"] for of in summary["overtaking"] if of["measure"] == "state_bytes"] == ["behind", "behind"]


@pytest.mark.parametrize(("noise", "verdict"), [(0.0, "behind"), (0.3, "level")])
def test_what_the_noise_hides_is_not_claimed(noise: float, verdict: str) -> None:
    _, made = known_results(turns=4, repeats=1)
    generator = torch.Generator().manual_seed(3)

    def times(base: float) -> TurnTimes:
        seconds = base * (1 + noise * float(torch.randn((), generator=generator).clamp(-2, 2)))
        return TurnTimes(seconds / 2, seconds, 0.0, 10)

    samples = {
        system.name: [[times(base) for _ in range(5)] for _ in range(64)]
        for system, base in zip(made, (1.0, 1.0, 0.98), strict=True)
    }
    rows = scaling_report.make_rows(made, [turns_of(64)] * 5, samples, backend="reference")
    summary = scaling_report.summarise(results.Results("scaling", {}, {}, LIMITS, rows), made)
    of = {(found["measure"], found["against"]): found for found in summary["overtaking"]}
    assert of["latency", "stateless-cached"]["verdict"] == verdict
    assert of["latency", "stateless-cached"]["turn"] is None


def test_steps_of_a_dialogue_are_ratios_to_the_first() -> None:
    result, _ = known_results(turns=9)
    found = result.summary["prompt_latency_by_step"]
    assert found.keys() == {"rxt", "stateless-reread", "stateless-cached"}
    for name, of in found.items():
        times = [row["samples"]["first_token"][0] for row in result.rows if row["name"] == name][:8]
        assert of["seconds"] == pytest.approx(times[0], abs=1e-9)
        assert of["p50"] == pytest.approx([time / times[0] for time in times], abs=1e-3)
    said = dialogue_steps.text_of_steps(found, scaling_report.TITLES)
    assert said[2].startswith("  RxT ")
    assert said[2].endswith("1.00"), "published: flat"
    assert said[3].endswith("2.44"), "published: 0.09 s to 0.22 s"
    assert known_results(turns=7)[0].summary["prompt_latency_by_step"] == {}


def test_report_of_a_few_turns_says_less() -> None:
    result, made = known_results(turns=5, repeats=1)
    assert result.summary["systems"]["rxt"]["exponents"] is None
    assert "N^b" not in scaling_report.text_report(result, made)


def test_samples_come_back_from_rows() -> None:
    result, made = known_results(turns=6, repeats=2)
    empty: scaling_report.Samples = {system.name: [[] for _ in range(6)] for system in made}
    samples, done = scaling_report.samples_of_rows(result.rows, empty)
    assert done == 2
    assert scaling_report.make_rows(made, [turns_of(6)] * 2, samples, backend="reference") == result.rows


def test_plots_are_two_png_files(tmp_path: Path) -> None:
    paths = plotting.plot_scaling(known_results()[0], tmp_path / "new" / "scaling.png")
    names = ["scaling.png", "scaling-dark.png", "scaling-steps.png", "scaling-steps-dark.png"]
    assert [path.name for path in paths] == names
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(names)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"ends in \.png"):
        plotting.plot_scaling(known_results()[0], tmp_path / "scaling.pdf")


# the whole command


@pytest.fixture(autouse=True)
def _threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A benchmark takes every core unless told otherwise; the next test must not."""
    before = torch.get_num_threads()
    monkeypatch.setattr(environment, "cores", lambda: before)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and limits that take no time; the conversations of this project."""
    monkeypatch.setattr(scaling, "build", lambda name: tiny_model(vocab_size=400))
    monkeypatch.setattr(scaling, "machine_limits", lambda _: dict(LIMITS))
    monkeypatch.setattr(scaling, "load_dialogues", lambda turns: load_dialogues(turns, use_package=False))


COMMAND = ["--turns", "9", "--repeats", "2", "--query-tokens", "4", "--answer-tokens", "3", "--threads", "1"]


def test_command_measures_saves_and_draws(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scaling.json"
    assert scaling.main([*COMMAND, "--json", str(path), "--plot", str(tmp_path / "scaling.png")]) == 0
    printed = capsys.readouterr().out
    assert "everything so far" in printed
    assert str(tmp_path / "scaling-dark.png") in printed
    found = results.read_results(path, name="scaling")
    assert found.complete
    assert len(found.rows) == 3 * 9
    last = found.rows[-1]
    assert (last["turn"], last["shape"]) == (9, {"batch": 1, "history": 8 * 11, "prompt": 7, "answer": 4})
    assert len(last["samples"]["latency"]) == 2
    assert plotting.main([str(path), "--plot", str(tmp_path / "again.png")]) == 0


def test_interrupted_run_is_saved_and_continued(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scaling.json"
    held = [0]
    honest = systems.RxTSystem.turn

    def interrupted(self: systems.RxTSystem, turn: Turn) -> TurnTimes:
        held[0] += 1
        if held[0] == 2 + 9 + 5:  # warm-up, the first conversation, and some of the second
            raise KeyboardInterrupt
        return honest(self, turn)

    monkeypatch.setattr(systems.RxTSystem, "turn", interrupted)
    assert scaling.main([*COMMAND, "--json", str(path)]) == 130
    assert "--resume continues it" in capsys.readouterr().out
    saved = results.read_results(path)
    assert not saved.complete
    assert len(saved.rows) == 3 * 9
    assert scaling.main([*COMMAND, "--json", str(path), "--resume"]) == 0
    continued = results.read_results(path)
    assert continued.complete
    assert continued.created == saved.created
    assert continued.rows[0]["samples"]["latency"][0] == saved.rows[0]["samples"]["latency"][0]
    assert {len(row["samples"]["latency"]) for row in continued.rows} == {2}
    assert held[0] == 16 + 2 + 9  # only the conversation that was missing

    assert scaling.main([*COMMAND, "--json", str(path), "--resume", "--seed", "1"]) == 2
    assert "seed = 0" in capsys.readouterr().err


def test_time_limit_reports_what_was_measured(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(scaling.time, "monotonic", lambda: float(next(clock)))
    path = tmp_path / "scaling.json"
    assert scaling.main([*COMMAND, "--json", str(path), "--time-limit", "6.5"]) == 0
    found = results.read_results(path)
    assert not found.complete
    assert found.summary["turns_measured"] == 6
    assert "conversation of 6 turns" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "sqat-m-sqa"], "model is 'sqat-m-sqa'"),
        (["--model", "rxt-beta-3b"], "num_shared_experts is 2"),
        (["--turns", "2"], "turns is 2"),
        (["--repeats", "0"], "repeats is 0"),
        (["--answer-tokens", "1"], "answer_tokens is 1"),
        (["--time-limit", "0"], "time limit is 0"),
        (["--threads", "9999"], "threads is 9999"),
        (["--resume"], "--json"),
        (["--tokenizer", "no/such/tokenizer.json"], "tokenizer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(
    quick: None, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert scaling.main(arguments) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert not printed.out


def test_every_benchmark_has_the_two_functions() -> None:
    for name in BENCHMARKS:
        module = __import__(f"rxt_benchmarks.{name}", fromlist=["run"])
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert callable(module.run)
        assert parser.parse_args([]) is not None
