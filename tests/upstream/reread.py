"""The other direction: what upstream makes of directories that we have saved."""

from __future__ import annotations

import pathlib
from typing import Any

from tests.upstream import ours
from tests.upstream.cases import VERSIONS, Case, cases, full_cases
from tests.upstream.oracle import Tensors, make_inputs, write
from tests.upstream.runner import Answer, UpstreamRuns, read_answer, run_oracle, why_absent

#: Models of one version that the other can express. 0.3.92 skips cross-attention in encoders, cannot build the
#: interlayer variant, and needs more token ids for RxT-Beta; 0.2.31 knows nothing that came later.
CONVERTIBLE = {
    "0.2.31": [
        "alpha-gated-linear-moe", "alpha-elementwise-dense", "alpha-static-tanh", "alpha-ungated", "alpha-reversed-heads",
        "alpha-norm-rms",
    ],
    "0.3.92": ["alpha-elementwise-dense", "alpha-static-tanh", "alpha-ungated", "alpha-per-expert-moe"],
}  # fmt: skip


def other(version: str) -> str:
    """The other one of the two versions."""
    return next(each for each in VERSIONS if each != version)


class Reread:
    """Saves models of three origins for one version of upstream, and asks it about all of them in one process.

    * `again`: saved by upstream, loaded and saved by us;
    * `made`: made by our classes from a configuration;
    * `converted`: saved by the other version of upstream, loaded by us and saved in this version's rotary layout.
    """

    def __init__(self, upstream: UpstreamRuns, directory: pathlib.Path, refused: dict[str, set[str]]) -> None:
        self._upstream = upstream
        self._directory = directory
        self._refused = refused
        self._requests: list[dict[str, Any]] = []
        self._finished: set[str] = set()
        self._errors: dict[str, Exception] = {}
        self._ours: dict[str, Tensors] = {}
        self._cases: dict[str, Case] = {}

    def answer(self, version: str, origin: str, name: str) -> Answer:
        """What upstream `version` answers to our directory.

        Raises:
            Exception: whatever stopped us from saving it.
            RuntimeError: upstream failed on it, with its own message.
        """
        if version not in self._finished:
            self._finished.add(version)
            self._save_all(version)
            run_oracle(version, self._requests, self._directory / version)
            self._requests = []
        key = f"{version}/{origin}/{name}"
        if key in self._errors:
            raise self._errors[key]
        return read_answer(self._cases[key], self._directory / version, f"{origin}/{name}")

    def ours(self, version: str, name: str) -> Tensors:
        """What our own model answered, for a `made` one."""
        return self._ours[f"{version}/made/{name}"]

    def _save_all(self, version: str) -> None:
        for case in cases(version):
            if case["name"] not in self._refused[version]:
                self._save(version, "again", case)
        for case in full_cases(version):
            self._save(version, "made", case)
        source = other(version)
        if why_absent(source) is None:
            for case in full_cases(source):
                if case["name"] in CONVERTIBLE[source]:
                    self._save(version, "converted", case)

    def _save(self, version: str, origin: str, case: Case) -> None:
        key = f"{version}/{origin}/{case['name']}"
        target = self._directory / key
        self._cases[key] = case
        try:
            inputs = getattr(self, f"_save_{origin}")(version, case, target / "model", key)
        except Exception as error:  # of one model; the others are asked about nevertheless
            self._errors[key] = error
            return
        request = {name: case[name] for name in ("kind", "class")}
        request.update(name=f"{origin}/{case['name']}", task="load", path=str(target / "model"), inputs=str(inputs))
        self._requests.append(request)

    def _save_again(self, version: str, case: Case, target: pathlib.Path, key: str) -> pathlib.Path:
        answer = self._upstream.answer(version, case["name"])
        ours.load_answer(version, answer, keep=True).save_pretrained(str(target))
        return answer.directory / "tensors.safetensors"

    def _save_made(self, version: str, case: Case, target: pathlib.Path, key: str) -> pathlib.Path:
        model = ours.make(version, case)
        model.save_pretrained(str(target))
        inputs = make_inputs(case)
        self._ours[key] = ours.evaluate(case, model, inputs)
        target.parent.joinpath("inputs").mkdir()
        write(target.parent / "inputs", inputs, {})
        return target.parent / "inputs" / "tensors.safetensors"

    def _save_converted(self, version: str, case: Case, target: pathlib.Path, key: str) -> pathlib.Path:
        source = other(version)
        answer = self._upstream.answer(source, case["name"])
        ours.load_answer(source, answer).save_pretrained(str(target), rope_layout=ours.LAYOUT[version])
        return answer.directory / "tensors.safetensors"
