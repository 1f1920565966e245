"""Which sources the native extension was built from; needs nothing but Python, so that ``setup.py`` can use it."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["fingerprint"]


def fingerprint(folder: Path) -> str:
    """A fingerprint of the names and contents of all files in a folder of C++ sources.

    Raises:
        OSError: the folder or a file cannot be read.

    Example:
        >>> fingerprint(Path(__file__).parent / "no such folder") == fingerprint(Path("nor this one"))
        True
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
