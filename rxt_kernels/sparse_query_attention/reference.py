"""Sparse query attention, the definition (specification 2.4, 2.5).

    out[b, t, h] = sum_s softmax_s(scale * q[b, t, h] . k[b, s, h']) * v[b, s, h']      over the visible keys s

with scale = 1 / sqrt(head_dim) and, for Hq query and Hkv key/value heads:

    Hq >= Hkv    query head h reads key/value head h' = h // (Hq / Hkv)         (MHA, GQA, MQA, SQA)
    Hq <  Hkv    the query heads are tiled: head h uses query head h mod Hq     (reversed SQA), and h' = h

The output has max(Hq, Hkv) heads. A query that sees no key gives zeros. The softmax itself is torch's
``scaled_dot_product_attention``, which keeps its sums in float32 for half precision inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_kernels.rotary.reference import rotary_reference


def visible_keys(
    query_time: int,
    key_time: int,
    keys_read: int,
    causal: bool,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which of the first `keys_read` keys each query sees: bool, broadcastable to (B, 1, Tq, keys_read); None = all.

    Causal visibility is aligned to the last of all `key_time` keys: query i sees the keys <= key_time - Tq + i.
    """
    visible: Tensor | None = None
    if key_mask is not None:
        visible = key_mask[:, None, None, :keys_read]
    elif key_lengths is not None:
        visible = (torch.arange(keys_read, device=device) < key_lengths[:, None])[:, None, None, :]
    if causal:
        last_key = torch.arange(query_time, device=device)[:, None] + (key_time - query_time)
        earlier = torch.arange(keys_read, device=device) <= last_key
        visible = earlier if visible is None else visible & earlier
    return visible


def sparse_query_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_angles: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """query (B, Tq, Hq, dh), key and value (B, Tk, Hkv, dh) -> (B, Tq, max(Hq, Hkv), dh)."""
    if query_angles is not None:
        query = rotary_reference(query, query_angles, rotary_layout)
    if key_angles is not None:
        key = rotary_reference(key, key_angles, rotary_layout)
    query_time, query_heads = query.shape[1], query.shape[2]
    key_time, key_heads = key.shape[1], key.shape[2]
    if query_heads < key_heads:
        query = query.repeat(1, 1, key_heads // query_heads, 1)
    if query_time == 1:
        causal = False  # A single query is the newest token: it may see every key.

    keys_read = key_time
    if key_lengths is not None and key_lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        # The host knows the lengths: the unused tail of a preallocated cache is not read at all, and a batch whose rows
        # are equally long needs no mask.
        lengths = key_lengths.tolist()
        keys_read = max(lengths, default=key_time)
        if keys_read == min(lengths, default=key_time):
            key_lengths = None
        key, value = key[:, :keys_read], value[:, :keys_read]

    # torch's own causal flag is aligned to the first key, which is the same only for equal lengths. The flags are set by
    # branches because a comparison of traced shapes is no bool, which the function below asks for.
    plain_causal = grouped = False
    if causal and key_mask is None and key_lengths is None and query_time == key_time == keys_read:
        plain_causal = True
    if query_heads > key_heads:
        grouped = True
    mask = None
    if not plain_causal:
        mask = visible_keys(query_time, key_time, keys_read, causal, key_mask, key_lengths, query.device)
    return F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=plain_causal,
        scale=scale,
        enable_gqa=grouped,
    ).transpose(1, 2)
