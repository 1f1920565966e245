// A matrix of weights as a tensor holds it, one of its two strides being 1.
#pragma once

#include <cstdint>

namespace rxt {

// Strides in elements. torch.nn.Linear has (inputs, 1); experts that are applied as x @ w have (1, outputs).
struct Matrix {
    void* data;
    int64_t outputs, inputs;
    int64_t output_stride, input_stride;

    Matrix transposed() const { return {data, inputs, outputs, input_stride, output_stride}; }
};

}  // namespace rxt
