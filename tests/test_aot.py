"""Reports ahead of time: shapes held to the presets, compiled code read as text, and bad kernels named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import needs_triton

import rxt_kernels
from rxt_kernels.aot import TARGETS, all_cases
from rxt_kernels.aot.assembly import Access, innermost_loops, natural_loops, read_amd, read_nvidia
from rxt_kernels.aot.intermediate import loads, matrix_products, needs_wide_loads, touched
from rxt_kernels.aot.shapes import MODELS, Experts, ModelShape
from rxt_kernels.aot.work import KERNELS, Work, bound_of, tensor_bytes, work_of
from rxt_model.config import head_counts
from rxt_model.presets import PRESETS, Preset

PACKAGE = Path(rxt_kernels.__file__).parent


# shapes


def shape_of(preset: Preset) -> dict[str, Any]:
    """What of a preset stands in a :class:`ModelShape`."""
    decoder, encoder = preset.configs.get("decoder"), preset.configs.get("encoder")
    memory, stateless = preset.configs.get("memory_attention"), preset.configs.get("stateless")
    main = decoder or encoder or stateless
    shape: dict[str, Any] = {
        "model": preset.name, "width": main.embed_dim, "head_dim": main.embed_dim // main.att_heads,
        "vocabulary": main.vocab_size, "longest": main.seq_len, "rotary": main.rope_layout,
        "causal": decoder.self_attention_heads if decoder else None,
        "bidirectional": encoder.self_attention_heads if encoder else None,
        "reads": (), "read_slots": 0, "experts": None, "dense": (), "write": None,
    }  # fmt: skip
    dense = []
    if decoder is not None:
        reads = [decoder.cross_attention_heads]
        if not encoder.skip_memory_cross_attention and encoder.cross_attention_heads not in reads:
            reads.append(encoder.cross_attention_heads)
        shape["reads"], shape["read_slots"] = tuple(reads), decoder.stm_size
        shape["experts"] = Experts(
            decoder.ff_dim, decoder.num_experts, decoder.moe_top_k, decoder.moe_bias_mode == "local", decoder.router_amp
        )
        if "dense" in (decoder.stateless_layers_config or ()):
            dense.append(decoder.dense_layer_dim)
    if encoder is not None:
        dense.append(encoder.ff_dim)
    if decoder is not None and decoder.num_shared_experts:
        dense.append(decoder.shared_expert_dim)
    if stateless is not None:
        shape["causal"] = head_counts("sqa", stateless.att_heads, stateless.att_groups, stateless.att_num_query_groups)
        if stateless.use_moe_ff:
            shape["experts"] = Experts(stateless.ff_dim, stateless.ff_num_experts, stateless.ff_moe_top_k)
        else:
            dense.append(stateless.ff_dim)
    shape["dense"] = tuple(dict.fromkeys(dense))
    if memory is not None:
        shape["write"] = {
            "layers": memory.num_layers, "slots": memory.stm_size, "heads": memory.attention_heads, "variant": memory.variant,
            "gate": memory.residual_gate_type, "groups": memory.num_groups,
        }  # fmt: skip
    return shape


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.model)
def test_shapes_are_those_of_the_presets(model: ModelShape) -> None:
    own = dict(vars(model))
    own["write"] = None if model.write is None else vars(model.write)
    assert own == shape_of(PRESETS[model.model])


def test_every_preset_has_its_shapes() -> None:
    heads = {name for name, preset in PRESETS.items() if preset.component == "mlm_head"}
    assert {model.model for model in MODELS} == set(PRESETS) - heads
    scored = {(model.width, model.vocabulary) for model in MODELS}
    for name in heads:
        config = PRESETS[name].configs["mlm_head"]
        assert (config.embed_dim, config.vocab_size) in scored


# cases


def test_cases_are_named_once_and_every_model_has_some() -> None:
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    for model in MODELS:
        phases = {case.phase for case in cases if model.model in case.models}
        assert phases >= {"training", "decode"}
    small = [case for case in cases if case.is_small]
    assert {case.name.split("/")[0] for case in small} == {case.name.split("/")[0] for case in cases}
    assert {case.dtype for case in cases if "rxt-beta-micro" in case.models} == {torch.float32, torch.bfloat16}


def kernels_of_the_package() -> set[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    return set(re.findall(r"@triton\.jit(?:\(.*\))?\ndef (_\w+_kernel)\(", text))


def test_the_work_of_every_kernel_is_known() -> None:
    assert set(KERNELS) == kernels_of_the_package()
    with pytest.raises(ValueError, match="nothing is known of the work of _new_kernel; add it to "):
        work_of("_new_kernel", {})


@needs_triton
def test_every_kernel_of_the_package_has_a_case() -> None:
    from rxt_kernels.aot.report import launches_of

    launched = set()
    for case in all_cases():
        if "rxt-alpha-micro" not in case.models:
            continue
        for launch in launches_of(case):
            name = launch.kernel.fn.__name__
            values = {**dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)), **launch.options}
            assert min(work_of(name, values)) >= 0
            assert sum(tensor_bytes(name, values).values()) > 0
            launched.add(name)
    assert launched == kernels_of_the_package()


# work


def test_attention_counts_the_pairs_that_see_each_other() -> None:
    query, key = torch.empty(2, 3, 4, 16, dtype=torch.bfloat16), torch.empty(2, 5, 2, 16)
    values: dict[str, Any] = {"query": query, "key": key, "key_time": 5, "HEADS": 4, "CAUSAL": True}
    pairs = sum(1 for row in range(3) for column in range(5) if column <= row + 2) * 2 * 4
    assert work_of("_sqa_fwd_kernel", values) == Work(4 * 16 * pairs, True, 0, pairs)
    assert work_of("_sqa_fwd_kernel", values | {"CAUSAL": False}).products == 4 * 16 * 15 * 2 * 4
    backward = sum(work_of(f"_sqa_bwd_{part}_kernel", values).products for part in ("dq", "dkdv"))
    # Seven products of tiles instead of the five that are needed: scores and dP are computed by both kernels.
    assert backward == 3.5 * work_of("_sqa_fwd_kernel", values).products


def test_idle_experts_and_repeated_rows_are_not_read() -> None:
    values = {
        "w1": torch.empty(10, 4, 8), "b1": torch.empty(10, 8), "order": torch.empty(3, dtype=torch.int32), "experts": 10,
        "x": torch.empty(1, 4).expand(7, 4), "width": 8, "starts": torch.empty(0),
    }  # fmt: skip
    assert tensor_bytes("_moe_up_kernel", values) == {
        "w1": 3 * 4 * 8 * 4, "b1": 3 * 8 * 4, "order": 12, "x": 16, "starts": 0,
    }  # fmt: skip
    assert tensor_bytes("_rms_norm_fwd_kernel", values)["w1"] == 10 * 4 * 8 * 4


def test_the_bound_is_the_longest_of_what_must_be_done() -> None:
    target = TARGETS["sm_90"]
    moved = int(target.bandwidth)
    assert bound_of(Work(), moved, target)[:2] == (moved / target.bandwidth, "bytes")
    assert bound_of(Work(products=int(target.matrix_rate) * 2, in_half=True), moved, target)[:2] == (2.0, "products")
    assert bound_of(Work(products=int(target.vector_rate) * 3), moved, target)[:2] == (3.0, "products")
    assert bound_of(Work(specials=int(target.special_rate)), moved, target)[2] == 1.0


@pytest.mark.parametrize(
    ("name", "registers", "shared", "warps", "occupancy"),
    [
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 168, 0, 4, 12 / 64),
        ("sm_90", 255, 0, 8, 8 / 64),
        ("sm_80", 32, 100 << 10, 4, 4 / 64),
        ("sm_80", 32, 0, 1, 32 / 64),
        ("gfx942", 128, 0, 4, 16 / 32),
        ("gfx942", 512, 0, 4, 4 / 32),
        ("gfx942", 64, 40 << 10, 4, 4 / 32),
    ],
)
def test_occupancy(name: str, registers: int, shared: int, warps: int, occupancy: float) -> None:
    assert TARGETS[name].occupancy(registers, shared, warps) == occupancy


# compiled code

NVIDIA = """
.text._a_kernel:
	//## File "/home/a/triton.py", line 7
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
	//## File "/home/a/triton.py", line 9
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3+0x2800], desc[UR28][R28.64], P5 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR24].tnspB, R56, gsb0 ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
.L_x_3:
	//## File "/home/a/triton.py", line 11
        /*0060*/                   STG.E.U16 desc[UR28][R2.64], R5 ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   LDG.E.CONSTANT R9, desc[UR28][R8.64] ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""

