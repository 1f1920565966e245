"""``rxt doctor``: what this machine and this installation can do, or what is known to be wrong with a checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "collect", "examine", "run"]

#: Distribution, and what it is for.
_OPTIONAL = {
    "matplotlib": "plots of benchmarks and of recall",
    "chitchat-dataset": "real conversations for training and for `rxt bench scaling`",
    "triton": "compiled GPU kernels",
    "transformers": "tokenizers of that library instead of this package's own",
}

_REQUIRED = ("numpy", "safetensors", "tokenizers", "huggingface_hub", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``rxt doctor``."""
    parser.epilog = (
        "The exit status is 0 also where something optional is missing, or a checkpoint is affected by defects of the upstream "
        "library; 1 if the demo model is damaged."
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL_DIR",
        help="a directory with config.json and model.safetensors: name the defects of upstream that affect it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    if options.model is not None:
        examination = examine(options.model)
        print(json.dumps(examination, indent=2) if options.json else "\n".join(_examination_lines(examination)))
        return 0
    report = collect()
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)))
    return 1 if report["demo_model"]["state"] == "damaged" else 0


def collect() -> dict[str, Any]:
    """Everything that is printed, ready for JSON."""
    from rxt_kernels import info

    return {
        **info.collect(),
        "python": {"executable": sys.executable, "prefix": sys.prefix, "in_environment": sys.prefix != sys.base_prefix},
        "required_packages": {name: _version(name) for name in _REQUIRED},
        "optional_packages": {name: {"version": _version(name), "for": use} for name, use in _OPTIONAL.items()},
        "demo_model": _demo_model(),
        "benchmarks": _benchmarks(),
    }


def examine(name: str) -> dict[str, Any]:
    """Which known defects of upstream affect a checkpoint, ready for JSON.

    Args:
        name: a directory, or ``demo``.

    Raises:
        UserError: there is no such directory.
        CheckpointError: the model in it cannot be loaded.
    """
    from rxt_model.checkpoint.defects import defects_of
    from rxt_model.checkpoint.errors import CheckpointWarning
    from rxt_model.cli.errors import UserError
    from rxt_model.cli.info import model_classes
    from rxt_model.cli.loading import DEMO, checkpoint_directory, component_of

    if name != DEMO and not Path(name).expanduser().is_dir():
        raise UserError(f"doctor: {name!r} is no directory; name one with config.json and model.safetensors.")
    directory = checkpoint_directory(name)
    component = component_of(directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        model = model_classes()[component].from_pretrained(directory, device="meta")
    return {
        "model": name,
        "component": component,
        "assumed": [" ".join(str(entry.message).split()) for entry in caught],
        "defects": [
            {
                "name": defect.name,
                "number": defect.number,
                "state": defect.state,
                "upstream": defect.upstream,
                "here": defect.here,
            }
            for defect in defects_of(model, directory)
        ],
    }


def _examination_lines(report: Mapping[str, Any]) -> Iterator[str]:
    from rxt_model.cli.loading import COMPONENT_NAMES

    defects = report["defects"]
    yield f"{report['model']}: {COMPONENT_NAMES[report['component']]}"
    yield f"Known defects of the upstream library that affect it: {len(defects) or 'none'}"
    for defect in defects:
        number = "" if defect["number"] is None else f" (defect {defect['number']} of the specification)"
        yield ""
        yield f"  {defect['name']}{number}: {defect['state']}"
        yield f"    upstream  {defect['upstream']}"
        yield f"    here      {defect['here']}"
    if report["assumed"]:
        yield ""
        yield "Assumed, since its files do not tell"
        for sentence in report["assumed"]:
            yield f"  {sentence}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _benchmarks() -> list[str]:
    from rxt_model.cli.bench import known_benchmarks
    from rxt_model.cli.errors import UserError

    try:
        return list(known_benchmarks())
    except UserError:
        return []


def _demo_model() -> dict[str, Any]:
    """Whether the shipped model is there and loads, and which one it is."""
    from rxt_model.cli.errors import sentence
    from rxt_model.demo_model import demo_model_directory, load_demo_model
    from rxt_model.interaction.state import model_fingerprint

    try:
        directory = demo_model_directory()
    except FileNotFoundError as error:
        return {"state": "missing", "reason": sentence(error)}
    try:
        model = load_demo_model()
        content = (directory / "model.safetensors").read_bytes()
    except (ValueError, OSError) as error:
        return {"state": "damaged", "reason": sentence(error)}
    return {
        "state": "present",
        "directory": str(directory),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "fingerprint": model_fingerprint(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "decoding": model.explain(),
    }


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    from rxt_kernels import info

    yield info.report_text(dict(report))
    yield ""
    yield "Packages"
    for name, version in report["required_packages"].items():
        yield f"  {name:<18} {version or 'missing: pip install ' + name}"
    for name, package in report["optional_packages"].items():
        yield f"  {name:<18} {package['version'] or 'not installed'} (optional: {package['for']})"
    yield ""
    demo = report["demo_model"]
    yield f"Demo model: {demo['state']}"
    if demo["state"] == "present":
        yield f"  {demo['directory']}"
        yield f"  {demo['parameters']:,} parameters, {demo['bytes']:,} bytes"
        yield f"  sha256 {demo['sha256'][:16]}, fingerprint {demo['fingerprint'][:12]}"
        yield f"  {demo['decoding']}"
    else:
        yield f"  {demo['reason']}"
    names = ", ".join(report["benchmarks"])
    yield f"Benchmarks: {names or 'not in this installation; install rxt-kernels from its source tree'}"
