// The matrix product: rows of activations times packed weights, in tiles whose sums stay in registers.
//
//     out[row, output] = sum over inputs of a[row, input] * weight[output, input]
//
// A call to `multiply` is one task of one thread; who shares the work gives every task its own rows or panels. Each tile of sums is
// handed to an epilogue, which adds biases, applies activations and writes wherever it likes. A sum runs over the inputs in an
// order that depends only on how many rows its tile has.
#pragma once

#include "matmul/step.h"

namespace rxt::RXT_INSTRUCTION_SET {

// Rows and panels of a full tile: as many sums as the registers hold beside the operands.
#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable
constexpr int tile_rows = 3, tile_panels = 1;
#elif RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2
constexpr int tile_rows = 6, tile_panels = 1;
#else
constexpr int tile_rows = 12, tile_panels = 2;
#endif

// Sums of `rows` rows from `first_row` on and of `outputs` outputs from `first_output` on (zeros behind them, to the stride).
struct Tile {
    static constexpr int stride = tile_panels * static_cast<int>(panel_width);
    int64_t first_row, first_output;
    int rows, outputs;
    const float* sums;

    const float* row(int index) const { return sums + index * stride; }
};

// Activations: row(i) is the address of row i, whose inputs lie `stride` elements apart.
template <class RowAddress>
struct Rows {
    RowAddress row;
    int64_t stride;
};

template <class RowAddress>
Rows<RowAddress> rows_at(RowAddress row, int64_t stride = 1) {
    return {row, stride};
}

namespace detail {

// Chains of sums per output: with few rows, a single one could not keep the multipliers busy while it waits for itself.
template <int rows, int panels>
constexpr int chain_count() {
    constexpr int sums = rows * panels * vectors_per_panel;
    return sums >= 8 ? 1 : sums >= 4 ? 2 : 4;
}

template <int rows, int panels, class Weight>
inline void sums_of_tile(const float* const* a, int64_t stride, const Weight* const* weights, int64_t inputs, const Target& out) {
    constexpr int chains = chain_count<rows, panels>(), width = inputs_per_step<Weight>;
    Float sum[chains][rows][panels][vectors_per_panel];
    RXT_UNROLL
    for (int c = 0; c < chains; ++c)
        RXT_UNROLL
        for (int r = 0; r < rows; ++r)
            RXT_UNROLL
            for (int p = 0; p < panels; ++p)
                RXT_UNROLL
                for (int v = 0; v < vectors_per_panel; ++v) sum[c][r][p][v] = zero();
    const auto step = [&](int chain, int64_t k, int present) __attribute__((always_inline)) {
        add_step<rows, panels, Weight>([&](int r, int i) __attribute__((always_inline)) { return a[r][(k + i) * stride]; },
                                       [&](int p) __attribute__((always_inline)) { return weights[p] + k * panel_width; },
                                       present, sum[chain]);
    };
    int64_t k = 0;
    for (; k + chains * width <= inputs; k += chains * width) {
        RXT_UNROLL
        for (int chain = 0; chain < chains; ++chain) step(chain, k + chain * width, width);
    }
    for (; k + width <= inputs; k += width) step(0, k, width);
    if (k < inputs) step(0, k, 1);
    RXT_UNROLL
    for (int r = 0; r < rows; ++r)
        RXT_UNROLL
        for (int p = 0; p < panels; ++p)
            RXT_UNROLL
            for (int v = 0; v < vectors_per_panel; ++v) {
                Float total = sum[0][r][p][v];
                RXT_UNROLL
                for (int chain = 1; chain < chains; ++chain) total = total + sum[chain][r][p][v];
                store(out.at + r * out.row + p * out.panel + v * Float::lanes, total);
            }
}

// Chooses the template for a number of rows that is known at run time.
template <int most_rows, int panels, class Weight>
inline void sums_of_rows(int rows, const float* const* a, int64_t stride, const Weight* const* weights, int64_t inputs,
                         const Target& out) {
    if constexpr (most_rows == 1) {
        sums_of_tile<1, panels>(a, stride, weights, inputs, out);
    } else if (rows == most_rows) {
        sums_of_tile<most_rows, panels>(a, stride, weights, inputs, out);
    } else {
        sums_of_rows<most_rows - 1, panels>(rows, a, stride, weights, inputs, out);
    }
}

}  // namespace detail

// Rows [first_row, last_row) times panels [first_panel, last_panel): epilogue(const Tile&) for every tile.
template <class Weight, class RowAddress, class Epilogue>
inline void multiply(const Rows<RowAddress>& a, int64_t first_row, int64_t last_row, const Panels<Weight>& weights,
                     int64_t first_panel, int64_t last_panel, Epilogue&& epilogue) {
    // Rows that stay in the cache while all panels pass by.
    constexpr int64_t block = tile_rows * (96 / tile_rows);
    alignas(64) float sums[tile_rows * Tile::stride];
    const detail::Target target{sums, Tile::stride, panel_width};
    for (int64_t block_start = first_row; block_start < last_row; block_start += block) {
        const int64_t block_end = block_start + block < last_row ? block_start + block : last_row;
        for (int64_t panel = first_panel; panel < last_panel; panel += tile_panels) {
            const int panels = last_panel - panel < tile_panels ? static_cast<int>(last_panel - panel) : tile_panels;
            const Weight* at[tile_panels];
            for (int p = 0; p < panels; ++p) at[p] = weights.panel(panel + p);
            const int64_t first_output = panel * panel_width;
            const int64_t left = weights.outputs - first_output;
            const int outputs = static_cast<int>(left < panels * panel_width ? left : panels * panel_width);
            for (int64_t row = block_start; row < block_end; row += tile_rows) {
                const int rows = block_end - row < tile_rows ? static_cast<int>(block_end - row) : tile_rows;
                const float* addresses[tile_rows];
                for (int r = 0; r < rows; ++r) addresses[r] = a.row(row + r);
                if (panels == tile_panels) {
                    detail::sums_of_rows<tile_rows, tile_panels>(rows, addresses, a.stride, at, weights.inputs, target);
                } else {
                    detail::sums_of_rows<tile_rows, 1>(rows, addresses, a.stride, at, weights.inputs, target);
                }
                if (weights.scales != nullptr) {
                    for (int r = 0; r < rows; ++r)
                        for (int i = 0; i < panels * panel_width; i += Float::lanes) {
                            float* sum = sums + r * Tile::stride + i;
                            store(sum, load(sum) * load(weights.scales + first_output + i));
                        }
                }
                epilogue(Tile{row, first_output, rows, outputs, sums});
            }
        }
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
