"""The two layers that this family is known for, as modules for any torch model: plain arguments, ready to be trained.

    from rxt_model.modules import MixtureOfExperts, SparseQueryAttention

They are the layers of this package's models (:mod:`rxt_model.layers`), with the same weights under the same names; what is
added are arguments instead of a configuration, and positions that are counted here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_kernels import MixtureOfExpertsOutput
from rxt_kernels.checks import probability, refuse_shape, refuse_value
from rxt_kernels.mixture_of_experts.reference import ACTIVATIONS
from rxt_model.cache import SelfAttentionCache
from rxt_model.layers import attention, mixture_of_experts
from rxt_model.layers.mixture_of_experts import MixtureOfExpertsOptions
from rxt_model.layers.rotary import RotaryPositions

__all__ = ["MixtureOfExperts", "SparseQueryAttention"]


def _positive(**values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or value < 1:
            refuse_value(name, value, "an integer of at least 1")


class SparseQueryAttention(attention.SparseQueryAttention):
    """Self-attention with fewer query heads than a layer of this width would have, and rotary positions.

    Scores cost in proportion to the query heads, so a quarter of them is a quarter of the time that attention over a long
    input takes. ``query_heads`` may also be the larger number (grouped-query attention) or both may be equal.

    Args:
        dim: width of the input and of the output, D.
        head_dim: width of a head, even if there are rotary positions.
        query_heads, key_value_heads: one divides the other; heads are repeated until there are as many of both.
        rope_base: base of the rotary frequencies; None leaves positions out.
        bias: whether the output projection has one.
        gated: multiply the heads by a sigmoid gate of the input before the output projection.
        dropout: dropout of attention weights while training.

    Raises:
        ValueError: sizes below 1, head counts of which neither divides the other, an odd ``head_dim`` with rotary
            positions, or a dropout outside of [0, 1).

    Example:
        >>> layer = SparseQueryAttention(64, head_dim=16, query_heads=2, key_value_heads=4)
        >>> x = torch.randn(3, 10, 64)
        >>> layer(x, causal=True).shape
        torch.Size([3, 10, 64])

        Padding is hidden by a mask, True at real tokens:

        >>> layer(x, key_mask=torch.arange(10) < torch.tensor([[10], [7], [4]])).shape
        torch.Size([3, 10, 64])

        Token by token, with the keys and values of what came before:

        >>> cache = layer.new_cache(3)
        >>> steps = [layer(x[:, :8], cache=cache), layer(x[:, 8:9], cache=cache), layer(x[:, 9:], cache=cache)]
        >>> torch.allclose(torch.cat(steps, dim=1), layer(x, causal=True), atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int,
        query_heads: int,
        key_value_heads: int,
        rope_base: int | None = 10_000,
        bias: bool = True,
        gated: bool = False,
        dropout: float = 0.0,
    ) -> None:
        _positive(dim=dim, head_dim=head_dim, query_heads=query_heads, key_value_heads=key_value_heads)
        if query_heads % key_value_heads and key_value_heads % query_heads:
            raise ValueError(
                f"query_heads is {query_heads} and key_value_heads is {key_value_heads}; accepted are numbers of which one "
                "divides the other."
            )
        if rope_base is not None:
            _positive(rope_base=rope_base)
            if head_dim % 2:
                refuse_value(
                    "head_dim", head_dim, "an even number, since rotary positions turn pairs; or rope_base=None"
                )
        probability("dropout", dropout)
        super().__init__(dim, head_dim, (query_heads, key_value_heads), output_bias=bias, gated=gated, dropout=dropout)
        self.rotary = None if rope_base is None else RotaryPositions(head_dim, rope_base, "float32")

    def new_cache(self, batch_size: int, *, capacity: int = 64, limit: int | None = None) -> SelfAttentionCache:
        """Empty keys and values for so many rows: room for ``capacity`` tokens each, doubled when full, up to ``limit``."""
        return SelfAttentionCache(1, batch_size, capacity=capacity, limit=limit, device=self.q_proj.weight.device)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        causal: bool = False,
        key_mask: Tensor | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> Tensor:
        """Attend: (B, T, D) to (B, T, D).

        Args:
            x: (B, T, D).
            causal: whether a token sees only itself and what came before; with a cache that is always so.
            key_mask: (B, T) bool, True where a key may be seen; None shows all. Not with a cache.
            cache: from :meth:`new_cache`; ``x`` goes on behind what it holds, and is added to it.

        Raises:
            TypeError, ValueError: a shape, dtype or device that does not fit, a cache of another batch or together with a
                mask or with dropout.
        """
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.q_proj.in_features:
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"x is {type(x).__name__}; accepted is a tensor (batch, time, {self.q_proj.in_features})."
                )
            refuse_shape("x", x, f"(batch, time, {self.q_proj.in_features})")
        time = x.shape[1]
        if cache is None:
            return super().forward(
                x, self._angles(torch.arange(time, device=x.device), x), causal=causal, key_mask=key_mask
            )
        if key_mask is not None:
            raise ValueError("key_mask is given together with a cache, of which every token counts; give one of them.")
        if self._dropout():
            raise ValueError(
                f"dropout is {self.dropout} while training, which decoding with a cache has not; call eval()."
            )
        cache.check(1, x.shape[0], None)
        cache.begin(time)
        attended = super().forward(x, self._angles(cache.positions(time), x), causal=True, cache=cache.layers[0])
        cache.advance(time)
        return attended

    def _angles(self, positions: Tensor, x: Tensor) -> Tensor | None:
        return None if self.rotary is None else self.rotary.angles(positions, x.dtype)


