"""Sparse query attention and memory cross-attention as modules: projections around the two operations (spec 2.4)."""

from __future__ import annotations

from torch import Tensor, nn

from rxt_kernels import AttentionWeights, memory_cross_attention, sparse_query_attention
from rxt_model.cache import LayerCache
from rxt_model.config import RopeLayout
from rxt_model.layers.activations import activation


class AttentionProjections(nn.Module):
    """The weights every attention of the family has: q, k, v without bias, an output projection, perhaps a gate.

    Args:
        embed_dim: model width.
        head_dim: width of a head.
        heads: query heads and key/value heads; either may be the larger one, the larger decides the output width.
        output_bias: whether the output projection has a bias.
        gated: whether the concatenated heads are multiplied by an activated projection of the query input.
        gate_activation: what activates that projection.
        rotary_layout: how rotated pairs are written back.
        dropout: dropout of attention weights while training.
    """

    def __init__(
        self,
        embed_dim: int,
        head_dim: int,
        heads: tuple[int, int],
        *,
        output_bias: bool = True,
        gated: bool = False,
        gate_activation: str = "sigmoid",
        rotary_layout: RopeLayout = "interleaved",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.query_heads, self.key_value_heads = heads
        self.head_dim = head_dim
        self.rotary_layout = rotary_layout
        self.dropout = dropout
        self.gate_activation = gate_activation
        output_width = max(heads) * head_dim
        self.q_proj = nn.Linear(embed_dim, self.query_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, self.key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, self.key_value_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(output_width, embed_dim, bias=output_bias)
        self.gate_proj: nn.Linear | None = None
        if gated:
            self.gate_proj = nn.Linear(embed_dim, output_width, bias=False)
            nn.init.normal_(self.gate_proj.weight, mean=1.0, std=0.01)

    def weights(self) -> AttentionWeights:
        """The same weights as plain tensors, for operations that run a whole attention by themselves."""
        return AttentionWeights(
            query=self.q_proj.weight,
            key=self.k_proj.weight,
            value=self.v_proj.weight,
            output=self.out_proj.weight,
            output_bias=self.out_proj.bias,
            gate=None if self.gate_proj is None else self.gate_proj.weight,
            query_heads=self.query_heads,
            key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
        )

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))

    def _finish(self, heads: Tensor, query_input: Tensor) -> Tensor:
        concatenated = heads.flatten(-2)
        if self.gate_proj is not None:
            concatenated = concatenated * activation(self.gate_activation)(self.gate_proj(query_input))
        output: Tensor = self.out_proj(concatenated)
        return output

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


class SparseQueryAttention(AttentionProjections):
    """Self-attention with fewer query heads, rotary positions on queries and keys, and an optional key/value cache."""

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None,
        *,
        causal: bool,
        key_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, T, D).
            angles: (T, head_dim / 2) or (B, T, head_dim / 2) at the positions of ``x``; None rotates nothing.
            causal: whether a token sees only itself and what came before.
            key_mask: (B, T) bool, True where a key may be seen; without a cache only.
            cache: keys and values of earlier tokens; the new ones are appended, already rotated.

        Returns:
            (B, T, D).
        """
        query = self._split(self.q_proj(x))
        key = self._split(self.k_proj(x))
        value = self._split(self.v_proj(x))
        if cache is None:
            heads = sparse_query_attention(
                query,
                key,
                value,
                causal=causal,
                key_mask=key_mask,
                query_angles=angles,
                key_angles=angles,
                rotary_layout=self.rotary_layout,
                dropout=self._dropout(),
            )
        else:
            heads = cache.attend(query, key, value, angles, rotary_layout=self.rotary_layout, key_mask=key_mask)
        return self._finish(heads, x)


class MemoryCrossAttention(AttentionProjections):
    """The memory read: token queries over short-term memory slots, rotary positions on the query alone (spec 2.2)."""

    def project_memory(self, normed_memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one memory layer, valid until the memory changes.

        Args:
            normed_memory: (1 or B, S, D), already normalised.

        Returns:
            keys and values, each (1 or B, S, key/value heads, head_dim).
        """
        return self._split(self.k_proj(normed_memory)), self._split(self.v_proj(normed_memory))

    def forward(self, x: Tensor, memory_key: Tensor, memory_value: Tensor, angles: Tensor | None) -> Tensor:
        """Read memory: (B, T, D) to (B, T, D); keys and values come from :meth:`project_memory`."""
        heads = memory_cross_attention(
            self._split(self.q_proj(x)),
            memory_key,
            memory_value,
            query_angles=angles,
            rotary_layout=self.rotary_layout,
            dropout=self._dropout(),
        )
        return self._finish(heads, x)
