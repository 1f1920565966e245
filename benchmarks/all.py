"""Every benchmark in a short version, in under ten minutes, and a report of all with tables and plots.

    rxt bench all                                       # benchmarks/results/REPORT.md, its data beside it in short/
    rxt bench all --output runs/report/REPORT.md
    rxt bench all --resume                              # go on where Ctrl-C, or the end of a machine, stopped it
    rxt bench all --only sqa gpu_static

Each benchmark runs in a process of its own, saves what it measured, and is not run again by --resume on the same commit.
Short versions have few repeats: they show that everything works and roughly how fast; figures to quote come from the
benchmarks themselves, see NOTES.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rxt_model.files import atomic_path

from . import BENCHMARKS
from .environment import cores, describe_environment
from .running import main as common_main

__all__ = ["STEPS", "Step", "add_arguments", "main", "run"]

NAME = "all"
FORMAT = "rxt-benchmark-report"
_DEFAULT = Path("benchmarks/results/REPORT.md")
_ENOUGH = "3"  # seconds of measuring per size


@dataclass(frozen=True)
class Step:
    """A benchmark in short.

    Attributes:
        name: of the benchmark.
        arguments: that make it short.
        seconds: that it takes on two cores, about; for the bar of progress.
        has_plot: whether it draws.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    has_plot: bool = True

    def command(self, folder: Path) -> list[str]:
        """The command line, with the files it writes."""
        files: tuple[str, ...] = ("--json", str(folder / f"{self.name}.json"))
        if self.has_plot:
            files += ("--plot", str(folder / f"{self.name}.png"))
        return [sys.executable, "-m", f"rxt_benchmarks.{self.name}", *self.arguments, *files]

    def plots(self, folder: Path) -> list[Path]:
        """The light picture and the dark one, of which there may be none, or one for both."""
        if not self.has_plot:
            return []
        return [path for path in (folder / f"{self.name}.png", folder / f"{self.name}-dark.png") if path.is_file()]


_MICRO = ("--short", "--time-limit", _ENOUGH, "--model", "rxt-alpha-micro-plus")
STEPS = (
    Step("scaling", ("--short", "--turns", "16"), 45),
    Step("memory", ("--conversations", "10", "--distances", "1", "8"), 60),
    Step("sqa", ("--short", "--time-limit", _ENOUGH), 25),
    Step("drift", ("--short",), 40),
    Step("decode", _MICRO, 30),
    Step("prefill", _MICRO, 20),
    Step("update", _MICRO, 20),
    Step("moe", _MICRO, 20),
    Step("train", (*_MICRO, "--batch", "2"), 40),
    Step("launches", ("--model", "rxt-alpha-micro-plus"), 40, has_plot=False),
    Step("gpu_static", (), 6),
)
"""What is run, in this order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench all``."""
    parser.add_argument("--output", type=Path, default=_DEFAULT, metavar="FILE", help="report (default: %(default)s)")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="these benchmarks only")
    parser.add_argument("--resume", action="store_true", help="leave out what was finished on this commit")


