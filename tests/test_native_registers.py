"""Sums of a product stay in registers while it runs: read off the machine code of the extension that is installed.

Whether a compiler keeps an array of sums in registers depends on its version and on who calls; results are right either way, and
the product takes three times as long where every sum is stored in every step.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from rxt_kernels import native_runtime

SETS = ("avx2", "avx512", "avx512_bf16")
MULTIPLY_ADD = re.compile(r"\b(vfn?madd\d+|vdpbf16)ps\b")
STORE_TO_STACK = re.compile(r"\bvmov\w+\s+%[yz]mm\d+,-?(0x)?[0-9a-f]*\(%r[sb]p")
JUMP = re.compile(r"\tj\w+\s+([0-9a-f]+)")


def innermost_loops(lines: list[str]) -> Iterator[list[str]]:
    """Instructions from the target of a jump backwards to the jump, where there is no other such jump in between."""
    addresses = {line.split(":", 1)[0].strip(): index for index, line in enumerate(lines)}
    loops = []
    for end, line in enumerate(lines):
        if (jump := JUMP.search(line)) and (start := addresses.get(jump.group(1), end + 1)) <= end:
            loops.append((start, end))
    for start, end in loops:
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in loops):
            yield lines[start : end + 1]


def functions(program: str) -> Iterator[tuple[str, list[str]]]:
    """Name and instructions of every function."""
    name, lines = "", []
    for line in program.splitlines():
        if begun := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            yield name, lines
            name, lines = begun.group(1), []
        elif "\t" in line:
            lines.append(line)
    yield name, lines


def test_innermost_loops_are_found() -> None:
    code = [
        "  1:\tnop",
        "  2:\tvfmadd231ps a,b,c",
        "  3:\tjne    2",
        "  4:\tvmovaps %zmm1,0x40(%rsp)",
        "  5:\tjne    1",
    ]
    assert list(innermost_loops(code)) == [code[1:3]]
    assert STORE_TO_STACK.search(code[3])
    assert not STORE_TO_STACK.search("vmovups %zmm1,(%rax)")


@pytest.mark.skipif(not native_runtime.available(), reason="the extension is not built")
@pytest.mark.skipif(
    "RXT_KERNELS_EXTENSION" in os.environ, reason="the extension is built for something else than speed"
)
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_products_keep_their_sums_in_registers() -> None:
    extension = native_runtime.extension.__file__
    program = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", extension], capture_output=True, text=True, check=True
    ).stdout
    names = (
        "detail::sums_of_tile<",
        "detail::stream_tile<",
        "detail::pairs_tile<",
        "multiply<float,",
        "multiply_pairs<",
    )
    product = re.compile(rf"rxt::({'|'.join(SETS)})::({'|'.join(names)})")
    seen: dict[str, int] = dict.fromkeys(SETS, 0)
    for name, lines in functions(program):
        if (found := product.search(name)) is None:
            continue
        for loop in innermost_loops(lines):
            multiplied = sum(bool(MULTIPLY_ADD.search(line)) for line in loop)
            stored = sum(bool(STORE_TO_STACK.search(line)) for line in loop)
            seen[found.group(1)] += multiplied >= 8
            assert multiplied < 8 or stored < 0.75 * multiplied, (
                f"{name} stores {stored} of {multiplied} sums in a step."
            )
    for one in native_runtime.instruction_sets():
        assert seen.get(one, 1) > 0, one
