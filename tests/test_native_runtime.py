"""The native extension: choosing instruction sets, and what happens where it is missing or cannot be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rxt_kernels import info, native_runtime, rms_norm, use_backend
from rxt_kernels.dispatch import explain

ROOT = Path(__file__).resolve().parents[1]
needs_native = pytest.mark.skipif(not native_runtime.available(), reason=native_runtime.unavailable() or "")


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_native
def test_the_highest_instruction_set_is_the_default_and_a_block_chooses_another() -> None:
    sets = native_runtime.instruction_sets()
    default = native_runtime.instruction_set()
    with native_runtime.use_instruction_set(sets[0]):
        assert native_runtime.instruction_set() == sets[0]
        with pytest.raises(ValueError, match="'mmx' is not known; it is one of portable, avx2, avx512, avx512_bf16"):
            native_runtime.use_instruction_set("mmx").__enter__()
    assert native_runtime.instruction_set() == default


@needs_native
def test_the_environment_chooses_an_instruction_set() -> None:
    code = "from rxt_kernels import native_runtime as n; print(n.instruction_set(), n.unavailable())"
    lowest = native_runtime.instruction_sets()[0]
    assert _python(code, RXT_KERNELS_INSTRUCTION_SET=lowest) == f"{lowest} None"
    assert "RXT_KERNELS_INSTRUCTION_SET is 'mmx', but the instruction set 'mmx' is not known" in _python(
        code, RXT_KERNELS_INSTRUCTION_SET="mmx"
    )


def test_without_the_extension_everything_runs_and_says_why() -> None:
    code = (
        "import torch, rxt_kernels as r; from rxt_kernels import info\n"
        "print(r.rms_norm(torch.ones(2), torch.ones(2)).tolist())\n"
        "try: r.rms_norm(torch.ones(2), torch.ones(2), backend='native')\n"
        "except ValueError as error: print(error)\n"
        "print(info.collect()['native_kernels'])"
    )
    out = _python(code, RXT_KERNELS_EXTENSION="/nowhere/_native.so")
    assert out.startswith("[1.0, 1.0]")
    assert "backend='native' was asked for rms_norm, but cannot run here: The native CPU kernels" in out
    assert "'available': False" in out


@needs_native
def test_an_extension_of_other_sources_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "setup.py").touch()
    assert native_runtime._outdated(native_runtime.extension, ROOT) is None
    assert native_runtime._outdated(native_runtime.extension, tmp_path) is None  # installed without sources
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert native_runtime._outdated(native_runtime.extension, tmp_path) is None
    with open(tmp_path / "csrc" / "bindings.cpp", "a") as file:
        file.write("// one line more\n")
    assert "run `make native`" in str(native_runtime._outdated(native_runtime.extension, tmp_path))


def test_without_a_compiler_the_build_succeeds_and_leaves_the_reason(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PATH")}
    environment["PATH"] = str(tmp_path)
    environment["RXT_NATIVE_EMULATE"] = "1"  # so that nothing among the sources is touched
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "lib" / "rxt_kernels" / "_native_build.txt").read_text()
    assert report.startswith("no C++ compiler was found")
    assert not list((tmp_path / "lib" / "rxt_kernels").glob("*.so"))


@needs_native
def test_native_is_what_auto_takes_on_the_cpu_and_reports_say_so() -> None:
    report = info.collect()
    assert report["native_kernels"]["instruction_set"] in report["native_kernels"]["instruction_sets"]
    assert "native kernels   use " in info.report_text(report)
    assert explain("rms_norm", "native").startswith("Registered")
    x, weight = torch.randn(3, 8), torch.ones(8)
    with use_backend("native"):
        assert torch.equal(rms_norm(x, weight), rms_norm(x, weight, backend="native"))


@needs_native
def test_what_native_kernels_cannot_take_is_said_in_words() -> None:
    double = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"torch\.float64; native kernels take float32 and bfloat16"):
        rms_norm(double, double, backend="native")
    gradient = torch.func.grad(lambda x: rms_norm(x, torch.ones(2)).sum())(torch.tensor([3.0, 4.0]))
    assert gradient.shape == (2,)
