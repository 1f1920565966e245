// SwiGLU (rxt_kernels/swiglu/reference.py has the formula).
#pragma once

#include <cstdint>

#include "core/instruction_set.h"
#include "core/types.h"

namespace rxt {

// Rows of 2 * width neighbouring values: the linear part, then the gate. Distances of rows in elements.
struct SwigluForward {
    DType dtype;
    int64_t rows, width;
    const void* x;
    int64_t x_stride;
    void* out;  // (rows, width), contiguous
};

struct SwigluBackward {
    DType dtype;
    int64_t rows, width;
    const void* gradient;  // (rows, width), of the result
    int64_t gradient_stride;
    const void* x;
    int64_t x_stride;
    void* x_gradient;  // (rows, 2 * width), contiguous
};

RXT_FOR_EVERY_SET(void swiglu_forward(const SwigluForward&); void swiglu_backward(const SwigluBackward&);)

}  // namespace rxt
