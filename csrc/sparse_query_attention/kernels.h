// Sparse query attention and memory cross-attention (rxt_kernels/sparse_query_attention/reference.py has the formula).
//
// Head h of the output reads key/value head h / (Hq / Hkv) with its own query head where Hq >= Hkv; where Hq < Hkv, the query
// heads are tiled and head h reads key/value head h.
#pragma once

#include <cstdint>

#include "core/instruction_set.h"
#include "core/types.h"

namespace rxt {

constexpr int64_t attention_largest_head = 256;

// Distances in elements; the values of a head are neighbours.
struct HeadStrides {
    int64_t batch, time, head;
};

// Cosines and sines of the angles of positions: (time, head_dim / 2), or one such table per batch row. Null: nothing is rotated.
struct RotaryTable {
    const float* cosine;
    const float* sine;
    int64_t batch_stride, time_stride;
};

struct AttentionForward {
    DType dtype;  // of query, key, value and out
    int64_t batch, query_time, key_time, query_heads, key_heads, head_dim;
    float scale;
    bool causal;  // query t sees the keys up to key_time - query_time + t; a single query sees them all
    bool split;   // rotary layout: first halves of all pairs, then second halves
    const void* query;
    HeadStrides query_strides;
    const void* key;
    HeadStrides key_strides;
    const void* value;
    HeadStrides value_strides;
    const int64_t* key_lengths;  // (batch,): keys from there on are not read; or null
    const bool* key_mask;        // (batch, key_time), neighbours in time, false = hidden; or null
    int64_t key_mask_stride;
    RotaryTable query_rotary, key_rotary;
    void* out;  // max(query_heads, key_heads) heads
    HeadStrides out_strides;
    // (2, batch, heads, query_time), contiguous, for the backward pass; or null: the largest score of each query, as an exponent of
    // 2, and the sum of 2^(score - largest). One number, their logarithm, would lose the digits that a large score takes.
    float* softmax_sums;
    // Heads in fp32 of a model in bfloat16: rotated queries and keys, values and weights may be rounded to it, where that is faster.
    bool rounded = false;
};

struct AttentionBackward {
    AttentionForward forward;  // as it was called, with out and softmax_sums
    const void* out_gradient;
    HeadStrides out_gradient_strides;
    void* query_gradient;  // contiguous, all three
    void* key_gradient;
    void* value_gradient;
};

// Number of floats of scratch that a call needs. The kernels take it as a pointer to a multiple of 64 bytes.
//
// Few queries per key/value head (a decode step) need no packed keys. They can also be run from inside of a parallel region,
// where attention_is_short says so: every thread runs some of the attention_part_count parts, all wait, then every thread joins
// some of the batch * key_heads groups of heads. Which thread does what makes no difference to the result.
RXT_FOR_EVERY_SET(int64_t attention_forward_scratch(const AttentionForward&);
                  int64_t attention_backward_scratch(const AttentionBackward&);
                  void attention_forward(const AttentionForward&, float* scratch);
                  void attention_backward(const AttentionBackward&, float* scratch);

                  bool attention_is_short(const AttentionForward&); int64_t attention_part_count(const AttentionForward&);
                  void attention_parts(const AttentionForward&, float* scratch, int64_t first, int64_t last);
                  void attention_join(const AttentionForward&, float* scratch, int64_t first, int64_t last);)

}  // namespace rxt
