// Rotary position embedding (rxt_kernels/rotary/reference.py has the formula).
#pragma once

#include <cstdint>

#include "core/instruction_set.h"
#include "core/types.h"

namespace rxt {

// Distances in elements; the values of a head are neighbours.
struct Rotary {
    DType dtype;
    int64_t batch, time, heads, half;  // heads of 2 * half values
    const void* x;
    int64_t batch_stride, time_stride, head_stride;
    const float* cosine;  // (time, half), or such a table per batch row
    const float* sine;
    int64_t table_batch_stride;  // 0 where there is one table
    bool split;    // the pairs stand in two halves: where they are written, with `inverse` where they are read
    bool inverse;  // turn back, which is what a gradient goes through
    void* out;     // (batch, time, heads, 2 * half), contiguous
};

RXT_FOR_EVERY_SET(void rotary(const Rotary&);)

}  // namespace rxt