AMD = """
	.file	1 "/home/a" "triton.py"
a_kernel:                               ; @a_kernel
	.loc	1 7 0 prologue_end              ; triton.py:7:0
	s_load_dwordx2 s[4:5], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Loop Header: Depth=1
	.loc	1 9 2                           ; triton.py:9:2
	buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen
	buffer_load_short_d16_hi v8, v1, s[4:7], 0 offen
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
	v_mfma_f32_16x16x16_bf16 v[0:3], v[0:1], v[4:5], v[0:3]
	global_load_ubyte v9, v[2:3], off
	s_cbranch_scc0 .LBB0_2
	s_cbranch_vccz .LBB0_1
.LBB0_3:
	global_store_dword v[2:3], v0, off
	s_endpgm
.Lfunc_end0:
	s_nop 0
"""


def test_loops_of_nvidia_code() -> None:
    code = read_nvidia(NVIDIA)
    names = [step.name for step in code.instructions]
    found = sorted(sorted(names[index] for index in loop) for loop in natural_loops(code))
    # The slow path behind EXIT belongs to the loop that it returns to; the branch to itself at the end is never reached.
    assert found == [
        ["BRA", "BRA", "BRA", "BRA", "HGMMA.64x16x16.F32.BF16", "LDG.E.CONSTANT", "LDGSTS.E.BYPASS.LTC128B.128"],
        ["BRA", "LDG.E.CONSTANT"],
    ]
    inner = innermost_loops(code, lambda step: step.access is not None)
    assert [len(loop) for loop in inner] == [7]


