// A decoder, or an encoder, as its kernels see it: packed matrices and plain pointers, in the order in which a token meets them
// (rxt_kernels/decode/weights.py has the same with torch tensors; the formulas are in rxt_kernels/decode/forward.py).
#pragma once

#include <cstdint>

#include "core/types.h"
#include "matmul/panels.h"

namespace rxt {

enum class ActivationKind { silu, relu, gelu, sigmoid, linear, tanh };

// Packed (outputs, inputs). Scales and bias stand in the order of the panels and fill whole ones.
struct PackedMatrix {
    DType dtype = DType::float32;
    int64_t outputs = 0, inputs = 0;
    const void* data = nullptr;
    const float* scales = nullptr;  // for int8
    const float* bias = nullptr;    // or null

    int64_t panels() const { return panel_count(outputs); }
};

// RMSNorm, or LayerNorm where there is a bias.
struct Norm {
    const float* weight = nullptr;
    const float* bias = nullptr;
};

struct Attention {
    Norm norm;
    PackedMatrix input;  // query rows; then, where keys are those of the tokens, key and value rows; then gate rows
    PackedMatrix output;
    int64_t query_heads = 0, key_value_heads = 0, head_dim = 0;
    bool gated = false;

    int64_t output_heads() const { return query_heads > key_value_heads ? query_heads : key_value_heads; }
    int64_t queries_per_key() const { return output_heads() / key_value_heads; }

    // The query head that meets key/value head `head` as number `index`; fewer query heads than that are tiled.
    int64_t query_head(int64_t head, int64_t index) const {
        return query_heads >= key_value_heads ? head * queries_per_key() + index : head % query_heads;
    }
};

struct MemoryRead {
    Attention attention;
    Norm slots_norm;
    PackedMatrix slots;       // key rows, then value rows
    int64_t layer = 0;  // of the memory
};

struct Expert {
    PackedMatrix first;  // gated: panels of the linear half and of the gate by turns, so that one task has both
    PackedMatrix second;
    int64_t width = 0;
};

// Routed experts come first, then those that every token goes through. A dense network is one of the latter.
struct FeedForward {
    Norm norm;
    const Expert* experts = nullptr;
    int64_t routed = 0, shared = 0, top_k = 0;
    bool gated = false;
    ActivationKind activation = ActivationKind::silu;
    PackedMatrix router;
    PackedMatrix shared_gate;          // with more than one shared expert
    float routed_scale = 1.0f, shared_scale = 1.0f;
    const float* output_bias = nullptr;  // (width,) or null

    int64_t experts_per_token() const { return top_k + shared; }
};

// Elements of scratch for the routing of so many tokens (experts.h).
static inline int64_t routing_elements(int64_t tokens, const FeedForward& network) {
    const int64_t slots = tokens * network.experts_per_token(), choices = tokens * network.top_k;
    return 2 + 2 * (network.routed + network.shared) + 2 * slots + 2 * choices + tokens * network.shared;
}

struct Layer {
    Attention attention;
    bool reads_memory = false;
    MemoryRead memory;
    FeedForward feed_forward;
};

struct Model {
    int64_t width = 0, vocabulary = 0;
    DType embedding_dtype = DType::float32;
    const void* embedding = nullptr;  // (vocabulary, width), as the caller has it
    int64_t embedding_stride = 0;
    const Layer* layers = nullptr;
    int64_t layer_count = 0;
    bool causal = true;  // else every token sees its whole row: an encoder
    bool has_head_norm = false;
    Norm head_norm;
    PackedMatrix head;  // a decoder's
    const float* inverse_frequencies = nullptr;  // (rotary_pairs,) or null, where nothing is rotated
    int64_t rotary_pairs = 0;
    bool splits_pairs = false;   // a rotated pair goes to both halves of its head instead of side by side
    bool rounds_angles = false;  // angles, sines and cosines are bfloat16
    ActivationKind gate_activation = ActivationKind::sigmoid;
};

}  // namespace rxt
