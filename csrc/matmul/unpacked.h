// The matrix product with weights where they are, in either layout.
#pragma once

#include "matmul/input_major.h"
#include "matmul/matrix.h"
#include "matmul/output_major.h"

namespace rxt::RXT_INSTRUCTION_SET {

// sums[r * stride + n] = sum over inputs k of rows[r][k] * weight[first + n, k], for n in [0, outputs); `stride` is at least
// padded_columns(outputs).
template <class Element>
inline void multiply_unpacked(const float* const* rows, int count, const Matrix& weight, int64_t first, int64_t outputs,
                              float* sums, int64_t stride) {
    const Element* base = static_cast<const Element*>(weight.data) + first * weight.output_stride;
    if (weight.output_stride == 1) {
        multiply_input_major([&](int r, int64_t k) { return rows[r][k]; }, count,
                             [&](int64_t k) { return base + k * weight.input_stride; }, weight.inputs, outputs, sums, stride);
    } else {
        multiply_output_major<Element>(rows, count, [&](int64_t n) { return base + n * weight.output_stride; }, weight.inputs,
                                       outputs, sums, stride);
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