def test_accesses_and_places_of_nvidia_code() -> None:
    steps = {step.name: step for step in read_nvidia(NVIDIA).instructions}
    assert steps["LDGSTS.E.BYPASS.LTC128B.128"].access == Access(True, 128)
    assert steps["STG.E.U16"].access == Access(False, 16)
    assert steps["LDG.E.CONSTANT"].access is None
    assert steps["HGMMA.64x16x16.F32.BF16"].place == ("/home/a/triton.py", 9)
    widths = {"LDG.E": 32, "LDG.E.64": 64, "LDG.E.ENL2.256": 256, "LDG.E.U8": 8, "LD.E.128": 128}
    for name, bits in widths.items():
        step = read_nvidia(f"        /*0000*/                   {name} R2, desc[UR4][R2.64] ;").instructions[0]
        assert step.access == Access(True, bits)


def test_loops_and_accesses_of_amd_code() -> None:
    code = read_amd(AMD)
    assert [step.name for step in code.instructions][-1] == "s_endpgm"
    assert sorted(len(loop) for loop in natural_loops(code)) == [3, 6]
    inner = innermost_loops(code, lambda step: step.access is not None)
    assert [[step.access for step in loop if step.access] for loop in inner] == [[Access(True, 8)]]
    accesses = [step.access for step in code.instructions if step.access]
    assert accesses == [Access(True, 128), Access(True, 16), Access(True, 8), Access(False, 32)]
    assert code.instructions[2].place == ("/home/a/triton.py", 9)


def test_code_without_instructions_has_no_loops() -> None:
    assert natural_loops(read_nvidia("")) == []