class MixtureOfExperts(mixture_of_experts.StackedMixtureOfExperts):
    """A sparse feed-forward layer: every token goes through the ``top_k`` experts that its router prefers.

    No token is dropped and no expert has a capacity. The load-balance loss comes back beside the output; add a small multiple
    of it (0.01, say) to what is trained, or leave it.

    Args:
        dim: width of the input and of the output, D.
        hidden: hidden width of an expert, F.
        experts: routed experts, E.
        top_k: experts per token, 1 to E.
        gated: an expert is ``(x W * act(x V)) U``, as in SwiGLU; False: ``act(x W) U``.
        activation: "silu", "relu", "gelu", "sigmoid" or "linear".
        shared_experts: experts of the same width that every token goes through, besides; several share a softmax gate.
        bias: whether every expert has biases.
        dropout: dropout of hidden units while training.
        router_dtype: dtype of the router's logits; None is that of the input. float32 makes routing in half precision stable.

    Raises:
        ValueError: sizes below 1 (or below 0 for ``shared_experts``), ``top_k`` above ``experts``, an unknown activation or
            dtype, or a dropout outside of [0, 1).

    Example:
        >>> layer = MixtureOfExperts(32, hidden=64, experts=8, top_k=2)
        >>> found = layer(torch.randn(3, 10, 32))
        >>> found.output.shape, found.load_balance_loss.shape
        (torch.Size([3, 10, 32]), torch.Size([]))
        >>> loss = found.output.square().mean() + 0.01 * found.load_balance_loss
        >>> loss.backward()
        >>> layer.w1.grad.shape
        torch.Size([8, 32, 128])
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int,
        experts: int,
        top_k: int,
        gated: bool = True,
        activation: str = "silu",
        shared_experts: int = 0,
        bias: bool = False,
        dropout: float = 0.0,
        router_dtype: torch.dtype | None = None,
    ) -> None:
        _positive(dim=dim, hidden=hidden, experts=experts, top_k=top_k)
        if top_k > experts:
            refuse_value("top_k", top_k, f"a number from 1 to the {experts} experts that there are")
        if type(shared_experts) is not int or shared_experts < 0:
            refuse_value("shared_experts", shared_experts, "an integer of at least 0")
        if activation not in ACTIVATIONS:
            refuse_value("activation", activation, ", ".join(map(repr, ACTIVATIONS)))
        if router_dtype is not None and not (isinstance(router_dtype, torch.dtype) and router_dtype.is_floating_point):
            refuse_value("router_dtype", router_dtype, "a floating-point dtype of torch, or None")
        probability("dropout", dropout)
        mode = "local" if bias else "off"
        super().__init__(
            MixtureOfExpertsOptions(
                dim=dim,
                hidden=hidden,
                num_experts=experts,
                top_k=top_k,
                gated=gated,
                activation=activation,
                dropout=dropout,
                num_shared=shared_experts,
                shared_hidden=hidden,
                weighted_shared=False,
                bias_mode=mode,
                shared_bias_mode=mode,
                router_dtype=router_dtype,
            )
        )

    def forward(self, x: Tensor) -> MixtureOfExpertsOutput:
        """(..., D) to ``output`` (..., D) and ``load_balance_loss`` (a scalar).

        Raises:
            TypeError, ValueError: an input that does not fit.
        """
        return super().forward(x)

    def extra_repr(self) -> str:
        options = self.options
        return f"{options.dim}, hidden={options.hidden}, experts={options.num_experts}, top_k={options.top_k}"
