// The matrix product with weights that lie input by input, as `x @ w` and products with transposed activations have them, unpacked.
//
// A block of sums lies in the nearest cache. Groups of inputs are added to it one after the other, so that the weights are read once,
// along their rows; each vector of weights serves all rows. Every sum runs over the inputs from first to last.
#pragma once

#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

// Floats of a block of sums: three quarters of an L1 cache of 32 KiB.
constexpr int64_t most_sums = 6144;

// Columns of a block are filled up to a multiple of this, at which rows of sums begin.
constexpr int64_t column_unit = 32;

static inline int64_t padded_columns(int64_t columns) { return (columns + column_unit - 1) / column_unit * column_unit; }

// Columns that a block of sums has room for, at most `most`.
static inline int64_t columns_beside(int64_t rows, int64_t most) {
    const int64_t room = most_sums / (rows > 0 ? rows : 1) / column_unit * column_unit;
    return room < column_unit ? column_unit : room < most ? room : most;
}

namespace detail {

// Inputs that are added at once: as many as leave registers for the sums.
constexpr int input_group = 4;

template <int group, int vectors, bool whole, class Activations, class Element>
inline __attribute__((always_inline)) void add_inputs(const Activations& a, int rows, int64_t k,
                                                      const Element* const* weights, int64_t column, int64_t left,
                                                      float* sums, int64_t stride) {
    Float w[group][vectors];
    RXT_UNROLL
    for (int g = 0; g < group; ++g)
        RXT_UNROLL
        for (int v = 0; v < vectors; ++v) {
            const Element* source = weights[g] + column + v * Float::lanes;
            w[g][v] = whole ? load(source) : load_up_to(source, left - v * Float::lanes);
        }
    for (int r = 0; r < rows; ++r) {
        float* target = sums + r * stride + column;
        Float total[vectors];
        RXT_UNROLL
        for (int v = 0; v < vectors; ++v) total[v] = load(target + v * Float::lanes);
        RXT_UNROLL
        for (int g = 0; g < group; ++g) {
            const Float x = broadcast(a(r, k + g));
            RXT_UNROLL
            for (int v = 0; v < vectors; ++v) total[v] = multiply_add(x, w[g][v], total[v]);
        }
        RXT_UNROLL
        for (int v = 0; v < vectors; ++v) store(target + v * Float::lanes, total[v]);
    }
}

template <int group, class Activations, class WeightRow>
inline __attribute__((always_inline)) void add_group(const Activations& a, int rows, int64_t k, const WeightRow& weight_row,
                                                     int64_t columns, float* sums, int64_t stride) {
    decltype(weight_row(k)) weights[group];
    RXT_UNROLL
    for (int g = 0; g < group; ++g) weights[g] = weight_row(k + g);
    int64_t column = 0;
    for (; column + 2 * Float::lanes <= columns; column += 2 * Float::lanes)
        add_inputs<group, 2, true>(a, rows, k, weights, column, 0, sums, stride);
    for (; column < columns; column += Float::lanes)
        add_inputs<group, 1, false>(a, rows, k, weights, column, columns - column, sums, stride);
}

}  // namespace detail

// sums[r * stride + c] = sum over inputs k of a(r, k) * weight_row(k)[c]; `stride` is at least padded_columns(columns).
template <class Activations, class WeightRow>
inline void multiply_input_major(const Activations& a, int rows, const WeightRow& weight_row, int64_t inputs, int64_t columns,
                                 float* sums, int64_t stride) {
    for (int r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += Float::lanes) store(sums + r * stride + c, zero());
    int64_t k = 0;
    for (; k + detail::input_group <= inputs; k += detail::input_group)
        detail::add_group<detail::input_group>(a, rows, k, weight_row, columns, sums, stride);
    for (; k < inputs; ++k) detail::add_group<1>(a, rows, k, weight_row, columns, sums, stride);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
