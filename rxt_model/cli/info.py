"""``rxt info``: what a preset, a checkpoint or a saved conversation is."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rxt_model.cli.errors import UserError

if TYPE_CHECKING:
    from rxt_model.checkpoint.hub import PretrainedModel

__all__ = ["add_arguments", "model_classes", "run"]

_EPILOG = """\
PRESET is a name of the list that `rxt info` prints, or a component of one, such as rxt-beta-micro/encoder; `demo` is the
shipped model. PATH is a directory with config.json and model.safetensors, or a saved conversation.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``rxt info``."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "name", nargs="?", metavar="PRESET|PATH", help="what to look into; left out, presets are listed"
    )
    parser.add_argument("--keys", action="store_true", help="list every tensor of a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON (the tensors of a checkpoint included)")


def run(options: argparse.Namespace) -> int:
    """Print what was asked about."""
    if options.name is None:
        if options.keys:
            raise UserError("info: --keys needs a checkpoint to list; name its directory.")
        return _list_presets(options.json)
    report = _report(options.name)
    if options.keys and "file" not in report:
        raise UserError(f"info: --keys lists the tensors of a checkpoint, and {options.name} is a {report['kind']}.")
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    print("\n".join(_lines(report)))
    if options.keys:
        print("\nTensors")
        for key in report["file"]["tensors"]:
            print(f"  {key['name']}  {key['dtype']}  {tuple(key['shape'])}")
    return 0


def _list_presets(as_json: bool) -> int:
    from rxt_model.presets import PRESETS

    if as_json:
        print(json.dumps({name: found.description for name, found in PRESETS.items()}, indent=2))
        return 0
    width = max(map(len, PRESETS))
    for name, found in PRESETS.items():
        print(f"{name:<{width}}  {found.description}")
    return 0


def _report(name: str) -> dict[str, Any]:
    from rxt_model.cli.loading import DEMO, checkpoint_directory
    from rxt_model.presets import PRESETS

    path = Path(name).expanduser()
    if path.is_file():
        return _conversation(path)
    if name == DEMO or path.is_dir():
        return _checkpoint(name, checkpoint_directory(name))
    if name.partition("/")[0] in PRESETS:
        return _preset(name)
    raise UserError(
        f"info: {name!r} is no preset, and there is no such directory or file; `rxt info` lists the presets."
    )


def _preset(name: str) -> dict[str, Any]:
    from rxt_model.checkpoint.grammar import upstream_grammar
    from rxt_model.cli.description import describe_model
    from rxt_model.presets import build, preset

    chosen = preset(name)
    model = build(name, device="meta")
    grammar = upstream_grammar(model)
    return {
        "kind": "preset",
        "name": name,
        "description": chosen.description,
        "unpublished": chosen.unpublished or None,
        **describe_model(model),
        "upstream_file": {"dtype": "float32", "bytes": grammar.file_size, "tensors": len(grammar.shapes)},
    }


def _checkpoint(name: str, directory: Path) -> dict[str, Any]:
    from rxt_model.checkpoint.loading import find_weights
    from rxt_model.checkpoint.reader import SafetensorsFile
    from rxt_model.cli.description import describe_model
    from rxt_model.cli.loading import component_of

    component = component_of(directory)
    # On the meta device: every check that loading makes, and no weights kept.
    model = model_classes()[component].from_pretrained(directory, device="meta")
    with SafetensorsFile(find_weights(directory)) as weights:
        tensors = [
            {"name": entry.name, "dtype": str(entry.dtype).removeprefix("torch."), "shape": list(entry.shape)}
            for entry in weights.entries.values()
        ]
        path, metadata, size = weights.path, dict(weights.metadata), weights.path.stat().st_size
    return {
        "kind": "checkpoint",
        "name": name,
        **describe_model(model),
        "tokenizer": (directory / "tokenizer.json").is_file(),
        "file": {
            "path": str(path),
            "bytes": size,
            "dtypes": dict(Counter(tensor["dtype"] for tensor in tensors)),
            "metadata": metadata,
            "tensors": tensors,
        },
    }


