// Linear layer and cross-entropy in one (rxt_kernels/linear_cross_entropy/reference.py has the formulas).
#pragma once

#include <cstdint>

#include "core/instruction_set.h"
#include "core/types.h"

namespace rxt {

// What both passes take. Distances in elements. Rows whose target is to be ignored are left out: nothing is computed for them.
struct LinearCrossEntropy {
    DType dtype;
    int64_t all_rows, rows, classes, dim;
    const void* hidden;  // (all_rows, dim)
    int64_t hidden_stride;
    const void* weight;  // (classes, dim)
    int64_t class_stride, input_stride;
    const void* bias;       // (classes,), or null
    const int64_t* target;  // (all_rows,)
    const int64_t* places;  // (rows,): which of all rows count
};

struct LinearCrossEntropyForward {
    LinearCrossEntropy of;
    bool mean;            // the total is divided by the number of rows that count
    float* losses;        // (all_rows,); 0 where the target is ignored
    float* total;         // one value, or null
    float* softmax_sums;  // (2, all_rows), for the backward pass: largest logit, logarithm of the sum of exponentials; or null
};

struct LinearCrossEntropyBackward {
    LinearCrossEntropy of;
    const float* softmax_sums;
    const float* loss_gradients;  // (all_rows,)
    void* hidden_gradient;        // (all_rows, dim), contiguous
    void* weight_gradient;        // (classes, dim), contiguous
    void* bias_gradient;          // (classes,), or null
};

// Each takes as many floats of scratch memory as its `_scratch` says.
RXT_FOR_EVERY_SET(int64_t linear_cross_entropy_forward_scratch(const LinearCrossEntropyForward&);
                  void linear_cross_entropy_forward(const LinearCrossEntropyForward&, float* scratch);
                  int64_t linear_cross_entropy_backward_scratch(const LinearCrossEntropyBackward&);
                  void linear_cross_entropy_backward(const LinearCrossEntropyBackward&, float* scratch);)

}  // namespace rxt
