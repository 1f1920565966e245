// Products with weights where they are, in either layout, for many rows: panels are packed on the way into memory of the thread that
// needs them, where all rows meet them.
#pragma once

#include "core/scratch.h"
#include "matmul/matrix.h"
#include "matmul/multiply.h"
#include "matmul/unpacked.h"
#include "simd/transpose.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace detail {

constexpr int64_t packed_outputs = tile_panels * panel_width;

static inline int64_t at_most(int64_t count, int64_t most) { return count < most ? count : most; }

// Rows that are far apart come from memory one by one, unless they are asked for early enough: so many rows before.
constexpr int64_t rows_ahead = 12;

template <class Element>
inline void fetch(const Element* row, int64_t count) {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(Element));
    for (int64_t i = 0; i < count; i += line) __builtin_prefetch(row + i);
}

// Panels [panel][input][16] of inputs whose outputs are neighbours, from input_row(k) on.
template <class InputRow>
inline void pack_inputs(const InputRow& input_row, int64_t inputs, int64_t outputs, float* panels) {
    for (int64_t first = 0; first < outputs; first += panel_width, panels += inputs * panel_width)
        for (int64_t k = 0; k < inputs; ++k) {
            if (first == 0 && k + rows_ahead < inputs) fetch(input_row(k + rows_ahead), outputs);
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

// The panel of `outputs` outputs of a matrix from `first` on.
template <class Element>
inline void pack_panel(const Matrix& weight, int64_t first, int64_t outputs, float* panel) {
    const Element* source = static_cast<const Element*>(weight.data) + first * weight.output_stride;
    if (weight.output_stride == 1) {
        pack_inputs([&](int64_t k) { return source + k * weight.input_stride; }, weight.inputs, outputs, panel);
    } else {
        pack_outputs(source, weight.output_stride, weight.inputs, outputs, panel);
    }
}

}  // namespace detail

// Outputs of a matrix that are computed together: outputs[p], a panel's worth or less, from first[p] on. Their sums stand from
// column[p] on. The second panel may have none.
struct PanelPair {
    int64_t first[2], outputs[2], column[2];
};

// epilogue(first row, rows, sums) for all rows, a tile of them after the other: sums (rows, 2 * pairs * panel_width) of the pairs
// pair_at(i), i in [0, pairs), whose panels were packed before. row(i) is the address of row i, as long as the matrix has inputs. A sum
// runs over the inputs from first to last, but where a tile has few rows.
template <int most_pairs, class Element, class RowAddress, class PairAt, class Epilogue>
inline void multiply_pairs(const RowAddress& row, int64_t rows, const Matrix& weight, int pairs, const PairAt& pair_at,
                           Epilogue&& epilogue) {
    static_assert(tile_panels <= 2, "a pair is one tile wide, or two");
    constexpr int64_t stride = 2 * most_pairs * panel_width;
    const int64_t elements = weight.inputs * panel_width;
    float* packed = Scratch::of_task(2 * pairs * elements);
    for (int i = 0; i < pairs; ++i) {
        const PanelPair pair = pair_at(i);
        for (int p = 0; p < 2; ++p)
            if (pair.outputs[p] > 0)
                detail::pack_panel<Element>(weight, pair.first[p], pair.outputs[p], packed + (2 * i + p) * elements);
    }
    alignas(64) float sums[tile_rows * stride];
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = rows * tile / tiles;
        const int count = static_cast<int>(rows * (tile + 1) / tiles - first);
        const float* addresses[tile_rows];
        for (int r = 0; r < count; ++r) addresses[r] = row(first + r);
        for (int i = 0; i < pairs; ++i) {
            const PanelPair pair = pair_at(i);
            const float* at[2] = {packed + 2 * i * elements, packed + (2 * i + 1) * elements};
            if (tile_panels == 2 && pair.outputs[1] > 0) {
                const detail::Target target{sums + pair.column[0], stride, pair.column[1] - pair.column[0]};
                detail::sums_of_rows<tile_rows, tile_panels>(count, addresses, 1, at, weight.inputs, target);
            } else {
                for (int p = 0; p < 2; ++p)
                    if (pair.outputs[p] > 0)
                        detail::sums_of_rows<tile_rows, 1>(count, addresses, 1, at + p, weight.inputs,
                                                           {sums + pair.column[p], stride, 0});
            }
        }
        epilogue(first, count, sums);
    }
}

// finish(r, sums) for all rows: sums[c] = sum over inputs k of left(k)[r] * right(k)[c].
template <class Left, class Right, class Finish>
inline void multiply_outer(const Left& left, int rows, const Right& right, int64_t inputs, int64_t columns, Finish&& finish) {
    constexpr int64_t enough_inputs_to_pack = 24, group = 512;
    const int64_t stride = padded_columns(columns), most = detail::at_most(inputs, group);
    const int64_t padded_rows = (rows + tile_rows - 1) / tile_rows * tile_rows;
    float* sums = Scratch::of_task(rows * stride + most * (detail::packed_outputs + padded_rows));
    float* panels = sums + rows * stride;
    float* activations = panels + most * detail::packed_outputs;
    if (inputs < enough_inputs_to_pack)
        multiply_input_major([&](int r, int64_t k) { return left(k)[r]; }, rows, right, inputs, columns, sums, stride);
    for (int64_t input = 0; input < inputs && inputs >= enough_inputs_to_pack; input += group) {
        const int64_t present = detail::at_most(inputs - input, group);
        // [tile][input][row]: what a tile of rows needs is one straight line.
        for (int64_t k = 0; k < present; ++k) {
            const auto* source = left(input + k);
            if (k + detail::rows_ahead < present) detail::fetch(left(input + k + detail::rows_ahead), rows);
            for (int64_t r = 0; r < rows; r += tile_rows)
                for (int64_t i = 0; i < tile_rows && r + i < rows; i += Float::lanes) {
                    const int64_t own = detail::at_most(rows - r - i, tile_rows - i);
                    store_up_to(activations + r * present + k * tile_rows + i, load_up_to(source + r + i, own), own);
                }
        }
        for (int64_t column = 0; column < columns; column += detail::packed_outputs) {
            const int64_t outputs = detail::at_most(columns - column, detail::packed_outputs);
            detail::pack_inputs([&](int64_t k) { return right(input + k) + column; }, present, outputs, panels);
            const float* at[2] = {panels, panels + present * panel_width};
            alignas(64) float part[tile_rows * Tile::stride];
            for (int row = 0; row < rows; row += tile_rows) {
                const int count = static_cast<int>(detail::at_most(rows - row, tile_rows));
                const float* addresses[tile_rows];
                for (int r = 0; r < count; ++r) addresses[r] = activations + row * present + r;
                float* own = sums + row * stride + column;
                const detail::Target target = input == 0 ? detail::Target{own, stride, panel_width}
                                                         : detail::Target{part, Tile::stride, panel_width};
                if (tile_panels == 2 && outputs > panel_width) {
                    detail::sums_of_rows<tile_rows, tile_panels>(count, addresses, tile_rows, at, present, target);
                } else {
                    detail::sums_of_rows<tile_rows, 1>(count, addresses, tile_rows, at, present, target);
                }
                if (input == 0) continue;
                for (int r = 0; r < count; ++r)
                    for (int64_t i = 0; i < outputs; i += Float::lanes)
                        store(own + r * stride + i, load(own + r * stride + i) + load(part + r * Tile::stride + i));
            }
        }
    }
    for (int r = 0; r < rows; ++r) finish(r, sums + r * stride);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
