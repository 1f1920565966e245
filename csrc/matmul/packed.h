// The matrix product with weights where they are, in either layout, for many rows: a few panels at a time are packed into the nearest
// cache, where all rows meet them.
//
// Sums run over groups of inputs, one group after the other.
#pragma once

#include "matmul/matrix.h"
#include "matmul/multiply.h"
#include "matmul/unpacked.h"
#include "simd/transpose.h"

namespace rxt::RXT_INSTRUCTION_SET {

// From so many rows on, packing costs less than it saves.
constexpr int64_t enough_rows_to_pack = 24;

namespace detail {

constexpr int64_t packed_outputs = tile_panels * panel_width;

static inline int64_t at_most(int64_t count, int64_t most) { return count < most ? count : most; }

// Panels [panel][input][16] of inputs whose outputs are neighbours, from input_row(k) on.
template <class InputRow>
inline void pack_inputs(const InputRow& input_row, int64_t inputs, int64_t outputs, float* panels) {
    for (int64_t first = 0; first < outputs; first += panel_width, panels += inputs * panel_width)
        for (int64_t k = 0; k < inputs; ++k) {
            const auto* source = input_row(k) + first;
            for (int64_t i = 0; i < panel_width; i += Float::lanes) {
                const int64_t left = outputs - first - i;
                store(panels + k * panel_width + i, left > 0 ? load_up_to(source + i, left) : zero());
            }
        }
}

// The same where the inputs of an output are neighbours, and outputs lie `stride` apart.
template <class Element>
inline void pack_outputs(const Element* source, int64_t stride, int64_t inputs, int64_t outputs, float* panels) {
    for (int64_t first = 0; first < outputs; first += panel_width, panels += inputs * panel_width) {
        const int64_t present = at_most(outputs - first, panel_width);
        const Element* rows = source + first * stride;
        int64_t k = 0;
        if (present == panel_width) {
            for (; k + Float::lanes <= inputs; k += Float::lanes)
                for (int64_t i = 0; i < panel_width; i += Float::lanes)
                    transpose_square(rows + i * stride + k, stride, panels + k * panel_width + i, panel_width);
        }
        for (; k < inputs; ++k)
            for (int64_t i = 0; i < panel_width; ++i)
                panels[k * panel_width + i] = i < present ? to_float(rows[i * stride + k]) : 0.0f;
    }
}

inline void clear(float* sums, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += Float::lanes) store(sums + r * stride + c, zero());
}

inline void add_tile(const Tile& tile, float* sums, int64_t stride) {
    for (int r = 0; r < tile.rows; ++r) {
        float* target = sums + (tile.first_row + r) * stride + tile.first_output;
        for (int i = 0; i < tile.outputs; i += Float::lanes) store(target + i, load(target + i) + load(tile.row(r) + i));
    }
}

template <class Element>
inline void multiply_packed(const float* const* rows, int count, const Matrix& weight, int64_t first, int64_t outputs,
                            float* sums, int64_t stride) {
    constexpr int64_t group = 256;
    alignas(64) float panels[packed_outputs * group];
    clear(sums, stride, count, outputs);
    for (int64_t output = 0; output < outputs; output += packed_outputs) {
        const int64_t present = at_most(outputs - output, packed_outputs);
        for (int64_t input = 0; input < weight.inputs; input += group) {
            const int64_t inputs = at_most(weight.inputs - input, group);
            const Element* source = static_cast<const Element*>(weight.data) + (first + output) * weight.output_stride +
                                    input * weight.input_stride;
            if (weight.output_stride == 1) {
                pack_inputs([&](int64_t k) { return source + k * weight.input_stride; }, inputs, present, panels);
            } else {
                pack_outputs(source, weight.output_stride, inputs, present, panels);
            }
            multiply(rows_at([&](int64_t row) { return rows[row] + input; }), 0, count,
                     Panels<float>{panels, nullptr, present, inputs}, 0, panel_count(present),
                     [&](const Tile& tile) { add_tile(tile, sums + output, stride); });
        }
    }
}

}  // namespace detail

// sums[r * stride + n] = sum over inputs k of rows[r][k] * weight[first + n, k], for n in [0, outputs); `stride` is at least
// padded_columns(outputs).
template <class Element>
inline void multiply_matrix(const float* const* rows, int count, const Matrix& weight, int64_t first, int64_t outputs,
                            float* sums, int64_t stride) {
    count < enough_rows_to_pack ? multiply_unpacked<Element>(rows, count, weight, first, outputs, sums, stride)
                                : detail::multiply_packed<Element>(rows, count, weight, first, outputs, sums, stride);
}

// sums[r * stride + c] = sum over inputs k of left(k)[r] * right(k)[c], for at most 48 rows; `stride` is at least
// padded_columns(columns).
template <class Left, class Right>
inline void multiply_outer(const Left& left, int rows, const Right& right, int64_t inputs, int64_t columns, float* sums,
                           int64_t stride) {
    if (inputs < enough_rows_to_pack) {
        multiply_input_major([&](int r, int64_t k) { return left(k)[r]; }, rows, right, inputs, columns, sums, stride);
        return;
    }
    constexpr int64_t group = 128;
    alignas(64) float panels[detail::packed_outputs * group], activations[48 * group];
    detail::clear(sums, stride, rows, columns);
    for (int64_t input = 0; input < inputs; input += group) {
        const int64_t present = detail::at_most(inputs - input, group);
        for (int64_t k = 0; k < present; ++k)
            for (int64_t r = 0; r < rows; r += Float::lanes)
                store_up_to(activations + k * rows + r, load_up_to(left(input + k) + r, rows - r), rows - r);
        for (int64_t column = 0; column < columns; column += detail::packed_outputs) {
            const int64_t outputs = detail::at_most(columns - column, detail::packed_outputs);
            detail::pack_inputs([&](int64_t k) { return right(input + k) + column; }, present, outputs, panels);
            multiply(rows_at([&](int64_t row) { return activations + row; }, rows), 0, rows,
                     Panels<float>{panels, nullptr, outputs, present}, 0, panel_count(outputs),
                     [&](const Tile& tile) { detail::add_tile(tile, sums + column, stride); });
        }
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
