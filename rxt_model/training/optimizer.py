"""The optimizers of training, and their state by the names of the parameters.

``"adamw"`` moves every weight by its own scale. ``"muon"`` (Jordan, *Muon: an optimizer for hidden layers*; the rate matched to
that of AdamW as in Liu et al., *Muon is scalable for LLM training*, section 2.2) moves a matrix equally in all of its
directions. It is for the matrices inside of a network; embeddings, heads, routers, gates and vectors stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .settings import TrainingSettings

__all__ = ["NamedOptimizer"]

_OUTSIDE = ("embedding", "head.", "gate")


def _is_memory_gate(name: str) -> bool:
    return "gate_layers." in name


def _is_inside(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix, or a stack of them, between the features of two layers."""
    is_bias = name.endswith((".b1", ".b2"))  # one row per expert
    return parameter.dim() >= 2 and not is_bias and not any(part in name for part in _OUTSIDE)


def _matrices(name: str, parameter: nn.Parameter) -> dict[str, nn.Parameter]:
    """A matrix as it is; a stack of them, (E, N, M), as E parameters that share its memory."""
    if parameter.dim() == 2:
        return {name: parameter}
    return {f"{name}/{index}": nn.Parameter(matrix) for index, matrix in enumerate(parameter.detach().unbind())}


class NamedOptimizer:
    """The optimizer of a model: one or two of torch's, that know which parameter is which.

    Args:
        model: float32, what is trained.
        settings: ``optimizer``, ``learning_rate`` and ``weight_decay`` of them are used. Weight decay acts on matrices only,
            and on none of a memory gate.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = NamedOptimizer(model, TrainingSettings(optimizer="muon"))
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step(rate=0.01)
        >>> sorted(optimizer.state())[:3]
        ['exp_avg/0.bias', 'exp_avg/1.bias', 'exp_avg_sq/0.bias']
    """

    def __init__(self, model: nn.Module, settings: TrainingSettings) -> None:
        named = dict(model.named_parameters())
        inside = {n: p for n, p in named.items() if settings.optimizer == "muon" and _is_inside(n, p)}
        others = {n: p for n, p in named.items() if n not in inside}
        decayed = [p for n, p in others.items() if p.dim() >= 2 and not _is_memory_gate(n)]
        undecayed = [p for n, p in others.items() if p.dim() < 2 or _is_memory_gate(n)]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        ]
        self._parameters = dict(others)
        self._stacks: dict[nn.Parameter, list[nn.Parameter]] = {}
        if inside:
            matrices = {name: _matrices(name, parameter) for name, parameter in inside.items()}
            self._stacks = {p: list(matrices[n].values()) for n, p in inside.items() if p.dim() > 2}
            flat = {name: matrix for found in matrices.values() for name, matrix in found.items()}
            self._parameters |= flat
            self.parts.append(
                torch.optim.Muon(
                    flat.values(),
                    lr=settings.learning_rate,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def step(self, rate: float) -> None:
        """Move the weights against their gradients, at this learning rate."""
        for stack, matrices in self._stacks.items():
            gradients = [None] * len(matrices) if stack.grad is None else stack.grad.unbind()
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix.grad = gradient
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def state(self) -> dict[str, Tensor]:
        """Averages of the gradients, as ``"kind/parameter"``; the count of steps is left out."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for part in self.parts:
                for kind, value in part.state.get(parameter, {}).items():
                    if kind != "step":
                        tensors[f"{kind}/{name}"] = value.contiguous()
        return dict(sorted(tensors.items()))

    def load_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Put back what :meth:`state` gave after ``step`` steps; other tensors are passed over."""
        for part in self.parts:
            is_muon = isinstance(part, torch.optim.Muon)
            kinds = ("momentum_buffer",) if is_muon else ("exp_avg", "exp_avg_sq")
            own = {id(p) for group in part.param_groups for p in group["params"]}
            for name, parameter in self._parameters.items():
                found = {kind: tensors[f"{kind}/{name}"] for kind in kinds if f"{kind}/{name}" in tensors}
                if found and id(parameter) in own:
                    part.state[parameter] = found if is_muon else {"step": torch.tensor(float(step)), **found}
