"""Linear cross-entropy by the native kernels against its definition, on every instruction set.

Shapes are chosen for where the kernels cut their work: blocks of 96 rows and of 96 classes, panels of 16 classes, groups of 1,920
classes, chunks of 960 rows.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rxt_kernels import linear_cross_entropy, native_runtime
from rxt_kernels.testing import GRADIENT_FACTOR, OUTPUT_FACTOR, VIEWS, assert_accurate

pytestmark = pytest.mark.usefixtures("every_instruction_set")

DTYPES = (torch.float32, torch.bfloat16)
# (rows, classes, width)
SHAPES = [
    (1, 1, 1),
    (1, 2, 3),
    (3, 17, 8),
    (7, 96, 16),
    (96, 97, 5),
    (97, 200, 24),
    (5, 1921, 33),
    (961, 40, 20),
    (2, 4000, 16),
]


def _draw(
    rows: int, classes: int, width: int, dtype: torch.dtype, ignored: int = -100
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias and target; about a third of the targets are to be ignored, never the first."""
    generator = torch.Generator().manual_seed(rows + classes)
    hidden, weight = torch.randn(rows, width, generator=generator), torch.randn(classes, width, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    target[1:][torch.rand(rows - 1, generator=generator) < 0.3] = ignored
    bias = torch.randn(classes, generator=generator)
    return (*(side.to(dtype) for side in (hidden, 2.0 * weight / width**0.5, bias)), target)


def _run(
    sides: tuple[Tensor, ...], target: Tensor, reduction: str, backend: str, dtype: torch.dtype, ignored: int = -100
) -> list[Tensor]:
    """The loss and the gradients of hidden, weight and, where there is one, bias."""
    leaves = [side.detach().to(dtype).requires_grad_() for side in sides]
    loss = linear_cross_entropy(
        *leaves[:2],
        target,
        bias=leaves[2] if len(leaves) > 2 else None,
        ignore_index=ignored,
        reduction=reduction,
        backend=backend,
    )
    incoming = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float32).view(loss.shape).to(dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, incoming)]