class _State:
    """What is done, in a file beside the results, so that a run can be continued."""

    def __init__(self, folder: Path, should_resume: bool) -> None:
        self._path = folder / "all.json"
        self.environment = describe_environment()
        self.done: dict[str, dict[str, Any]] = {}
        if should_resume and self._path.is_file():
            self.done = self._earlier()

    def _earlier(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{self._path} is not what `rxt bench all` writes; leave --resume out to begin anew.")
        same = all(content["environment"].get(name) == self.environment[name] for name in ("cpu", "torch", "commit"))
        return dict(content["done"]) if same else {}

    def finish(self, name: str, status: int, seconds: float, output: str) -> None:
        """Take down the end of one benchmark."""
        self.done[name] = {"status": status, "seconds": round(seconds, 1), "output": output}
        content = {"format": FORMAT, "environment": self.environment, "done": self.done}
        with atomic_path(self._path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _run(step: Step, folder: Path) -> tuple[int, str]:
    """Exit status and output of one benchmark; Ctrl-C reaches it too, and it then saves what it has.

    Raises:
        KeyboardInterrupt: after it has ended.
    """
    with subprocess.Popen(
        step.command(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    ) as process:
        try:
            output = process.communicate()[0]
        except KeyboardInterrupt:
            process.communicate()  # while it ends, what it prints has to be read
            raise
    return process.returncode, output.replace("\r", "\n").strip()


def _picture(plots: Sequence[Path], name: str, base: Path) -> list[str]:
    if not plots:
        return []
    light, dark = plots[0].relative_to(base).as_posix(), plots[-1].relative_to(base).as_posix()
    return [
        "",
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">',
        f'  <img alt="{name}: {BENCHMARKS[name]}" src="{light}">',
        "</picture>",
    ]


def report(done: Mapping[str, Mapping[str, Any]], environment: Mapping[str, Any], folder: Path, base: Path) -> str:
    """The report as Markdown.

    Args:
        done: what each benchmark ended with.
        environment: of the machine.
        folder: where plots are.
        base: the folder that the report lies in.
    """
    total = sum(one["seconds"] for one in done.values())
    missing = [step.name for step in STEPS if step.name not in done]
    lines = [
        "# Benchmarks in short",
        "",
        f"Written by `rxt bench all` in {total / 60:.1f} minutes, on {environment['cores']} cores of {environment['cpu']}, torch "
        f"{environment['torch']}, commit {str(environment['commit'])[:12]}. Few repeats each: figures to quote come from the "
        "benchmarks themselves (`benchmarks/NOTES.md`).",
        "",
        "| benchmark | question | ended | seconds |",
        "|---|---|---|---|",
    ]
    for step in STEPS:
        if step.name in done:
            one = done[step.name]
            ended = "well" if one["status"] == 0 else f"with status {one['status']}"
            lines.append(f"| [{step.name}](#{step.name}) | {BENCHMARKS[step.name]} | {ended} | {one['seconds']:.0f} |")
    if missing:
        lines += ["", f"Not run: {', '.join(missing)} (`rxt bench all --resume` goes on)."]
    for step in STEPS:
        if step.name not in done:
            continue
        command = f"rxt bench {' '.join((step.name, *step.arguments))}"
        lines += [
            "",
            f"## {step.name}",
            "",
            f"{BENCHMARKS[step.name][0].upper()}{BENCHMARKS[step.name][1:]}: `{command}`",
        ]
        lines += [*_picture(step.plots(folder), step.name, base), "", "```text", done[step.name]["output"], "```"]
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing and write the report; the exit status is 1 if one ended badly, 130 if interrupted.

    Raises:
        ValueError, OSError: a state that cannot be continued, a folder that cannot be written.
    """
    base = arguments.output.parent
    folder = base / "short"
    folder.mkdir(parents=True, exist_ok=True)
    state = _State(folder, arguments.resume)
    missing = [
        step for step in STEPS if step.name in arguments.only and state.done.get(step.name, {"status": 1})["status"]
    ]
    status = 0
    with tqdm(total=sum(step.seconds for step in missing), unit="s", disable=None) as progress:
        for step in missing:
            progress.set_description(step.name)
            start = time.monotonic()
            try:
                ended, output = _run(step, folder)
            except KeyboardInterrupt:
                status = 130
                break
            seconds = time.monotonic() - start
            state.finish(step.name, ended, seconds, output)
            progress.write(f"{step.name}: {seconds:.0f} s, {'well' if ended == 0 else f'status {ended}'}")
            progress.update(step.seconds)
            if ended == 130:
                status = 130
                break
    with atomic_path(arguments.output) as temporary:
        temporary.write_text(report(state.done, state.environment, folder, base), encoding="utf-8")
    print(f"Report: {arguments.output} ({cores()} cores)")
    return status or int(any(one["status"] for one in state.done.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.all``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
