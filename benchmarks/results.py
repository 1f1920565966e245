"""The file every benchmark writes: one JSON object, the same top level for all of them, replaced whole or not at all.

Top level::

    format           "rxt-benchmark"
    format_version   1
    name             which benchmark, for instance "scaling"
    created          UTC, ISO 8601
    complete         false if it was interrupted; rows hold what was measured
    settings         what was asked for; a run continues only with equal settings
    environment      see environment.describe_environment
    limits           read_bandwidth_bytes_per_second, fma_flops_per_second; nothing has to be there where no row was timed
    rows             a list; each row has name, backend, dtype, shape, where something was timed p20, p50, p80 in seconds,
                     and what the benchmark adds: those of native kernels floor, in seconds, ratio, which is p50 / floor,
                     and paired_ratio, percentiles of each time over the floor of its moment
    summary          what the benchmark concludes from its rows
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rxt_model.files import atomic_path

__all__ = ["FORMAT", "FORMAT_VERSION", "Results", "ResultsError", "read_results", "write_results"]

FORMAT = "rxt-benchmark"
FORMAT_VERSION = 1
_LIMITS = ("read_bandwidth_bytes_per_second", "fma_flops_per_second")
_ROW = {"name": str, "backend": str, "dtype": str, "shape": dict}
_TIMES = {"p20": float, "p50": float, "p80": float}


class ResultsError(ValueError):
    """A file that is not the result of a benchmark; the message says which and why."""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass
class Results:
    """The content of one result file; see the module."""

    name: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    limits: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False
    created: str = field(default_factory=_now)

    def check(self) -> None:
        """Raises:
        ResultsError: a part is missing or of the wrong kind, named in a sentence.
        """
        was_timed = any("p50" in row for row in self.rows) or not self.rows
        for name in _LIMITS if was_timed else ():
            if not isinstance(self.limits.get(name), (int, float)):
                raise ResultsError(f"limits has no number {name}; a result says what the machine can do.")
        for index, row in enumerate(self.rows):
            has_times = any(name in row for name in _TIMES)
            for name, kind in {**_ROW, **(_TIMES if has_times else {})}.items():
                if not isinstance(row.get(name), kind):
                    raise ResultsError(f"rows[{index}].{name} is {row.get(name)!r}; it must be a {kind.__name__}.")
            if has_times and not 0 <= row["p20"] <= row["p50"] <= row["p80"] < math.inf:
                raise ResultsError(f"rows[{index}] has percentiles out of order or not finite.")
            least = row.get("floor", math.inf)
            if not isinstance(least, (int, float)) or not least > 0 or ("floor" in row) != ("ratio" in row):
                raise ResultsError(
                    f"rows[{index}] has a floor of {least!r}; it must be positive and stand beside a ratio."
                )


def write_results(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write a result file, whole or not at all, and make its directory if there is none.

    Raises:
        ResultsError: the results do not follow the schema.
        OSError: the file cannot be written.
    """
    results.check()
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": results.name,
        "created": results.created,
        "complete": results.complete,
        "settings": dict(results.settings),
        "environment": dict(results.environment),
        "limits": dict(results.limits),
        "summary": dict(results.summary),
        "rows": list(results.rows),
    }
    with atomic_path(target) as temporary:
        temporary.write_text(_dump(content) + "\n", encoding="utf-8")
    return target


def _dump(content: Mapping[str, Any]) -> str:
    """JSON with one line per row: a table that a person can read and a version control system can compare."""
    rows = ",\n".join("    " + json.dumps(row, allow_nan=False) for row in content["rows"])
    rest = json.dumps({**content, "rows": []}, indent=2, allow_nan=False)
    return rest.replace('"rows": []', f'"rows": [\n{rows}\n  ]') if rows else rest


def read_results(path: str | os.PathLike[str], *, name: str | None = None) -> Results:
    """Read what :func:`write_results` wrote.

    Args:
        path: the file.
        name: which benchmark it must be of, or None for any.

    Raises:
        FileNotFoundError: there is no such file.
        ResultsError: it is something else.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no result file at {file}; give the path of one that a benchmark wrote.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{file} is not JSON ({error}); run the benchmark again.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ResultsError(f"{file} is JSON but not the result of a benchmark.")
    if content.get("format_version") != FORMAT_VERSION:
        raise ResultsError(
            f"{file} has format version {content.get('format_version')}; this release reads {FORMAT_VERSION}."
        )
    if name is not None and content.get("name") != name:
        raise ResultsError(f"{file} is the result of the benchmark {content.get('name')!r}, not of {name!r}.")
    kinds: dict[str, type] = {
        "name": str, "settings": dict, "environment": dict, "limits": dict, "rows": list, "summary": dict,
        "complete": bool, "created": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise ResultsError(f"{file} has no {key} of the right kind; run the benchmark again.")
    if not all(isinstance(row, dict) for row in content["rows"]):
        raise ResultsError(f"{file} has rows that are no objects; run the benchmark again.")
    results = Results(**{key: content[key] for key in kinds})
    try:
        results.check()
    except ResultsError as error:
        raise ResultsError(f"{file}: {error}") from None
    return results
