// Mixture of experts (rxt_kernels/mixture_of_experts/reference.py has the formulas).
//
// A choice, token * top_k + k, is the k-th expert of a token. `Groups` lists choices expert by expert; a place in that list is where
// what an expert computes for a token is kept.
#pragma once

#include <cstdint>

#include "core/instruction_set.h"
#include "core/types.h"
#include "matmul/matrix.h"

namespace rxt {

enum class Activation { silu, relu, gelu, sigmoid, linear };

struct RouterForward {
    DType dtype;
    bool rounds_inputs, rounds_logits;  // to bfloat16
    bool by_index;                      // choices in the order of rising experts, else of falling probability
    int64_t tokens, experts, top_k, dim;
    const void* x;
    int64_t x_stride;
    const void* weight;  // (experts, dim) contiguous
    float* logits;       // (tokens, experts)
    float* weights;      // (tokens, top_k)
    int64_t* chosen;     // (tokens, top_k)
    float* loss;         // one value
    float* inputs;       // scratch (tokens, dim), null where x can be used as it is
    float* probabilities;  // scratch (tokens, experts)
    float* sums;           // scratch (tokens,)
};

struct RouterBackward {
    DType dtype;
    bool rounds_inputs;
    int64_t tokens, experts, top_k, dim;
    const void* x;
    int64_t x_stride;
    const void* weight;  // (experts, dim) contiguous
    const float* logits;
    const int64_t* chosen;
    const float* weights_gradient;  // (tokens, top_k)
    const float* loss_gradient;     // one value
    void* x_gradient;               // (tokens, dim)
    void* weight_gradient;          // (experts, dim)
    float* inputs;                  // scratch (tokens, dim), null where x can be used as it is
    float* logits_gradient;         // scratch (tokens, experts)
};

// Neighbouring places of one expert.
struct RowBlock {
    int64_t expert, first, count;
};

// From so many rows on, packing an expert's weights costs less than it saves.
constexpr int64_t enough_rows_to_pack = 24;
// Longer blocks are divided, so that no task takes long.
constexpr int64_t most_block_rows = 960;

// Neighbouring experts that go through all stages of a pass before the next ones begin: as many as leave what they compute in a cache.
struct Round {
    int64_t first_expert, last_expert;
    int64_t first_place, places;
    const RowBlock* blocks;  // first those with enough rows to pack weights, then those with few rows
    int64_t block_count, long_count;
};

struct Groups {
    const int64_t* order;   // choices, sorted by expert; those of an expert in their own order
    const int64_t* tokens;  // of the same choices
    const int64_t* starts;  // (experts + 1,)
    const Round* rounds;
    int64_t round_count;
    int64_t few_rows;  // the most of a block that has few
};

struct Experts {
    DType dtype;
    Activation activation;
    bool gated, gate_first;
    int64_t tokens, top_k, experts, dim, hidden;
    const void* x;
    int64_t x_stride;
    const float* weights;  // (tokens, top_k)
    Groups groups;
    const Matrix* first;              // per expert (2 hidden or hidden, dim); experts without tokens may have none
    const Matrix* second;             // per expert (dim, hidden)
    const void* const* first_bias;    // per expert, or null
    const void* const* second_bias;   // per expert, or null
    float* inputs;                    // scratch (tokens, dim), null where x can be used as it is

    int64_t width() const { return gated ? 2 * hidden : hidden; }

    // Where the halves of the first matrix begin.
    int64_t linear_at() const { return gated && gate_first ? hidden : 0; }
    int64_t gate_at() const { return gate_first ? 0 : hidden; }
};

struct ExpertsForward {
    Experts experts;
    DType output_dtype;
    void* output;    // (tokens, dim)
    float* before;   // (choices, width) by place: what goes into the activation, kept for the backward pass; or null
    float* hidden;   // scratch (places of a round, hidden)
    float* results;  // scratch (choices, dim)
};

// Hidden units whose share in the gradients of routing weights is summed together.
constexpr int64_t hidden_part = 128;

struct ExpertsBackward {
    Experts experts;
    const float* before;
    DType gradient_dtype;
    const void* gradient;  // (tokens, dim) contiguous
    void* x_gradient;      // (tokens, dim)
    float* weights_gradient;          // (tokens, top_k)
    const Matrix* first_gradient;     // per expert, layout as the matrix, contiguous
    const Matrix* second_gradient;
    void* const* first_bias_gradient;   // or null
    void* const* second_bias_gradient;  // or null
    float* gradients;        // scratch (tokens, dim), null where `gradient` can be used as it is
    float* hidden;           // scratch (places of a round, hidden)
    float* before_gradient;  // scratch (places of a round, width)
    float* x_parts;          // scratch (choices, dim)
    float* products;         // scratch (places of a round, hidden_parts)
    int64_t hidden_parts;    // hidden / hidden_part, rounded up
};

RXT_FOR_EVERY_SET(void route_forward(const RouterForward&); void route_backward(const RouterBackward&);
                  void experts_forward(const ExpertsForward&); void experts_backward(const ExpertsBackward&);)

}  // namespace rxt
