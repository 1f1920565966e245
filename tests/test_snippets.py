"""The usage snippets of two published model cards run with their imports and model paths changed, and nothing else."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import alpha, beta, favour_end, tokenizer

from rxt_model import RxTAlpha, RxTBeta

# The card of RxT-Beta-Micro-Supervised. (Its source reached this project as one line; breaks and indentation are restored.)
BETA_SNIPPET = """
import torch
from rxlm.rxt.models import RxTBeta
from rxlm.training.tokenizer import load_tokenizer_from_hf_hub

tokenizer = load_tokenizer_from_hf_hub('ReactiveAI/RxT-Beta-Micro')

model = RxTBeta.from_pretrained('ReactiveAI/RxT-Beta-Micro-Supervised', tokenizer=tokenizer)
model.share_components() # currently required to connect embeddings/STM

device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
model.to(device)

seq_len = 1024

# Memory init - could be used as "system prompt" in LLMs (not recommended in this model, as it wasn't trained with system prompts)
stm_init_state = model.tokenize_full_interaction('System prompt like', 'Initial memory for the model', max_seq_len=seq_len, device=device)
model.init_stm_state(**stm_init_state)

# Helper function
def interaction(query: str):
    tokenized_query = model.tokenize_query(query, max_seq_len=seq_len, device=device)
    for token_id in model.interact(**tokenized_query, max_seq_len=seq_len, temperature=1.0):
        if token_id == -1: print('\\n', '[Start memory update...]')
        elif token_id == -2: print('[Memory updated]')
        else:
            txt_token = model.stringify_token(token_id)
            print(txt_token, end='')

# Process first interaction
interaction('Hello! Who are you?')
# Process follow-up interaction
interaction('Follow-up question?')
"""  # noqa: E501

# The card of RxT-Alpha-Micro-Plus.
ALPHA_SNIPPET = """
from rxnn.rxt.models import RxTAlpha
from rxnn.training.tokenizer import load_tokenizer_from_hf_hub

tokenizer = load_tokenizer_from_hf_hub('ReactiveAI/RxT-Alpha-Micro-Plus')

model = RxTAlpha.from_pretrained('ReactiveAI/RxT-Alpha-Micro-Plus', tokenizer=tokenizer)
model.share_components() # currently required to connect embeddings/STM

seq_len = 256

# Memory init - could be used as "system prompt" in LLMs
stm_init_state = model.tokenize_full_interaction('System prompt like', 'Initial memory for the model', max_seq_len=seq_len)
model.init_stm_state(**stm_init_state)

# Helper function
def interaction(query: str):
    tokenized_query = model.tokenize_query(query, max_seq_len=seq_len)
    for token_id in model.interact(**tokenized_query, max_seq_len=seq_len, temperature=1.0):
        if token_id == -1: print('\\n', '[Start memory update...]')
        elif token_id == -2: print('[Memory updated]')
        else:
            txt_token = model.stringify_token(token_id)
            print(txt_token, end='')

# Process first interaction
interaction('Tell me a story about...')
# Process follow-up interaction
interaction('What was that story about?')

# Model could also work and stream in batch mode
model.set_batch_mode(True, batch_size=4)

def batch_interaction(queries: list[str]):
    tokenized_queries = model.tokenize_batch(queries, max_seq_len=seq_len)
    for token_ids in model.batch_interact(**tokenized_queries, max_seq_len=seq_len, temperature=1.0):
        txt_tokens = model.stringify_tokens(token_ids)
        print(txt_tokens) # do something with tokens array

# Process first batch of interactions
batch_interaction(['First query...', 'Second query...', 'Third query...', 'Fourth query...'])
# Process batch of follow-up interactions
batch_interaction(['Next first query...', 'Next second query...', 'Next third query...', 'Next fourth query...'])
"""

UPSTREAM_IMPORT = re.compile(r"^from rx(?:lm|nn)\.[\w.]+ import (\w+)$", re.MULTILINE)
UPSTREAM_PATH = re.compile(r"'ReactiveAI/[\w-]+'")


def run(snippet: str, directory: Path) -> tuple[dict[str, Any], str]:
    """The snippet's names and what it printed."""
    changed, imports = UPSTREAM_IMPORT.subn(r"from rxt_model import \1", snippet)
    changed, paths = UPSTREAM_PATH.subn(repr(str(directory)), changed)
    assert (imports, paths) == (2, 2)
    kept = [line for line in snippet.splitlines() if "import" not in line and "ReactiveAI" not in line]
    assert all(line in changed.splitlines() for line in kept), "only imports and paths may change"
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(changed, "snippet", "exec"), names)
    return names, printed.getvalue()


def saved(model: RxTAlpha | RxTBeta, directory: Path) -> Path:
    favour_end(model, 2.5)
    model.save_pretrained(directory)
    tokenizer().save(directory)
    return directory


def test_rxt_beta_card(tmp_path: Path) -> None:
    original = beta()
    names, printed = run(BETA_SNIPPET, saved(original, tmp_path))
    model = names["model"]
    assert type(model) is RxTBeta
    assert printed.count("[Start memory update...]") == printed.count("[Memory updated]") == 2
    assert model.turns == 2
    assert model.stm.memory.grad_fn is None
    assert torch.is_grad_enabled()
    torch.testing.assert_close(model.decoder.model.head.weight.cpu(), original.decoder.model.head.weight)


def test_rxt_alpha_card_with_batches(tmp_path: Path) -> None:
    names, printed = run(ALPHA_SNIPPET, saved(alpha(), tmp_path))
    model = names["model"]
    assert type(model) is RxTAlpha
    assert printed.count("[Memory updated]") == 2
    assert model.turns == 4
    assert model.stm.batch_size == 4
    rows = [
        line for line in printed.splitlines() if line.startswith("[") and line.count("', ") + line.count('", ') >= 3
    ]
    assert rows, "each step of a batch prints a list of four strings"
    assert all(len(eval(line)) == 4 for line in rows)
    assert rows[-1] == "['', '', '', '']"


@pytest.mark.parametrize("make", [alpha, beta])
def test_a_reloaded_model_says_what_the_saved_one_says(make: Any, tmp_path: Path) -> None:
    original = make()
    directory = saved(original, tmp_path)
    loaded = type(original).from_pretrained(directory)
    assert not loaded.training
    assert loaded.tokenizer is not None, "tokenizer.json lies beside the weights"
    memory = torch.randn_like(original.stm.memory)
    answers = []
    for model in (original, loaded):
        model.load_stm_state(memory)
        query = model.tokenize_query("the cat sat", max_seq_len=32)
        answers.append([list(model.interact(**query, max_seq_len=32, temperature=0.0)), model.export_stm_state()])
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])
