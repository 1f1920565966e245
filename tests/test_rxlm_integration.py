"""The drop-in: models of the upstream library, computed here, against what they compute themselves.

`tests/upstream/drop_in.py` asks both, in one process per version of upstream; here is what is expected of the answers.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from rxt_kernels import native_runtime
from rxt_kernels.integrations.rxlm import NothingAcceleratedError, accelerate, restore
from tests.helpers import alpha
from tests.upstream.cases import COMPONENT, DIM, ENCODER, MOE, VERSIONS, Case, cases, part
from tests.upstream.install import REPOSITORY, upstream_directory
from tests.upstream.runner import why_absent

SCRIPT = pathlib.Path(__file__).parent / "upstream" / "drop_in.py"
TOLERANCE = 1e-5
BY_NAME = {version: {case["name"]: case for case in cases(version)} for version in VERSIONS}

upstream = pytest.mark.upstream
pytestmark = pytest.mark.timeout(900)  # the first test of a version waits for the script, on a busy machine for long

FULL = "alpha-gated-linear-moe"
BETA = "beta-3b-shape"

#: One of every kind of structure; the rest of the table differs in sizes or is compared by the checkpoint tests.
COMMON = [
    *(
        f"alpha-{name}"
        for name in ("gated-linear-moe", "elementwise-dense", "static-tanh", "ungated", "reversed-heads")
    ),
    *("alpha-ungated-interlayer", "alpha-interlayer", "beta-elementwise", "alpha-norm-rms"),
    *(f"decoder-{name}" for name in ("sqa", "gqa-mqa", "relu-plain", "gelu-gated", "layer-norm", "head-norm")),
    *("encoder-plain", "encoder-with-cross-attention", "encoder-moe", "mlm-head"),
    *("gate-elementwise-tanh-per-slot-linear", "gate-replace", "variant-self-both-gated"),
    *("variant-gated-self-interlayer-none", "norm-adaptive-self", "norm-positional-per-dim-simple", "norm-layer-self"),
    *("llm-sqa", "llm-moe", "llm-moe-2-shared", "llm-moe-dense-first", "llm-tied", "llm-head-norm"),
]
ONLY: dict[str, list[str]] = {
    "0.2.31": ["alpha-encoder-reads-memory", "decoder-moe", "decoder-moe-relu-plain"],
    "0.3.92": [
        *("beta-3b-shape", "alpha-grouped", "alpha-per-expert-moe", "alpha-kept-encoder-memory"),
        *("decoder-nope", "decoder-rope-base", "decoder-gated-reversed", "decoder-gated-silu", "decoder-stateless-moe"),
        *("decoder-moe-local-1-shared-global", "decoder-moe-global-2-shared-off-weighted", "decoder-moe-per-expert-2-shared"),
        *("variant-grouped-4-layers-2-groups-linear", "llm-gated", "llm-moe-local", "llm-moe-per-expert"),
    ],
}  # fmt: skip


def _long(version: str) -> Case:
    """A decoder that is long enough for bfloat16 to be coarse about positions."""
    return part("long", "decoder", "RxTDecoder", {**COMPONENT, "seq_len": 400})


def _requests(version: str) -> list[dict[str, Any]]:
    known = BY_NAME[version]

    def request(check: str, case: Case, **options: Any) -> dict[str, Any]:
        label = "-".join([check, case["name"], *(str(value) for value in options.values())])
        return {"name": label, "check": check, "case": case, **options}

    found = [request("parity", known[name], parity="upstream") for name in [*COMMON, *ONLY[version]]]
    found += [request("parity", known[name], parity="exact") for name in _exactly(version)]
    found += [
        request("training", known[name], parity=parity)
        for name in _trained(version)
        for parity in ("exact", "upstream")
    ]
    found += [request("padding", known[name]) for name in _padded(version)]
    found += [request("half_precision", _long(version), autocast=autocast) for autocast in (False, True)]
    full = known[FULL]
    found += [
        request(check, full)
        for check in ("restoring", "copying", "saving", "exchanging", "refusing", "calling")
    ]  # fmt: skip
    found += [request("restoring", known["decoder-sqa"]), request("inside", known["decoder-sqa"])]
    parts = {
        "decoder": "decoder-sqa",
        "encoder": "encoder-plain",
        "memory": "variant-simple-linear",
        "head": "mlm-head",
    }
    found += [{"name": "trainers", "check": "trainers", **{part: known[name] for part, name in parts.items()}}]
    found += [request("lying", known["decoder-sqa"])]
    dropped = part("dropout", "decoder", "RxTDecoder", {**COMPONENT, "ff_dropout": 0.5, "att_dropout": 0.3})
    found += [request("dropping", dropped)]
    found += [request("interaction", case) for case in known.values() if case.get("interaction")]
    found += [request("crashing", known[name]) for name in _talking(version)]
    if version == "0.3.92":
        flash = part("flash", "encoder", "RxTEncoder", ENCODER)
        found += [request("dilution", flash), *(request("generating", known[n]) for n in ("llm-sqa", "llm-moe-local"))]
    return found


def _exactly(version: str) -> list[str]:
    return [FULL, "llm-moe", *(["decoder-stateless-moe", BETA] if version == "0.3.92" else [])]


def _trained(version: str) -> list[str]:
    return [FULL, "alpha-static-tanh", *([BETA] if version == "0.3.92" else [])]


def _padded(version: str) -> list[str]:
    experts = "decoder-moe" if version == "0.2.31" else "decoder-stateless-moe"
    return [experts, "decoder-more-queries", "encoder-moe", "llm-moe"]


def _talking(version: str) -> list[str]:
    return [FULL, *([BETA] if version == "0.3.92" else [])]


class Answers:
    """What the script answered, one run per version, when first needed."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, version: str, name: str) -> dict[str, Any]:
        """The answer to one request; a failure in the script is a failure here."""
        if version not in self._known:
            self._known[version] = self._run(version)
        answer: dict[str, Any] = self._known[version][name]
        assert "failed" not in answer, answer["failed"]
        return answer

    def _run(self, version: str) -> dict[str, Any]:
        requests, answers = (self._directory / f"{version}-{kind}.json" for kind in ("requests", "answers"))
        requests.write_text(json.dumps(_requests(version)))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str((upstream_directory() / version).resolve()), str(REPOSITORY)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(SCRIPT), str(requests), str(answers)]
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=850, check=False, cwd=self._directory
        )
        assert process.returncode == 0, process.stderr[-3000:]
        found: dict[str, Any] = json.loads(answers.read_text())
        return found


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("drop_in"))


