"""Stand-alone script that runs the upstream library `rxlm` as a black box; it never imports our package.

    PYTHONPATH=DIR_OF_RXLM python upstream_worker.py

Requests come as lines of JSON on standard input, and each is answered with one line:

    {"do": "load", "path": DIRECTORY}                a full model that was saved in upstream's format; {}
    {"do": "prepare", "work": NAME, "threads": N, "inputs": FILE, "output": FILE}
                                                     what the work computes, written to be compared; {}
    {"do": "run"}                                    does it; {"seconds": [...]}

A request that fails is answered with {"error": SENTENCE}. Work is decode, prefill, update or train. What has to be worked
around was found by running upstream, and is explained in tests/upstream/oracle.py.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

BEGINNING, STEPS = 2, 20  # tokens per run of decode: those that are not counted, as in decode.py, and those that are
CHECKED = 4
LEARNING_RATE = 1e-6
LOAD_BALANCE = 0.01
MOST_TOKENS = 128  # of a stream; the next one begins after them
FINAL_TOKENS = (-1, -2)

Tensors = dict[str, torch.Tensor]


class Work:
    """One piece of work: what it computes, and doing it."""

    def __init__(self, model: Any, inputs: Tensors) -> None:
        self.model, self.ids, self.memory = model, inputs["tokens"], inputs["memory"]
        self.mask = torch.ones_like(self.ids, dtype=torch.bool)
        model.load_stm_state(self.memory.clone())

    def result(self) -> torch.Tensor:
        raise NotImplementedError

    def run(self) -> list[float]:
        raise NotImplementedError

    def _timed(self, work: Callable[[], object]) -> list[float]:
        start = time.perf_counter()
        work()
        return [time.perf_counter() - start]


class Prefill(Work):
    """From a message to the first token, by `interact`, which projects the memory and computes every logit."""

    def result(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model.decoder(self.ids, attention_mask=self.mask)[:, -1]

    def _start(self) -> Iterator[int]:
        ids = self.ids[:, :-1].clone()  # interact appends [A]
        return self.model.interact(
            ids, attention_mask=torch.ones_like(ids), top_k=1, max_seq_len=ids.shape[1] + MOST_TOKENS
        )

    def run(self) -> list[float]:
        # A stream that is dropped ends without updating the memory.
        return self._timed(lambda: next(self._start()))


class Decode(Prefill):
    """Tokens behind the first, by `interact` with its cache, greedily."""

    answer_token = 6  # of the presets

    def result(self) -> torch.Tensor:
        self._check_stream()
        with torch.no_grad():
            end = self.ids.shape[1]
            logits = self.model.decoder(self.ids, attention_mask=self.mask)
        return logits[:, end - CHECKED - 1 :].transpose(0, 1)

    def _check_stream(self) -> None:
        """The stream has to be what upstream itself computes without its cache."""
        stream = self._start()
        found = [next(stream) for _ in range(CHECKED)]
        ids = torch.cat([self.ids[:, :-1], torch.full((1, 1), self.answer_token)], dim=1)
        with torch.no_grad():
            for token in found:
                logits = self.model.decoder(ids, attention_mask=torch.ones_like(ids, dtype=torch.bool))
                if int(logits[0, -1].argmax()) != token:
                    raise RuntimeError("its stream differs from its own answer without a cache")
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        self._stream = self._start()
        next(self._stream)

    def run(self) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < BEGINNING + STEPS:
            start = time.perf_counter()
            token = next(self._stream, FINAL_TOKENS[0])
            if token in FINAL_TOKENS:
                self._stream = self._start()
                next(self._stream)
                continue
            seconds.append(time.perf_counter() - start)
        return seconds[BEGINNING:]


class Update(Work):
    """Encode an interaction and write it into memory."""

    def _write(self) -> torch.Tensor:
        with torch.no_grad():
            encoded = self.model.encoder(self.ids, attention_mask=self.mask)[1]
            self.model.memory_attention(encoded, attention_mask=self.mask)
        return self.model.export_stm_state()

    def result(self) -> torch.Tensor:
        return self._write().clone()

    def run(self) -> list[float]:
        self.model.load_stm_state(self.memory.clone())
        return self._timed(self._write)


class Train(Work):
    """A training step of the decoder."""

    def __init__(self, model: Any, inputs: Tensors) -> None:
        super().__init__(model, inputs)
        self.decoder = copy.deepcopy(model.decoder).train()  # steps change it
        for parameter in self.decoder.parameters():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=LEARNING_RATE, fused=True)

    def _backward(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.decoder(self.ids, attention_mask=self.mask)
        vocabulary = logits.shape[-1]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, vocabulary), self.ids[:, 1:].flatten())
        balance = self.decoder.model.moe_router_loss()
        if balance is not None:
            loss = loss + LOAD_BALANCE * balance
        loss.backward()
        return loss

    def result(self) -> torch.Tensor:
        """The loss, and the norm of every gradient in the order of the parameters' names."""
        loss = self._backward()
        norms = [
            torch.zeros(()) if parameter.grad is None else parameter.grad.norm()
            for _, parameter in sorted(self.decoder.named_parameters())
        ]
        return torch.stack([loss.detach(), *norms])

    def _step(self) -> None:
        self._backward()
        self.optimizer.step()

    def run(self) -> list[float]:
        return [self._timed(self._step)[0] for _ in range(3)][1:]  # the first is not counted, as in train.py


WORK: dict[str, type[Work]] = {"decode": Decode, "prefill": Prefill, "update": Update, "train": Train}


class Worker:
    """Keeps the model and the work in hand."""

    def __init__(self) -> None:
        self.model: Any = None
        self.work: Work | None = None

    def load(self, path: str) -> dict[str, Any]:
        family = importlib.import_module("rxlm.rxt.models").RxTAlpha
        self.model = family.from_pretrained(path).eval()
        self.model.share_components()
        inner = self.model.decoder.model
        if getattr(inner, "stateless_layers", ()) is None:
            inner.stateless_layers = torch.nn.ModuleList()
        return {}

    def prepare(self, work: str, threads: int, inputs: str, output: str) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.work = WORK[work](self.model, load_file(inputs))
        save_file({"result": self.work.result().detach().float().contiguous()}, output)
        return {}

    def run(self) -> dict[str, Any]:
        if self.work is None:
            raise RuntimeError("nothing was prepared")
        return {"seconds": self.work.run()}


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever the library prints is no answer
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as failure:  # the parent decides what to do about it
            answer = {"error": f"{type(failure).__name__}: {failure}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
