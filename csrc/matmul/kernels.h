// Packing of weights, and the plain matrix product on packed weights.
#pragma once

#include "core/instruction_set.h"
#include "core/types.h"
#include "matmul/panels.h"

namespace rxt {

// A matrix (outputs, inputs) with any strides, in elements: torch.nn.Linear has (inputs, 1), experts applied as x @ w have (1, outputs).
struct Pack {
    DType source_dtype;  // float32 or bfloat16
    DType target_dtype;  // float32, bfloat16 or int8
    int64_t outputs, inputs;
    const void* source;
    int64_t output_stride, input_stride;
    void* target;   // packed_elements(target_dtype, outputs, inputs)
    float* scales;  // (outputs rounded up to whole panels,) for int8, else null
};

// out (rows, outputs) = a (rows, inputs) @ weights^T + bias, in fp32.
struct PackedProduct {
    DType weight_dtype;
    int64_t rows, outputs, inputs;
    const float* a;
    int64_t a_stride;
    const void* weights;
    const float* scales;
    const float* bias;  // or null
    float* out;
    int64_t out_stride;
};

// out (rows, outputs) = x (rows, inputs) @ weight^T + bias, in fp32, with the weight where it is.
struct Projection {
    int64_t rows, outputs, inputs;
    const float* x;
    int64_t x_stride;
    DType weight_dtype;  // float32 or bfloat16
    const void* weight;  // the inputs of an output are neighbours
    int64_t output_stride;
    const float* bias;  // or null
    float* out;
    int64_t out_stride;
    float* packed;  // scratch, packed_elements(float32, outputs, inputs)
};

// Several projections at once, which do not depend on each other: threads share them all.
RXT_FOR_EVERY_SET(void pack(const Pack&); void packed_product(const PackedProduct&);
                  void project(const Projection* projections, int64_t count);)

}  // namespace rxt