INTERMEDIATE = """
#loc = loc("/home/a/triton.py":7:0)
#loc1 = loc("/home/a/triton.py":9:17)
#loc2 = loc("/home/a/rotary.py":3:4)
#loc3 = loc(callsite(#loc2 at #loc1))
#loc4 = loc("tile"(#loc3))
#loc5 = loc("/home/a/triton.py":12:8)
module {
  tt.func public @_a_kernel(%x: !tt.ptr<bf16> loc(#loc), %y: !tt.ptr<f32>, %idle: !tt.ptr<f32>, %n: i32) {
    %0 = tt.splat %x : !tt.ptr<bf16> -> tensor<64x1x!tt.ptr<bf16>> loc(#loc1)
    %1 = tt.broadcast %0 : tensor<64x1x!tt.ptr<bf16>> -> tensor<64x16x!tt.ptr<bf16>> loc(#loc1)
    %2:2 = scf.for %i = %c0 to %n step %c1 iter_args(%p = %1, %acc = %cst) -> (tensor<64x16x!tt.ptr<bf16>>, X)  : i32 {
      %tile = tt.load %p, %m, %z : tensor<64x16x!tt.ptr<bf16>> loc(#loc4)
      %d = tt.dot %a, %tile, %acc : tensor<64x64xbf16> * tensor<64x16xbf16> -> tensor<64x16xf32> loc(#loc1)
      %next = tt.addptr %p, %step : tensor<64x16x!tt.ptr<bf16>>, tensor<64x16xi64> loc(#loc1)
      scf.yield %next, %d : tensor<64x16x!tt.ptr<bf16>>, tensor<64x16xf32> loc(#loc1)
    } loc(#loc5)
    %e = tt.dot %f, %g, %h, inputPrecision = ieee : tensor<64x16xf32> * tensor<16x16xf32> -> tensor<64x16xf32> loc(#loc1)
    %3 = tt.splat %y : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#loc5)
    %4 = tt.load %3 : tensor<64x!tt.ptr<f32>> loc(#loc5)
    %5 = tt.load %y : !tt.ptr<f32> loc(#loc1)
    tt.store %3, %4 : tensor<64x!tt.ptr<f32>> loc(#loc5)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


def test_what_a_kernel_means_to_do() -> None:
    found = loads(INTERMEDIATE)
    assert [load.shape for load in found] == [(64, 16), (64,), ()]
    assert found[0].place == ("/home/a/rotary.py", 3)
    assert [tuple(product) for product in matrix_products(INTERMEDIATE)] == [(True, True), (False, False)]
    assert touched(INTERMEDIATE) == (("x", "y"), ("y",))
    with pytest.raises(ValueError, match="cannot be followed to an argument"):
        touched("  %1 = tt.load %nowhere : tensor<4x!tt.ptr<f32>> loc(#loc)")


def test_tiles_need_wide_loads_and_vectors_of_their_sides_do_not() -> None:
    found = loads(INTERMEDIATE)
    assert needs_wide_loads(found) == {("/home/a/rotary.py", 3)}
    # Without a tile, or longer than its sides, a vector is the data.
    assert needs_wide_loads(found[1:]) == {("/home/a/triton.py", 12)}
    longer = found[1]._replace(shape=(128,))
    assert needs_wide_loads([found[0], longer]) == {found[0].place, longer.place}


@needs_triton
def test_a_lost_matrix_instruction_and_a_scalar_load_are_named() -> None:
    from rxt_kernels.aot.compiler import inspect

    place = "".join(("/home/a/rotary.py", '", line 3'))
    good = NVIDIA.replace('/home/a/triton.py", line 9', place)
    inspected = inspect(read_nvidia(good), INTERMEDIATE, TARGETS["sm_90"])
    assert (inspected.problems, inspected.matrix_in_loops, inspected.wide_share) == ((), 1, 1.0)
    scalar = inspect(read_nvidia(good.replace("LTC128B.128", "LTC128B")), INTERMEDIATE, TARGETS["sm_90"])
    assert scalar.problems == ("it loads a tile in pieces of at most 32 bits in a loop: a/rotary.py:3.",)
    lost = inspect(read_nvidia(good.replace("HGMMA", "FFMA")), INTERMEDIATE, TARGETS["sm_90"])
    assert lost.problems == ("it multiplies tiles without any matrix instruction.",)
    moved = good.replace("HGMMA", "FFMA").replace("LDC R1", "HGMMA.64x16x16.F32.BF16 R1")
    outside = inspect(read_nvidia(moved), INTERMEDIATE, TARGETS["sm_90"])
    assert outside.problems == (
        "it multiplies tiles in a loop, and has no matrix instruction in an innermost loop.",
    )  # fmt: skip
    narrow = INTERMEDIATE.replace("    %0 =", "    %p0 = arith.muli %n, %k : i32 loc(#loc)\n    %0 =")
    assert "it computes an offset in 32 bits" in inspect(read_nvidia(good), narrow, TARGETS["sm_90"]).problems[0]


# the program


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=280, env={**clean, **environment}, check=False
    )  # fmt: skip


@needs_triton
def test_the_report_of_two_kernels(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = run(
        "-m", "rxt_kernels.aot", "--target", "sm_90", "--target", "gfx942", "--only", "swiglu/384/decode", "--json", str(file)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "2 kernels compiled for 2 targets, 2 launches, 0 problems." in done.stdout
    report = json.loads(file.read_text(encoding="utf-8"))
    assert "no time here was measured" in report["note"]
    kernel, launch = report["kernels"][0], report["launches"][0]
    assert (kernel["kernel"], kernel["target"], kernel["spilled"]) == ("_swiglu_fwd_kernel", "sm_90", 0)
    assert (kernel["read"], kernel["written"]) == (["x"], ["out"])
    assert 0 < kernel["registers"] < 256
    assert launch["bytes"] == 3 * 384 * 2
    assert launch["limit"] == "bytes"


BAD_KERNELS = """
import sys

