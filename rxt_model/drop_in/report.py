"""What `accelerate` did to a model, and why it did no more."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NothingAcceleratedError", "Replaced", "Report", "Skipped"]


class NothingAcceleratedError(ValueError):
    """Nothing in a model could be replaced; the message holds every reason."""


@dataclass(frozen=True)
class Replaced:
    """One module, or one method of it, that is computed here from now on.

    Attributes:
        path: where it is in the model; "" for the model itself.
        name: class of the module, or name of the method.
        parts: what is computed by operations of this package.
        difference: norm of the difference to upstream's own output over the norm of that, on random input without padding;
            None if the two were not compared.
        note: what else should be known, such as why they were not compared.
    """

    path: str
    name: str
    parts: tuple[str, ...]
    difference: float | None = None
    note: str = ""

    def __str__(self) -> str:
        compared = "" if self.difference is None else f"; differs from upstream by {self.difference:.0e}"
        note = f"; {self.note}" if self.note else ""
        return f"{_place(self.path, self.name)}: {', '.join(self.parts)}{compared}{note}"


@dataclass(frozen=True)
class Skipped:
    """One module, or one method of it, that stays as it was, with the reason in a sentence."""

    path: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{_place(self.path, self.name)}: {self.reason}"


@dataclass(frozen=True)
class Report:
    """What was replaced in a model and what was not.

    Example:
        >>> print(Report("RxTDecoder", "exact", (Replaced("", "RxTDecoder", ("attention",)),), ()))
        RxTDecoder, parity with the paper ('exact')
          replaced  RxTDecoder: attention
    """

    model: str
    parity: str
    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        aim = "the paper" if self.parity == "exact" else "upstream's training"
        lines = [f"{self.model}, parity with {aim} ({self.parity!r})"]
        lines += [f"  replaced  {entry}" for entry in self.replaced]
        lines += [f"  skipped   {entry}" for entry in self.skipped]
        return "\n".join(lines)


def _place(path: str, name: str) -> str:
    return f"{path} ({name})" if path else name