def model_classes() -> Mapping[str, type[PretrainedModel]]:
    """The class for every kind of checkpoint."""
    import rxt_model as package

    classes: tuple[type[PretrainedModel], ...] = (
        package.RxTAlpha,
        package.RxTBeta,
        package.RxTDecoder,
        package.RxTEncoder,
        package.RxTMemoryAttention,
        package.MLMHead,
        package.SparseQueryTransformer,
    )
    return {model_class.component: model_class for model_class in classes}


def _conversation(path: Path) -> dict[str, Any]:
    from rxt_model.cli.transcript import Transcript
    from rxt_model.interaction.state import load_state

    state = load_state(path)
    layers, batch, slots, width = state.memory.shape
    return {
        "kind": "saved conversation",
        "name": str(path),
        "turns": state.turns,
        "fingerprint": state.fingerprint,
        "memory": {
            "layers": layers,
            "conversations": batch,
            "slots": slots,
            "width": width,
            "dtype": str(state.memory.dtype).removeprefix("torch."),
            "bytes": state.memory.numel() * state.memory.element_size(),
        },
        "bytes": path.stat().st_size,
        "exchanges": len(Transcript.from_notes(state.notes).exchanges),
    }


# -- as text ----------------------------------------------------------------------------------------------------------


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    if report["kind"] == "saved conversation":
        yield from _conversation_lines(report)
        return
    yield f"{report['name']}: {report.get('description') or _component_name(report['component'])}"
    if report.get("unpublished"):
        yield f"  {report['unpublished']}"
    yield ""
    yield f"{'Parameters':<38} {'total':>13} {'active':>13}"
    for kind, component in report["components"].items():
        if len(report["components"]) > 1:
            yield _count_line(kind.replace("_", " "), component["parameters"])
    shared = ", embedding counted once" if len(report["components"]) > 1 else ""
    yield _count_line(f"whole model{shared}", report["parameters"])
    for kind, component in report["components"].items():
        yield ""
        yield kind.replace("_", " ").capitalize()
        for name, value in component.items():
            if name != "parameters":
                yield f"  {name.replace('_', ' '):<24} {_value(value)}"
    memory = report["memory"]
    if memory is not None:
        sizes = ", ".join(f"{count:,} in {dtype}" for dtype, count in memory["state_bytes"].items())
        yield ""
        yield "Short-term memory of one conversation"
        yield f"  {'slots':<24} {memory['layers']} layers x {memory['slots']} slots x {memory['width']} values"
        yield f"  {'bytes':<24} {sizes}, whatever the number of turns"
    yield ""
    yield from _file_lines(report)


def _file_lines(report: Mapping[str, Any]) -> Iterator[str]:
    file = report.get("file")
    if file is None:
        expected = report["upstream_file"]
        yield f"A file of it has {expected['bytes']:,} bytes and {expected['tensors']:,} tensors in {expected['dtype']}."
        return
    dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in file["dtypes"].items())
    yield f"{file['path']}: {file['bytes']:,} bytes, {len(file['tensors']):,} tensors ({dtypes}); --keys lists them."
    if report["component"] in ("rxt_alpha", "rxt_beta"):
        yield "It has a tokenizer." if report["tokenizer"] else "It has no tokenizer.json."


def _conversation_lines(report: Mapping[str, Any]) -> Iterator[str]:
    memory = report["memory"]
    yield f"{report['name']}: a saved conversation"
    yield f"  {'turns':<24} {report['turns']}, {report['exchanges']} of them with their text"
    yield (
        f"  {'memory':<24} {memory['layers']} layers x {memory['slots']} slots x {memory['width']} values, "
        f"{memory['bytes']:,} bytes in {memory['dtype']}"
    )
    yield f"  {'file':<24} {report['bytes']:,} bytes"
    yield f"  {'model':<24} fingerprint {report['fingerprint'][:12]}; no other model can continue it"


def _component_name(component: str) -> str:
    from rxt_model.cli.loading import COMPONENT_NAMES

    return COMPONENT_NAMES[component]


def _count_line(name: str, counts: Mapping[str, int]) -> str:
    return f"  {name:<36} {counts['total']:>13,} {counts['active']:>13,}"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_value(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