import torch
import triton
import triton.language as tl

from rxt_kernels.aot import TARGETS, compile_job, job_of
from rxt_kernels.triton_runtime import Launch


@triton.jit
def _scalar_kernel(x, y, n, stride, SIDE: tl.constexpr):
    row = tl.arange(0, SIDE).to(tl.int64)
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for first in range(0, n, SIDE):
        total += tl.load(x + (row * n)[:, None] + ((row + first) * stride)[None, :]).to(tl.float32)
    tl.store(y + row[:, None] * SIDE + row[None, :], total)


@triton.jit
def _product_kernel(x, y, n, SIDE: tl.constexpr):
    row = tl.arange(0, SIDE).to(tl.int64)
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for first in range(0, n, SIDE):
        tile = tl.load(x + (row * n)[:, None] + (row + first)[None, :])
        total = tl.dot(tile, tl.trans(tile), total)
    tl.store(y + row[:, None] * SIDE + row[None, :], total)


x, y = torch.empty(256 * 256, dtype=torch.bfloat16), torch.empty(256 * 256)
launches = {
    "scalar": Launch(_scalar_kernel, (1,), (x, y, 256, 3), {"SIDE": 32, "num_warps": 4}),
    "spill": Launch(_product_kernel, (1,), (x, y, 256), {"SIDE": 128, "num_warps": 1}),
    "shared": Launch(_product_kernel, (1,), (x, y, 256), {"SIDE": 256, "num_warps": 8, "num_stages": 4}),
    "none": Launch(_product_kernel, (1,), (x, y, 256), {"SIDE": 64, "num_warps": 4}),
}
for name, launch in launches.items():
    compiled = compile_job(job_of(launch, TARGETS[sys.argv[1]]))
    print(name, compiled.kernel, *compiled.problems, sep="|")
"""


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_bad_kernels_are_found_out(target: str, tmp_path: Path) -> None:
    file = tmp_path / "bad_kernels.py"
    file.write_text(textwrap.dedent(BAD_KERNELS), encoding="utf-8")
    done = run(str(file), target, PYTHONPATH=str(PACKAGE.parent), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    problems = dict(line.split("|", 1) for line in done.stdout.splitlines())
    assert re.search(
        r"_scalar_kernel\|it loads a tile in pieces of at most 32 bits in a loop: .*bad_kernels\.py:\d+\.",
        problems["scalar"],
    )
    assert re.search(r"it spills \d+ bytes per thread\.", problems["spill"])
    assert re.search(r"it wants \d+ bytes of shared memory; a program can have \d+\.", problems["shared"])
    assert problems["none"] == "_product_kernel"


@needs_triton
def test_arguments_that_cannot_be_met_are_refused() -> None:
    done = run("-m", "rxt_kernels.aot", "--only", "no such model")
    assert done.returncode == 2
    assert "no case and no model has 'no such model' in its name." in done.stderr
    done = run("-m", "rxt_kernels.aot", "--json", "no such directory/report.json")
    assert done.returncode == 2
    assert "there is no directory no such directory; make it first." in done.stderr
    done = run("-m", "rxt_kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr
