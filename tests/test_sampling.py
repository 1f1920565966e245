"""The sampler: exact distributions, ties, seeds, and what it refuses (spec 2.14; spec 7, defect 29)."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import refusal
from hypothesis import given
from hypothesis import strategies as st

from rxt_model.interaction.sampling import Sampler, SamplingOptions, most_likely, token_probabilities


def exact(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The distribution written out in plain Python."""
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    if top_k is not None:
        threshold = sorted(logits, reverse=True)[top_k - 1]
        weights = [w if value >= threshold else 0.0 for w, value in zip(weights, logits, strict=True)]
    total = sum(weights)
    probabilities = [w / total for w in weights]
    if top_p is not None:
        kept, passed = set(), 0.0
        for index in sorted(range(len(logits)), key=lambda i: (-probabilities[i], i)):
            if passed >= top_p:
                break
            kept.add(index)
            passed += probabilities[index]
        probabilities = [p if index in kept else 0.0 for index, p in enumerate(probabilities)]
        total = sum(probabilities)
        probabilities = [p / total for p in probabilities]
    return probabilities


@given(
    st.lists(st.integers(-60, 60), min_size=2, max_size=12, unique=True),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.none() | st.integers(1, 2),
    st.none() | st.sampled_from([0.11, 0.37, 0.73, 0.96]),
)
def test_probabilities_are_those_of_the_definition(
    logits: list[int], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    values = [value / 10 for value in logits]
    options = SamplingOptions(temperature, top_k, top_p)
    got = token_probabilities(torch.tensor([values, values]), options)
    torch.testing.assert_close(got[0], torch.tensor(exact(values, temperature, top_k, top_p)), atol=1e-5, rtol=1e-4)
    assert torch.equal(got[0], got[1])


def test_top_k_keeps_what_ties_with_the_last() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = token_probabilities(logits, SamplingOptions(top_k=2))[0] > 0
    assert kept.tolist() == [False, True, True, True, False]


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    probabilities = token_probabilities(logits, SamplingOptions(top_p=0.6))[0]
    torch.testing.assert_close(probabilities, torch.tensor([0.625, 0.375, 0.0, 0.0]))
    assert (token_probabilities(logits, SamplingOptions(top_p=1.0))[0] > 0).all()
    assert (token_probabilities(logits, SamplingOptions(top_p=1e-9))[0] > 0).tolist() == [True, False, False, False]


def test_top_k_comes_before_top_p() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    # Of the two that top_k leaves, the first alone has 4/7 > 0.5.
    assert (token_probabilities(logits, SamplingOptions(top_k=2, top_p=0.5))[0] > 0).tolist() == [True] + 3 * [False]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, None), (0.7, 5, None), (1.6, None, 0.8), (1.0, 6, 0.7)]
)
def test_draws_follow_the_distribution(temperature: float, top_k: int | None, top_p: float | None) -> None:
    values = [1.2, -0.3, 0.8, 0.1, -1.5, 0.9, 0.85, -0.2]
    draws = 20_000
    sampler = Sampler(SamplingOptions(temperature, top_k, top_p, seed=11), rows=draws)
    counts = torch.bincount(sampler(torch.tensor([values]).expand(draws, -1)), minlength=len(values)).double()
    expected = torch.tensor(exact(values, temperature, top_k, top_p), dtype=torch.double) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0, "a filtered token was drawn"
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    # Wilson-Hilferty: the cube root of chi-square over its freedom is close to normal; 4 sigma.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.0


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2**-53])
def test_no_uniform_number_draws_a_filtered_token(uniform: float) -> None:
    sampler = Sampler(SamplingOptions(top_k=1))
    sampler._uniform = lambda rows: torch.full((rows, 1), uniform, dtype=torch.float64)  # type: ignore[method-assign]
    for place in range(4):
        logits = torch.zeros(1, 4)
        logits[0, place] = 1.0
        assert sampler(logits).item() == place


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    sampler = Sampler(SamplingOptions(temperature=0.0, seed=1), rows=2)
    assert sampler(torch.tensor([[0.0, 2.0, 2.0], [5.0, -1.0, 0.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-40, 1e-300])
def test_tiny_temperatures_are_greedy_and_finite(temperature: float) -> None:
    probabilities = token_probabilities(torch.tensor([[80.0, 79.0, -200.0]]), SamplingOptions(temperature))
    assert probabilities.tolist() == [[1.0, 0.0, 0.0]]


def test_seeds_repeat_and_differ() -> None:
    logits = torch.zeros(3, 1000)

    def draw(seed: int | list[int] | None, rows: int = 3) -> list[int]:
        return Sampler(SamplingOptions(seed=seed), rows=rows)(logits[:rows]).tolist()

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_an_integer_seed_gives_row_b_the_seed_plus_b_and_a_row_draws_what_it_draws_alone() -> None:
    logits = torch.randn(3, 50)
    together = Sampler(SamplingOptions(seed=[40, 7, 41]), rows=3)
    alone = [Sampler(SamplingOptions(seed=seed)) for seed in (40, 7, 41)]
    shifted = Sampler(SamplingOptions(seed=40), rows=2)
    for _ in range(5):
        drawn = together(logits).tolist()
        assert drawn == [sampler(logits[row : row + 1]).item() for row, sampler in enumerate(alone)]
        assert shifted(torch.stack([logits[0], logits[2]])).tolist() == [drawn[0], drawn[2]]


def test_the_global_generator_is_left_alone_by_seeded_draws() -> None:
    before = torch.get_rng_state()
    Sampler(SamplingOptions(seed=3))(torch.zeros(1, 9))
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_logits_are_drawn_from_in_float32() -> None:
    logits = torch.randn(1, 300)
    got = token_probabilities(logits.bfloat16(), SamplingOptions(0.8))
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, token_probabilities(logits.bfloat16().float(), SamplingOptions(0.8)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with refusal(ValueError, "logits"):
        Sampler(SamplingOptions(temperature), rows=2)(logits)


def test_forbidden_tokens_are_no_error() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert Sampler(SamplingOptions(1.0))(logits).tolist() == [1]
    assert Sampler(SamplingOptions(0.0))(logits).tolist() == [1]
    with refusal(ValueError, "logits"):
        Sampler(SamplingOptions(1.0))(torch.full((1, 3), -math.inf))


def test_most_likely_of_some_tokens() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 3.0]])
    assert most_likely(logits, torch.tensor([2, 1])).tolist() == [2, 2]
    with refusal(ValueError, "logits"):
        most_likely(torch.tensor([[math.nan, 0.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_top_k_beyond_the_vocabulary_is_an_error(temperature: float) -> None:
    with refusal(ValueError, "top_k", "6", "5"):
        Sampler(SamplingOptions(temperature, top_k=6))(torch.zeros(1, 5))
    Sampler(SamplingOptions(temperature, top_k=5))(torch.zeros(1, 5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", 0),
        ("top_k", 2.0),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_p", "0.9"),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", "12"),
        ("seed", 2**63),
        ("seed", [1, None]),
        ("seed", True),
    ],
)
def test_options_out_of_range(name: str, value: object) -> None:
    with refusal(ValueError, name):
        SamplingOptions(**{name: value})  # type: ignore[arg-type]


def test_one_seed_per_row() -> None:
    with refusal(ValueError, "seed", "2", "3"):
        Sampler(SamplingOptions(seed=[1, 2]), rows=3)


@pytest.mark.parametrize(("top_p", "kept"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.99, 4)])
def test_top_p_stops_where_it_is_reached(top_p: float, kept: int) -> None:
    probabilities = token_probabilities(torch.zeros(1, 4), SamplingOptions(top_p=top_p))
    assert (probabilities > 0).sum() == kept
