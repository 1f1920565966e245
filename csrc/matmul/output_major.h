// The matrix product with weights that lie output by output, as torch.nn.Linear has them, unpacked: dot products along the inputs.
//
// The sum of an output has two chains of vectors, for whatever number of rows: the bits of a row do not depend on other rows.
#pragma once

#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace detail {

template <int rows, int outputs, class Element>
inline void dots(const float* const* a, const Element* const* weights, int64_t inputs, float* out, int64_t stride) {
    constexpr int lanes = Float::lanes;
    Float sums[2][rows][outputs];
    RXT_UNROLL
    for (int c = 0; c < 2; ++c)
        RXT_UNROLL
        for (int r = 0; r < rows; ++r)
            RXT_UNROLL
            for (int n = 0; n < outputs; ++n) sums[c][r][n] = zero();
    int64_t k = 0;
    for (; k + 2 * lanes <= inputs; k += 2 * lanes)
        RXT_UNROLL
        for (int c = 0; c < 2; ++c) {
            Float w[outputs];
            RXT_UNROLL
            for (int n = 0; n < outputs; ++n) w[n] = load(weights[n] + k + c * lanes);
            RXT_UNROLL
            for (int r = 0; r < rows; ++r) {
                const Float x = load(a[r] + k + c * lanes);
                RXT_UNROLL
                for (int n = 0; n < outputs; ++n) sums[c][r][n] = multiply_add(x, w[n], sums[c][r][n]);
            }
        }
    for (; k < inputs; k += lanes)
        RXT_UNROLL
        for (int n = 0; n < outputs; ++n) {
            const Float w = load_up_to(weights[n] + k, inputs - k);
            RXT_UNROLL
            for (int r = 0; r < rows; ++r)
                sums[0][r][n] = multiply_add(load_up_to(a[r] + k, inputs - k), w, sums[0][r][n]);
        }
    RXT_UNROLL
    for (int r = 0; r < rows; ++r)
        RXT_UNROLL
        for (int n = 0; n < outputs; ++n) out[r * stride + n] = sum(sums[0][r][n] + sums[1][r][n]);
}

// As many sums at once as the registers hold: rows times outputs, twice.
template <int rows, int outputs, class Element, class WeightRow>
inline void dots_of_rows(const float* const* a, const WeightRow& weight_row, int64_t inputs, int64_t count, float* sums,
                         int64_t stride) {
    const Element* weights[outputs];
    int64_t n = 0;
    for (; n + outputs <= count; n += outputs) {
        RXT_UNROLL
        for (int i = 0; i < outputs; ++i) weights[i] = weight_row(n + i);
        dots<rows, outputs>(a, weights, inputs, sums + n, stride);
    }
    for (; n < count; ++n) {
        weights[0] = weight_row(n);
        dots<rows, 1>(a, weights, inputs, sums + n, stride);
    }
}

}  // namespace detail

// sums[r * stride + n] = sum over inputs k of rows[r][k] * weight_row(n)[k], for n in [0, outputs).
template <class Element, class WeightRow>
inline void multiply_output_major(const float* const* rows, int count, const WeightRow& weight_row, int64_t inputs,
                                  int64_t outputs, float* sums, int64_t stride) {
    // Few outputs at a time, whose weights stay in the nearest cache while the rows pass by.
    constexpr int64_t block = 8;
    for (int64_t first = 0; first < outputs; first += block) {
        const int64_t present = outputs - first < block ? outputs - first : block;
        const auto weights = [&](int64_t n) { return weight_row(first + n); };
        float* target = sums + first;
        int r = 0;
        for (; r + 3 <= count; r += 3)
            detail::dots_of_rows<3, 2, Element>(rows + r, weights, inputs, present, target + r * stride, stride);
        if (count - r == 2) detail::dots_of_rows<2, 2, Element>(rows + r, weights, inputs, present, target + r * stride, stride);
        if (count - r == 1) detail::dots_of_rows<1, 4, Element>(rows + r, weights, inputs, present, target + r * stride, stride);
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
