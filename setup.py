"""Build of rxt-kernels: two Python packages, and the native CPU extension from ``csrc/``.

The extension is built by ninja, every kernel once per instruction set. It is optional: without a compiler, or when the build
fails, the installation succeeds without it, and ``rxt_kernels/_native_build.txt`` says why (``rxt doctor`` shows it).

The benchmark suite lives in ``benchmarks/`` and is installed as ``rxt_benchmarks``, so that ``rxt bench`` finds it without
taking a general name in site-packages.

A wheel has every instruction set of its architecture; an editable or in-place build has those of this machine.

Environment: ``RXT_NATIVE_SETS`` names the instruction sets and ``CXX`` names the compiler. ``RXT_NATIVE_SANITIZE``
(``address,undefined``) builds with sanitizers, ``RXT_NATIVE_EMULATE=1`` with AVX-512 written out in plain C++; such builds are
for tests and go to another folder by ``--build-lib`` (see the Makefile).
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
    "avx512_bf16": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 "
    "-mprefer-vector-width=512",
}
"""Compiler flags of every instruction set, in rising order."""

SANITIZE = os.environ.get("RXT_NATIVE_SANITIZE", "")
EMULATE = os.environ.get("RXT_NATIVE_EMULATE", "") == "1"


class BuildError(Exception):
    """The extension cannot be built; the message says why."""


def _runs_here(name: str) -> bool:
    """Whether this processor has what an instruction set needs, as far as Linux tells; elsewhere it is taken to."""
    try:
        processor = set(Path("/proc/cpuinfo").read_text(encoding="ascii").replace("_", "").split())
    except (OSError, UnicodeDecodeError):
        return True
    return all(flag.removeprefix("-m") in processor or flag.startswith("-mprefer") for flag in FLAGS[name].split())


def instruction_sets(for_this_machine: bool) -> list[str]:
    """The instruction sets to build for: all of the architecture, or those that this machine can run."""
    known = list(FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]
    wanted = [name for name in os.environ.get("RXT_NATIVE_SETS", "").split(",") if name]
    if not wanted:
        return [name for name in known if not for_this_machine or _runs_here(name)]
    if unknown := [name for name in wanted if name not in known]:
        raise BuildError(
            f"RXT_NATIVE_SETS names {', '.join(unknown)}; this machine's compiler builds {', '.join(known)}."
        )
    return [name for name in known if name in wanted]


def compiler() -> str:
    """A C++ compiler."""
    for candidate in [os.environ.get("CXX"), "g++", "clang++", "c++"]:
        if candidate and shutil.which(candidate):
            return candidate
    raise BuildError("no C++ compiler was found (g++, clang++ or c++; the environment variable CXX may name another).")


def ninja_file(target: Path, sets: list[str]) -> str:
    """What ninja is to do: kernels once per instruction set, everything else once."""
    import pybind11

    flags = ["-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
    sanitized = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
    flags += ["-g", "-fno-omit-frame-pointer", *sanitized] if SANITIZE else ["-DNDEBUG"]
    flags += ["-DRXT_EMULATE_AVX512", "-Wno-psabi"] if EMULATE else []
    flags += [*(f"-DRXT_BUILD_{name}" for name in sets)]
    python = [f"-I{SOURCES}", f"-isystem {sysconfig.get_path('include')}", f"-isystem {pybind11.get_include()}"]
    link = ["-shared", "-fopenmp", *sanitized]
    lines = [
        f"cxx = {compiler()}",
        f"flags = {' '.join(flags)}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule precompile",
        "  command = $cxx $flags $more -MMD -MF $out.d -x c++-header $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {' '.join(link)} $in -o $out",
    ]
    objects = []

    def compile_once(source: Path, folder: str, more: str, after: str = "") -> None:
        objects.append(f"{folder}/{source.relative_to(SOURCES).with_suffix('.o')}")
        lines.extend([f"build {objects[-1]}: compile {source}{after}", f"  more = {more}"])

    patterns = ("bindings.cpp", "core/*.cpp", "*/bindings.cpp", "decode/engine.cpp", "memory_update/write.cpp")
    once = [source for pattern in patterns for source in sorted(SOURCES.glob(pattern))]
    kernels = sorted(set(SOURCES.glob("*/*.cpp")) - set(once))
    # Where the compiler looks first for core/python.h, it finds the precompiled one; clang looks on.
    more = " ".join(["-O1", *python])  # nothing in bindings takes time, but compiling them
    lines.extend([f"build precompiled/core/python.h.gch: precompile {SOURCES / 'core/python.h'}", f"  more = {more}"])
    fingerprint = runpy.run_path(str(ROOT / "rxt_kernels" / "native_sources.py"))["fingerprint"](SOURCES)
    for source in once:
        own = f"-DRXT_SOURCES='\"{fingerprint}\"'" if source.parent == SOURCES else ""
        compile_once(source, "once", f"-Iprecompiled {more} {own}", " | precompiled/core/python.h.gch")
    # Lowest first: where the linker finds one function several times, it keeps the first.
    for name in sets:
        for source in kernels:
            own = FLAGS["avx2"] if EMULATE and name.startswith("avx512") else FLAGS[name]
            optimise = "-O1" if SANITIZE else "-O3"
            compile_once(source, name, f"-I{SOURCES} {optimise} {own} -DRXT_INSTRUCTION_SET={name}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join([*lines, ""])


class NinjaBuild(build_ext):
    """Builds the extension with ninja, and leaves a reason where that fails."""

    def build_extension(self, extension: Extension) -> None:
        """Build ``rxt_kernels._native``."""
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        reports = {target.with_name("_native_build.txt")}
        if not (SANITIZE or EMULATE):  # an editable installation looks for it among the sources
            reports.add(ROOT / "rxt_kernels" / "_native_build.txt")
        try:
            report = self._run_ninja(target)
        except BuildError as error:
            report = str(error)
            target.unlink(missing_ok=True)
            print(f"rxt-kernels: installed without its native CPU kernels: {report}")
        for path in reports:
            path.write_text(report + "\n", encoding="utf-8")

    def _run_ninja(self, target: Path) -> str:
        try:
            import ninja
            import pybind11  # noqa: F401
        except ModuleNotFoundError as error:
            raise BuildError(f"the Python package {error.name} is needed to build and is not installed.") from error
        folder = ROOT / "build" / ("native" + ("-sanitized" if SANITIZE else "") + ("-emulated" if EMULATE else ""))
        folder.mkdir(parents=True, exist_ok=True)
        # An editable installation and a build for sanitizers stay on this machine, a wheel travels.
        text = ninja_file(target, instruction_sets(bool(self.inplace or self.editable_mode or SANITIZE)))
        plan = folder / "build.ninja"
        if not plan.exists() or plan.read_text(encoding="utf-8") != text:
            plan.write_text(text, encoding="utf-8")
        program = Path(ninja.BIN_DIR) / "ninja"
        done = subprocess.run(
            [str(program), "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            print(done.stdout)
            failed = [line for line in done.stdout.splitlines() if "error" in line.lower()]
            raise BuildError("the compiler refused: " + (failed[0] if failed else done.stdout.strip()[-300:]))
        return "built"


library = find_packages(include=["rxt_kernels", "rxt_kernels.*", "rxt_model", "rxt_model.*"])
files = sorted(str(path.relative_to(ROOT)) for path in SOURCES.rglob("*") if path.is_file())
setup(
    packages=[*library, "rxt_benchmarks"],
    package_dir={"rxt_benchmarks": "benchmarks"},
    # ninja knows the sources; as what the extension depends on, they go into a source distribution.
    ext_modules=[Extension("rxt_kernels._native", sources=[], depends=files, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
