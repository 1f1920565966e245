// What the decode engine asks of its kernels: tokens through the decoder, and memory into keys and values.
#pragma once

#include <cstdint>

#include "core/instruction_set.h"
#include "decode/model.h"

namespace rxt {

// Keys and values of one layer, packed as weights are, since that is how they are used: a head's keys are a matrix with a row for
// every token, its values one with a column for every token.
//
//     keys    [row][head][token / 16] panels of inputs head_dim
//     values  [row][head][head_dim / 16] panels of inputs capacity
struct KeyValue {
    void* keys = nullptr;
    void* values = nullptr;
    int64_t heads = 0, head_dim = 0;
    int64_t capacity = 0;  // tokens, a multiple of panel_width

    int64_t key_elements(DType dtype) const { return packed_elements(dtype, capacity, head_dim); }        // of one head
    int64_t value_elements(DType dtype) const { return packed_elements(dtype, head_dim, capacity); }
};

// Scratch of a step; sizes in elements.
struct Workspace {
    int64_t tokens = 0, threads = 0;  // what there is room for
    float* x = nullptr;               // (tokens, width): the residual stream
    float* normed = nullptr;          // (tokens, width)
    float* cosines = nullptr;         // (tokens, rotary_pairs)
    float* sines = nullptr;
    float* queries = nullptr;  // (tokens, attention_width)
    float* gates = nullptr;
    float* heads = nullptr;
    int64_t attention_width = 0;
    float* router_logits = nullptr;  // (tokens, router_width)
    int64_t router_width = 0;        // whole panels of the router, then whole panels of the gate of shared experts
    float* hidden = nullptr;         // (tokens * experts per token, hidden_width)
    int64_t hidden_width = 0;
    float* routing = nullptr;  // see experts.h
    float* thread = nullptr;  // (threads, thread_size)
    int64_t thread_size = 0;
    int64_t score_size = 0;  // of thread_size, for the scores of attention
    int16_t* rounded = nullptr;  // (threads, rounded_rows, rounded_width): rows that meet weights of 8 or 16 bits; else null
    float* rounded_scales = nullptr;  // (threads, rounded_rows)
    int64_t rounded_rows = 0, rounded_width = 0;
};

// Tokens of one row stand together, in rising position; rows rise as well.
struct Step {
    const Model* model;
    DType stored;           // keys and values: float32 or bfloat16
    const KeyValue* cache;  // per layer
    const KeyValue* memory;
    int64_t memory_rows, slots;
    Workspace work;
    int threads;

    int64_t count;
    const int64_t* tokens;
    const int64_t* rows;
    const int64_t* positions;
    int64_t segment_count;
    const int64_t* segments;  // (segment_count + 1,): where the tokens of a row begin

    // The last tokens of the first so many segments get logits: of a message that goes in parts, the last row may go on.
    int64_t finished_segments;
    float* logits;  // (rows, logits_stride)
    int64_t logits_stride;

    // The residual stream after every layer, at (layer, row, position); null where nobody asks for it.
    float* states;
    int64_t state_layer_stride, state_row_stride;
};

// The memory (layers, rows, slots, width) that keys and values are made of.
struct StoreMemory {
    const Model* model;
    DType stored;
    const KeyValue* memory;
    Workspace work;
    int threads;
    DType dtype;
    const void* source;
    int64_t layer_stride, row_stride, slot_stride;
    int64_t rows, slots;
};

// Rows of a memory that one task of store_memory takes; its thread has room for them.
constexpr int64_t memory_block = 48;

// Rows of scores that attention holds at once, at most.
constexpr int64_t most_attention_rows = 6;

// Up to so many tokens every thread computes small things (norms, routing) for itself rather than waiting for another to do it.
constexpr int64_t few_tokens = 8;

RXT_FOR_EVERY_SET(void decode_step(const Step&); void store_memory(const StoreMemory&);)

}  // namespace rxt