def _for_versions(*values: Any) -> Any:
    """Parameters (version, *value) with the reason to skip where a version is absent."""
    found = []
    for version in VERSIONS:
        reason = why_absent(version)
        mark = pytest.mark.skipif(reason is not None, reason=reason or "present")
        for value in values:
            for entry in value(version) if callable(value) else [value]:
                found.append(pytest.param(version, entry, id=f"{version}-{entry}", marks=[mark, upstream]))
    return found


# parity


def _parities(version: str) -> list[str]:
    return [
        *(f"{name}-upstream" for name in [*COMMON, *ONLY[version]]),
        *(f"{name}-exact" for name in _exactly(version)),
    ]


@pytest.mark.parametrize(("version", "name"), _for_versions(_parities))
def test_an_accelerated_model_computes_what_it_computed(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"parity-{name}")
    assert answer["worst"] <= TOLERANCE
    assert answer["skipped"] == []
    assert answer["same_keys"]
    assert answer["same_parameters"]
    assert all(found is None or found <= TOLERANCE for found in answer["differences"])


def _trainings(version: str) -> list[str]:
    return [f"{name}-{parity}" for name in _trained(version) for parity in ("exact", "upstream")]


@pytest.mark.parametrize(("version", "name"), _for_versions(_trainings))
def test_training_steps_have_the_same_losses(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"training-{name}")
    expected, found = answer["losses"]
    if name in (f"{BETA}-exact", f"{FULL}-exact"):
        # Routers also see padded positions, whose states differ; times 0.01, it moves every step a little.
        assert found == pytest.approx(expected, rel=1e-2)
        return
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert answer["gradients"] <= 1e-4  # of the last of four steps


@pytest.mark.parametrize(("version", "autocast"), _for_versions(False, True))
def test_parity_with_upstream_rounds_angles_as_upstream_does(answers: Answers, version: str, autocast: bool) -> None:
    answer = answers.of(version, f"half_precision-long-{autocast}")
    assert answer["upstream"] < 0.03
    assert answer["exact"] > 5 * answer["upstream"]


