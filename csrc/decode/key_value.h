// Keys and values in panels: addresses, and how a token's are written.
#pragma once

#include "decode/kernels.h"
#include "matmul/panels.h"

namespace rxt::RXT_INSTRUCTION_SET {

static inline DType dtype_of(const float*) { return DType::float32; }
static inline DType dtype_of(const BFloat16*) { return DType::bfloat16; }

// Where input `k` of output `j` stands in a panel.
static inline int64_t place_in_panel(const float*, int64_t k, int64_t j) { return k * panel_width + j; }
static inline int64_t place_in_panel(const BFloat16*, int64_t k, int64_t j) { return (k / 2 * panel_width + j) * 2 + k % 2; }

// One head of one row.
template <class Stored>
struct HeadOfCache {
    Stored* keys;
    Stored* values;
    int64_t key_panel, value_panel;  // elements of a panel

    HeadOfCache(const KeyValue& cache, int64_t row, int64_t head) {
        const DType dtype = dtype_of(static_cast<Stored*>(nullptr));
        const int64_t index = row * cache.heads + head;
        keys = static_cast<Stored*>(cache.keys) + index * cache.key_elements(dtype);
        values = static_cast<Stored*>(cache.values) + index * cache.value_elements(dtype);
        key_panel = panel_elements(dtype, cache.head_dim);
        value_panel = panel_elements(dtype, cache.capacity);
    }

    void set_key(int64_t token, int64_t d, float x) const {
        assign(keys[token / panel_width * key_panel + place_in_panel(keys, d, token % panel_width)], x);
    }

    void set_value(int64_t token, int64_t d, float x) const {
        assign(values[d / panel_width * value_panel + place_in_panel(values, token, d % panel_width)], x);
    }
};

}  // namespace rxt::RXT_INSTRUCTION_SET
