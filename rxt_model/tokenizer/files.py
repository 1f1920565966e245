"""Finding, reading and writing ``tokenizer.json``: every failure is one sentence and no pickle is ever opened."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

TOKENIZER_FILE = "tokenizer.json"


def read_tokenizer_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``tokenizer.json`` and check that it is one, as far as its outer shape goes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 JSON (truncated, binary, a pickle), or JSON of something else.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file} is a directory, and a tokenizer.json file is needed here: name the file in it.")
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no tokenizer file at {file}: give the path of a tokenizer.json.") from None
    except OSError as error:
        raise OSError(f"The tokenizer file {file} cannot be read ({error.strerror}).") from error
    if raw[:1] == b"\x80" or raw[:2] == b"PK":
        raise ValueError(
            f"{file} is a pickle or zip archive and not a tokenizer.json; such files are never opened, because they "
            "can run code: save the tokenizer as tokenizer.json."
        )
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}): it is truncated or damaged, or not a tokenizer.json; get it again."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(
            f"{file} is JSON but not a tokenizer.json: it has no 'model' object; give the file that the tokenizers "
            "library writes."
        )
    return content


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name in the same directory, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def locate_tokenizer_file(
    directory_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """The path of ``tokenizer.json`` in a local directory, or in the local cache of a hub repository.

    A local directory of that name wins over the hub, as everywhere in ``huggingface_hub``.

    Raises:
        TypeError: the first argument is not a string or path.
        FileNotFoundError: no such directory, repository, revision or file.
        ValueError: ``revision`` is given for a local directory, which has none.
        OSError: the hub could not be asked.
    """
    if not isinstance(directory_or_hub_id, (str, os.PathLike)):
        raise TypeError(
            f"directory_or_hub_id is a {type(directory_or_hub_id).__name__}: give a local directory or a hub id such "
            "as 'owner/name', as a string or path."
        )
    name = os.fspath(directory_or_hub_id)
    path = Path(name)
    if name and path.exists():
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {path} is a local path and has no revisions: leave revision out."
            )
        if path.is_dir() and not (path / TOKENIZER_FILE).is_file():
            raise FileNotFoundError(f"The directory {path} has no {TOKENIZER_FILE}, where a tokenizer is stored.")
        return path / TOKENIZER_FILE if path.is_dir() else path
    looks_local = not isinstance(directory_or_hub_id, str) or name.startswith((".", "~")) or path.is_absolute()
    if looks_local or name.count("/") > 1 or "\\" in name or not name:
        raise FileNotFoundError(
            f"There is no directory {name!r}, and it is not a hub id either: give a local directory that holds "
            f"{TOKENIZER_FILE}, or a hub id such as 'owner/name'."
        )
    return _download(name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)


def _download(
    hub_id: str,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import errors, hf_hub_download

    at = "" if revision is None else f" at revision {revision!r}"
    try:
        return Path(
            hf_hub_download(
                hub_id,
                TOKENIZER_FILE,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                local_files_only=local_files_only,
            )
        )
    except errors.HFValidationError:
        raise FileNotFoundError(
            f"There is no directory {hub_id!r}, and it is not a hub id either: give a local directory that holds "
            f"{TOKENIZER_FILE}, or a hub id such as 'owner/name'."
        ) from None
    except errors.LocalEntryNotFoundError as error:
        why = "local_files_only is set" if local_files_only else "the hub could not be reached"
        raise FileNotFoundError(
            f"{TOKENIZER_FILE} of {hub_id!r}{at} is not in the local cache and {why}: there is no local directory of "
            "that name either; download it once while connected, or give a directory."
        ) from error
    except errors.GatedRepoError as error:
        raise OSError(
            f"The hub repository {hub_id!r} is gated: accept its terms on the hub and pass token, or log in."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no local directory and no hub repository {hub_id!r} that this login may read: check the "
            "spelling, and pass token for a private one."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"The hub repository {hub_id!r} has no revision {revision!r}.") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"The hub repository {hub_id!r}{at} has no {TOKENIZER_FILE}.") from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        raise OSError(f"{TOKENIZER_FILE} of {hub_id!r}{at} could not be fetched from the hub ({error}).") from error