@pytest.mark.parametrize(("version", "name"), _for_versions(lambda v: ["flash"] if v == "0.3.92" else []))
def test_parity_with_upstream_dilutes_padding_as_flash_attention_does(
    answers: Answers, version: str, name: str
) -> None:
    answer = answers.of(version, f"dilution-{name}")
    assert answer["flash_differs"] > 1e-2, "the comparison would show nothing"
    assert answer["upstream"] <= TOLERANCE
    assert answer["exact"] <= TOLERANCE


@pytest.mark.parametrize(("version", "name"), _for_versions(_padded))
def test_padding_is_upstream_s_where_that_is_asked_for(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"padding-{name}")
    assert answer["exact-right-real"] <= TOLERANCE
    if not name.startswith("encoder"):
        assert answer.pop("exact-left-real") > 1e-2, "the comparison would show nothing"
    assert max(value for key, value in answer.items() if key.startswith("upstream")) <= TOLERANCE, answer


# what stays as it was


@pytest.mark.parametrize(("version", "name"), _for_versions(FULL, "decoder-sqa"))
def test_restoring_leaves_nothing_behind(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"restoring-{name}")
    assert answer["bitwise"]
    assert answer["clean"]
    assert answer["other_instance"], "another instance of the class was changed"
    assert "accelerated already; call restore(model)" in answer["accelerated_twice"]
    assert "nothing to restore" in answer["restored_twice"]


@pytest.mark.parametrize(("version", "name"), _for_versions(FULL))
def test_a_deep_copy_is_accelerated_on_its_own_parameters(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"copying-{name}")
    assert answer.pop("changed") > 1e-3
    assert answer.pop("computes") <= TOLERANCE
    assert all(answer.values()), answer


@pytest.mark.parametrize(("version", "name"), _for_versions(FULL))
def test_an_accelerated_model_saves_the_same_files(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"saving-{name}")
    assert answer["same_files"]
    assert answer["reloaded"] <= TOLERANCE


@pytest.mark.parametrize(("version", "name"), _for_versions(FULL))
def test_what_is_exchanged_later_is_seen(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"exchanging-{name}")
    assert answer.pop("hook_called")
    assert not answer.pop("hook_called_again")
    assert max(answer.values()) <= TOLERANCE, answer


@pytest.mark.parametrize(("version", "name"), _for_versions("dropout"))
def test_dropout_follows_train_and_eval(answers: Answers, version: str, name: str) -> None:
    assert answers.of(version, f"dropping-{name}") == {"eval_repeats": True, "train_repeats": False}


@pytest.mark.parametrize(("version", "name"), _for_versions("decoder-sqa"))
def test_a_model_that_computes_something_else_is_left_alone(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"lying-{name}")
    assert "it computes something else than this package" in answer["message"]
    assert answer["clean"]


@pytest.mark.parametrize(("version", "name"), _for_versions(FULL))
def test_reasons_are_sentences(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"refusing-{name}")
    assert answer["unknown_parity"] == "ValueError: parity is 'fast'; accepted are 'exact', 'upstream'."
    assert "its configuration is not here but with the model it is a part of" in answer["part"]
    decoder, talking = answer["partly"]
    assert "its method forward was replaced by something else" in decoder
    assert "its decoder was not replaced, and all of them are needed to answer" in talking


@pytest.mark.parametrize(("version", "name"), _for_versions("decoder-sqa"))
def test_components_inside_of_another_module_are_found(answers: Answers, version: str, name: str) -> None:
    assert answers.of(version, f"inside-{name}")["replaced"] == ["first.model", "second.model"]


@pytest.mark.parametrize(("version", "name"), _for_versions(FULL))
def test_every_call_that_upstream_makes_of_its_components_is_answered(
    answers: Answers, version: str, name: str
) -> None:
    answer = answers.of(version, f"calling-{name}")
    assert answer.pop("cached") == 0.0, "steps over upstream's cache are upstream's own"
    assert answer.pop("stored is accelerated")
    assert max(answer.values()) <= TOLERANCE, answer


@pytest.mark.parametrize(("version", "name"), _for_versions("trainers"))
def test_upstream_s_training_models_are_accelerated_as_a_whole(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, name)
    assert (answer["joint replaced"], answer["memory_aware replaced"]) == (3, 3)
    assert answer["joint"] <= TOLERANCE
    assert answer["memory_aware"] <= TOLERANCE


# answers


@pytest.mark.parametrize(
    ("version", "name"), _for_versions(lambda v: [name for name, case in BY_NAME[v].items() if case.get("interaction")])
)
def test_conversations_are_upstream_s(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"interaction-{name}")
    assert answer["worst"] <= TOLERANCE
    assert (
        any("decoded by the native engine" in entry for entry in answer["replaced"]) or not native_runtime.available()
    )


