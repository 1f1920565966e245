// RMSNorm and the residual addition before it (rxt_kernels/rms_norm/reference.py has the formulas).
#pragma once

#include <cstdint>

#include "core/instruction_set.h"
#include "core/types.h"

namespace rxt {

// Rows of `width` neighbouring values. Where there is a residual, x + residual is normalised and written to `total` as well.
struct RmsNormForward {
    DType dtype;
    int64_t rows, width;
    float epsilon;
    const void* x;
    int64_t x_stride;
    const void* residual;  // or null
    int64_t residual_stride;
    const void* weight;
    void* normed;  // contiguous
    void* total;   // contiguous; null without residual
    float* inverse_rms;  // (rows,), kept for the backward pass; or null
};

struct RmsNormBackward {
    DType dtype;
    int64_t rows, width;
    const void* x;  // what was normalised: contiguous
    const void* weight;
    const float* inverse_rms;
    const void* normed_gradient;  // contiguous
    const void* total_gradient;   // added to the gradient of x; or null
    void* x_gradient;
    float* weight_gradient;  // (width,) fp32
};

RXT_FOR_EVERY_SET(void rms_norm_forward(const RmsNormForward&); void rms_norm_backward(const RmsNormBackward&);)

}  // namespace rxt
