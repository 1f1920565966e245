"""The upstream library as one of the systems: a black box in a process of its own, asked for one piece of work at a time.

It has to lie in ``$RXT_UPSTREAM_DIR`` or ``.upstream`` beside this package, one directory per version, where
``make upstream`` puts it. The model is saved in its format once, in the rotary layout of the version, and loaded there.
"""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rxt_model.checkpoint.convert import convert_experts
from rxt_model.models import RxTAlpha

from .contenders import Models
from .measuring import Absent, System, Task
from .worker import Worker

__all__ = ["VERSIONS", "upstream_systems"]

VERSIONS = {"0.2.31": "split", "0.3.92": "interleaved"}
"""Version to the layout in which it writes rotated pairs."""
STACKED = " stacked"
"""Behind a version: its experts as one tensor, which is how it decodes fastest."""

WORKER = Path(__file__).with_name("upstream_worker.py")
_PAUSE = 0.01  # seconds that a thread pool of this process goes on spinning for


def _directory() -> Path:
    return Path(os.environ.get("RXT_UPSTREAM_DIR") or Path(__file__).resolve().parents[1] / ".upstream")


class _Upstream(Worker):
    """One version of upstream in a process of its own, with one model loaded."""

    def __init__(self, variant: str, models: Models) -> None:
        version = variant.removesuffix(STACKED)
        path = _directory() / version
        if not (path / "rxlm" / "__init__.py").is_file():
            raise Absent(f"rxlm {version} is not installed beside this package; `make upstream` does that.")
        files = tempfile.TemporaryDirectory()
        self.directory = Path(files.name)
        _save(models, self.directory / "model", VERSIONS[version], stacked=variant.endswith(STACKED))
        super().__init__("upstream", WORKER, path, environment={"HF_HUB_OFFLINE": "1"}, at_end=files.cleanup)
        self.ask(do="load", path=str(self.directory / "model"))


def _save(models: Models, directory: Path, layout: Any, *, stacked: bool) -> None:
    """The model as an RxT-Alpha, which has the same parts and needs no token ids that the presets do not have."""
    full = models.full
    parts = {name: getattr(full, name).config for name in ("decoder", "encoder", "memory_attention")}
    if stacked:
        parts["decoder"] = parts["decoder"].replace(use_vectorized_moe=True)
    with torch.device("meta"):
        alpha = RxTAlpha(
            **{f"{name}_config": config for name, config in parts.items()},
            tokenizer_config=full.token_ids,
            memory_attention_variant=parts["memory_attention"].variant,
        )
    tensors = full.state_dict()
    alpha.load_state_dict(convert_experts(tensors, to="stacked") if stacked else tensors, assign=True)
    alpha.share_components()
    alpha.save_pretrained(directory, rope_layout=layout)


_workers: weakref.WeakKeyDictionary[Models, dict[str, _Upstream]] = weakref.WeakKeyDictionary()


def _worker(variant: str, models: Models) -> _Upstream:
    own = _workers.setdefault(models, {})
    if variant not in own:
        own[variant] = _Upstream(variant, models)
    return own[variant]


def _task(variant: str, models: Models, work: str, tokens: Tensor, memory: Tensor, expected: Tensor | None) -> Task:
    worker = _worker(variant, models)
    inputs, output = worker.directory / "inputs.safetensors", worker.directory / "output.safetensors"
    save_file({"tokens": tokens.contiguous(), "memory": memory.contiguous()}, inputs)
    worker.ask(do="prepare", work=work, threads=torch.get_num_threads(), inputs=str(inputs), output=str(output))
    result = load_file(output)["result"]

    def run() -> Sequence[float]:
        time.sleep(_PAUSE)
        seconds: list[float] = worker.ask(do="run")["seconds"]
        return seconds

    return Task(lambda: result, run, expected=expected)


def upstream_systems(
    models: Models, work: str, tokens: Tensor, memory: Tensor, *, expected: Tensor | None = None
) -> list[System]:
    """One system per version that can do this work.

    Args:
        models: whose weights it gets.
        work: decode, prefill, update or train.
        tokens: (B, T); of decode the message and the tokens that are compared.
        memory: (L, 1, S, D).
        expected: what its result is compared with, if it is not the whole one.
    """
    variants = list(VERSIONS)
    if work == "decode":
        variants.remove(
            "0.2.31"
        )  # steps over its cache are at the wrong position, so what they compute is not the same
        if not models.full.decoder.config.use_vectorized_moe:
            variants.append("0.3.92" + STACKED)
    return [
        System(f"upstream {variant}", "float32", partial(_task, variant, models, work, tokens, memory, expected))
        for variant in variants
    ]