@pytest.mark.parametrize(("version", "name"), _for_versions(_talking))
def test_conversations_work_where_upstream_s_crash(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"crashing-{name}")
    assert set(answer["upstream"].values()).isdisjoint({"works"}), "upstream works; the test shows nothing"
    assert answer["gradients_enabled"]
    assert answer["sentinels"] == [-1, -2]
    assert answer["input_kept"]
    assert answer["memory_moved"] > 1e-3
    assert answer["written_when_stopped"] > 1e-3
    assert not answer["memory_has_graph"]
    assert not answer["initialised_has_graph"]
    assert answer["batch"] == [[3], [-1] * 3, [-2] * 3]
    assert answer["interactions"] == [[3, 24], [3, 24]]
    assert "call share_components() or init_model() first" in answer["before_sharing"]
    if answer["signature"]:
        assert answer["auto_opens"]
        assert answer["auto_goes_on"] > 2


@pytest.mark.parametrize(
    ("version", "name"), _for_versions(lambda v: ["llm-sqa", "llm-moe-local"] if v == "0.3.92" else [])
)
def test_stateless_models_generate_the_same_with_a_cache(answers: Answers, version: str, name: str) -> None:
    answer = answers.of(version, f"generating-{name}")
    assert not answer.pop("upstream_cached"), "upstream's cache is right; say so where this is documented"
    assert all(answer.values()), answer


# without upstream


def test_foreign_models_are_refused() -> None:
    with pytest.raises(
        NothingAcceleratedError, match="model is a Linear of torch; nothing in it is a component of rxlm"
    ):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(NothingAcceleratedError, match="RxTAlpha of this package, which is fast as it is"):
        accelerate(alpha())
    with pytest.raises(TypeError, match="model is a dict; it must be a torch module of the library rxlm"):
        accelerate({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing in this Linear is accelerated"):
        restore(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be a torch module that was accelerated"):
        restore(None)  # type: ignore[arg-type]


def _fake(name: str, **methods: Any) -> type[nn.Module]:
    """A class that calls itself one of upstream's."""
    cls = type(name, (nn.Module,), {"forward": lambda self, x: x, "moe_router_loss": lambda self: None, **methods})
    cls.__module__ = "rxlm.transformers.models"
    return cls


def test_classes_that_only_have_a_familiar_name_are_refused_with_every_reason() -> None:
    network = _fake("ReactiveTransformerDecoder")()
    network.embedding = nn.Embedding(5, DIM)
    holder = nn.Module()
    holder.model = network
    with pytest.raises(NothingAcceleratedError, match="its configuration is not here") as refused:
        accelerate(holder)
    assert "model (ReactiveTransformerDecoder)" in str(refused.value)
    holder._hub_mixin_config = {**COMPONENT, **MOE}
    with pytest.raises(NothingAcceleratedError, match=r"its shape .* means vocab_size = 5, but"):
        accelerate(holder)


def test_a_subclass_with_a_forward_pass_of_its_own_is_refused() -> None:
    base = _fake("ReactiveTransformerEncoder")
    child = type("Mine", (base,), {"forward": lambda self, x: x + 1})
    holder = nn.Module()
    holder.model = child()
    holder._hub_mixin_config = dict(ENCODER)
    with pytest.raises(NothingAcceleratedError, match="its class Mine has a method forward of its own"):
        accelerate(holder)


def test_a_report_reads_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """A head is simple enough to be faked whole: the same forward pass in a class that calls itself upstream's."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.decoder(self.layer_norm(nn.functional.gelu(self.dense(hidden_states))))
        return logits

    head: Any = _fake("MLMHead", forward=forward)()
    head.dense, head.layer_norm, head.decoder = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11)
    head._hub_mixin_config = {"embed_dim": 8, "vocab_size": 11}
    hidden = torch.randn(2, 3, 8)
    expected = head(hidden)
    report = accelerate(head)
    assert capsys.readouterr().out == f"{report}\n"
    assert str(report).startswith(
        "MLMHead, parity with the paper ('exact')\n  replaced  MLMHead: dense layer, norm and"
    )
    torch.testing.assert_close(head(hidden), expected)
    assert "forward" in vars(head)
    restore(head)
    assert "forward" not in vars(head)
    assert torch.equal(head(hidden), expected)