def _compare(sides: tuple[Tensor, ...], target: Tensor, reduction: str, ignored: int = -100) -> None:
    dtype = sides[0].dtype
    actual, eager = (_run(sides, target, reduction, name, dtype, ignored) for name in ("native", "reference"))
    exact = _run(sides, target, reduction, "reference", torch.float64, ignored)
    for index, found in enumerate(zip(actual, eager, exact, strict=True)):
        assert_accurate(*found, factor=OUTPUT_FACTOR if index == 0 else GRADIENT_FACTOR)
    bias = sides[2] if len(sides) > 2 else None
    plain = linear_cross_entropy(
        *sides[:2], target, bias=bias, ignore_index=ignored, reduction=reduction, backend="native"
    )
    assert torch.equal(plain, actual[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden, weight, bias, target = _draw(*shape, dtype)
    _compare((hidden, weight, bias), target, "mean")
    _compare((hidden, weight), target, "none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [-100, 0, 11])
def test_reductions_and_ignored_targets(ignored: int, reduction: str) -> None:
    hidden, weight, bias, target = _draw(40, 50, 12, torch.float32, ignored)
    target[0] = 1
    _compare((hidden, weight, bias), target, reduction, ignored)


def test_leading_dimensions() -> None:
    hidden, weight, bias, target = _draw(24, 30, 8, torch.float32)
    _compare((hidden.view(2, 3, 4, 8), weight, bias), target.view(2, 3, 4), "none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_but_ignored_targets(rows: int, reduction: str) -> None:
    """The loss is 0 and so are the gradients, whatever the rows hold."""
    hidden, weight = torch.full((rows, 4), float("nan"), requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target = torch.full((rows,), -100)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, backend="native")
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient in torch.autograd.grad(loss.sum(), (hidden, weight)):
        assert not gradient.any()


@pytest.mark.parametrize("view", [*VIEWS, "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(view: str, dtype: torch.dtype) -> None:
    hidden, weight, bias, target = _draw(30, 40, 12, dtype)
    if view == "expanded":
        hidden, target = hidden[:1].expand(30, 12), target[:1].expand(30)
        sides: tuple[Tensor, ...] = (hidden, weight, bias)
        copies: tuple[Tensor, ...] = (hidden.clone(), weight, bias)
    else:
        copies = (hidden, weight, bias)
        sides = tuple(VIEWS[view](side) for side in copies)
    for reduction in ("sum", "none"):
        found = []
        for tensors in (sides, copies):
            leaves = [side.detach().requires_grad_() for side in tensors]
            loss = linear_cross_entropy(*leaves[:2], target, bias=leaves[2], reduction=reduction, backend="native")
            found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_large_logits_hidden_classes_and_not_a_number() -> None:
    def losses(hidden: Tensor, weight: Tensor, target: list[int], bias: Tensor | None = None) -> list[float]:
        return linear_cross_entropy(
            hidden, weight, torch.tensor(target), bias=bias, reduction="none", backend="native"
        ).tolist()  # fmt: skip

    assert losses(torch.tensor([[1e4], [-3e4]]), torch.tensor([[1.0], [-1.0]]), [1, 1]) == [2e4, 0.0]
    # A whole block of classes that is ruled out, before and behind those that are not.
    bias = torch.full((300,), float("-inf"))
    bias[150:160] = 0.0
    found = losses(torch.zeros(2, 4), torch.randn(300, 4), [155, 159], bias)
    assert found == pytest.approx([2.302585, 2.302585])
    x, weight = torch.ones(3, 4), torch.ones(200, 4)
    x[1, 2] = float("nan")
    found = losses(x, weight, [0, 0, 199])
    assert found[1] != found[1]
    assert [found[0], found[2]] == pytest.approx([5.298317, 5.298317])
    weight[170] = float("inf")
    assert all(loss != loss for loss in losses(x, weight, [0, 0, 199]))


def test_a_confident_answer_keeps_its_digits() -> None:
    """The largest logit is taken off before anything is added to it: 30 + log(1 + e^-5) has lost most digits of the loss."""
    loss = linear_cross_entropy(
        torch.ones(1, 1), torch.tensor([[30.0], [25.0]]), torch.tensor([0]), backend="native"
    )  # fmt: skip
    assert loss.item() == pytest.approx(math.log1p(math.exp(-5.0)), rel=2e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_for_every_number_of_threads(reduction: str) -> None:
    hidden, weight, bias, target = _draw(1000, 500, 32, torch.float32)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found.append(_run((hidden, weight, bias), target, reduction, "native", torch.float32))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="The peak of memory is read as Linux tells it.")
def test_the_logits_are_never_all_there() -> None:
    """The most memory that both passes take together, where the logits alone are 120 MB."""
    rows, classes = 1500, 20_000
    sides = torch.randn(rows, 1), torch.randn(classes, 1)
    target = torch.randint(classes, (rows,))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what there is now
    before = _peak_of_memory()
    _run(sides, target, "mean", "native", torch.float32)
    assert _peak_of_memory() - before < 40e6


def _peak_of_memory() -> float:
    """Bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_traces_and_checks_as_an_operation() -> None:
    from rxt_kernels.linear_cross_entropy import native

    hidden, weight, bias, target = _draw(5, 9, 8, torch.float32)
    leaves = [side.requires_grad_() for side in (hidden, weight, bias)]
    for reduction in ("mean", "none"):
        torch.library.opcheck(native._linear_cross_entropy, (*leaves[:2], target, leaves[2], -100, reduction))

    def loss(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, bias=bias, backend="native")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), loss(hidden))


def test_the_extension_refuses_what_does_not_fit() -> None:
    extension = native_runtime.extension
    hidden, weight, target, losses = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 4, -100]), torch.empty(3)
    good = {
        "hidden": hidden, "weight": weight, "target": target, "bias": torch.ones(5), "ignored": -100, "mean": True,
        "losses": losses, "total": torch.empty(()), "softmax_sums": torch.empty(2, 3),
    }  # fmt: skip
    extension.linear_cross_entropy_forward(**good)
    extension.linear_cross_entropy_forward(**{**good, "bias": None, "total": None, "softmax_sums": None})
    for change, error, message in [
        ({"hidden": hidden.double()}, TypeError, "hidden has a dtype"),
        ({"hidden": hidden[0]}, ValueError, "accepted are 2 dimensions"),
        ({"hidden": torch.ones(4, 3).t()}, ValueError, "hidden has stride"),
        ({"weight": weight.bfloat16()}, TypeError, "weight is bfloat16; accepted is float32"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight has shape \(5, 3\); accepted is \(any, 4\)"),
        ({"target": target.int()}, TypeError, "target has a dtype"),
        ({"target": target[:2]}, ValueError, r"target has shape \(2,\); accepted is \(3,\)"),
        (
            {"target": target + 1},
            ValueError,
            "target is 5; accepted are class numbers from 0 to 4, or ignore_index -100",
        ),
        ({"ignored": 0}, ValueError, "target is -100; accepted are class numbers"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\); accepted is \(5,\)"),
        ({"losses": torch.empty(2)}, ValueError, "losses has shape"),
        ({"losses": torch.empty(3).bfloat16()}, TypeError, "losses is bfloat16; accepted is float32"),
        ({"total": torch.empty(1)}, ValueError, "total has shape"),
        ({"softmax_sums": torch.empty(3, 2)}, ValueError, "softmax_sums has shape"),
    ]:
        with pytest.raises(error, match=message):
            extension.linear_cross_entropy_forward(**{**good, **change})
    good = {
        "loss_gradients": losses, "softmax_sums": torch.empty(2, 3), "hidden": hidden, "weight": weight, "target": target,
        "bias": torch.ones(5), "ignored": -100, "hidden_gradient": torch.empty(3, 4), "weight_gradient": torch.empty(5, 4),
        "bias_gradient": torch.empty(5),
    }  # fmt: skip
    extension.linear_cross_entropy_backward(**good)
    for change, error, message in [
        ({"loss_gradients": torch.ones(1).expand(3)}, ValueError, "loss_gradients of shape .* is not contiguous"),
        ({"softmax_sums": torch.empty(3)}, ValueError, "softmax_sums has shape"),
        ({"hidden_gradient": torch.empty(4, 3).t()}, ValueError, "hidden_gradient of shape .* is not contiguous"),
        ({"weight_gradient": torch.empty(4, 5)}, ValueError, "weight_gradient has shape"),
        ({"bias_gradient": None}, ValueError, "bias and bias_gradient are given both or neither"),
        ({"bias_gradient": torch.empty(4)}, ValueError, "bias_gradient has shape"),
    ]:
        with pytest.raises(error, match=message):
            extension.linear_cross_entropy_backward(**{**good, **change})
