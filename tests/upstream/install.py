"""Put the upstream versions that the parity tests compare with into a directory of their own.

    python tests/upstream/install.py [DIRECTORY]

DIRECTORY defaults to `$RXT_UPSTREAM_DIR`, else `.upstream` in the repository root. Each version goes into
`DIRECTORY/VERSION` without its dependencies (the tests run it beside the torch and transformers of this environment),
and is never importable from here. A version that is already there is left alone; one that is being installed appears
only when it is complete.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

VERSIONS = ("0.2.31", "0.3.92")
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def upstream_directory() -> pathlib.Path:
    """Where the upstream versions live: `$RXT_UPSTREAM_DIR`, else `.upstream` in the repository root."""
    return pathlib.Path(os.environ.get("RXT_UPSTREAM_DIR") or REPOSITORY / ".upstream")


def is_installed(directory: pathlib.Path, version: str) -> bool:
    """Whether `directory` has this version of upstream, whole."""
    return (directory / version / "rxlm" / "__init__.py").is_file()


def installer() -> list[str]:
    """The pip of this environment, or uv where an environment has been made without pip."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python"]
    if shutil.which("pip"):
        return ["pip", "install", "--quiet", "--no-deps", "--ignore-requires-python"]
    raise SystemExit(f"{sys.executable} has no pip; install pip into it and run this script again")


def install(directory: pathlib.Path, version: str) -> None:
    """Install one version under a temporary name beside its place, then rename it there."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{version}.", dir=directory) as temporary:
        target = pathlib.Path(temporary) / "packages"
        subprocess.run([*installer(), "--target", str(target), f"rxlm=={version}"], check=True)
        if not (target / "rxlm" / "__init__.py").is_file():
            raise SystemExit(f"rxlm=={version} was installed, but there is no package rxlm in it")
        try:
            target.rename(directory / version)
        except OSError:
            if not is_installed(directory, version):  # somebody else finished first: fine; anything else is an error
                raise


def main() -> None:
    directory = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else upstream_directory()
    for version in VERSIONS:
        if is_installed(directory, version):
            print(f"rxlm {version}: present in {directory / version}")
        else:
            install(directory, version)
            print(f"rxlm {version}: installed into {directory / version}")


if __name__ == "__main__":
    main()
