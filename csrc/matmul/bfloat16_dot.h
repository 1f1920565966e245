// The matrix product of bfloat16 rows and bfloat16 weights by the instruction that multiplies pairs and adds them in fp32:
// twice the rate of fp32. Only where the instruction set has it (RXT_HAS_BFLOAT16_DOT).
#pragma once

#include "matmul/multiply.h"

#if RXT_HAS_BFLOAT16_DOT

namespace rxt::RXT_INSTRUCTION_SET {

namespace detail {

template <int rows, int panels>
inline void dots_of_tile(const BFloat16* const* a, const BFloat16* const* weights, int64_t inputs, float* out) {
    __m512 sum[rows][panels];
    for (int r = 0; r < rows; ++r)
        for (int p = 0; p < panels; ++p) sum[r][p] = _mm512_setzero_ps();
    const auto step = [&](int64_t k, int present) __attribute__((always_inline)) {
        __m512i w[panels];
        for (int p = 0; p < panels; ++p) w[p] = _mm512_loadu_si512(weights[p] + k * panel_width);
        for (int r = 0; r < rows; ++r) {
            int32_t pair = 0;
            __builtin_memcpy(&pair, a[r] + k, sizeof(BFloat16) * present);
            const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
            for (int p = 0; p < panels; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], x, reinterpret_cast<__m512bh>(w[p]));
        }
    };
    int64_t k = 0;
    for (; k + 2 <= inputs; k += 2) step(k, 2);
    if (k < inputs) step(k, 1);
    for (int r = 0; r < rows; ++r)
        for (int p = 0; p < panels; ++p) _mm512_storeu_ps(out + r * Tile::stride + p * panel_width, sum[r][p]);
}

template <int most_rows, int panels>
inline void dots_of_rows(int rows, const BFloat16* const* a, const BFloat16* const* weights, int64_t inputs, float* out) {
    if constexpr (most_rows == 1) {
        dots_of_tile<1, panels>(a, weights, inputs, out);
    } else if (rows == most_rows) {
        dots_of_tile<most_rows, panels>(a, weights, inputs, out);
    } else {
        dots_of_rows<most_rows - 1, panels>(rows, a, weights, inputs, out);
    }
}

}  // namespace detail

// As `multiply`, with row(i) the address of a contiguous bfloat16 row.
template <class RowAddress, class Epilogue>
inline void multiply_dot(RowAddress row_address, int64_t first_row, int64_t last_row, const Panels<BFloat16>& weights,
                         int64_t first_panel, int64_t last_panel, Epilogue&& epilogue) {
    constexpr int64_t block = tile_rows * (192 / tile_rows);
    alignas(64) float sums[tile_rows * Tile::stride];
    for (int64_t block_start = first_row; block_start < last_row; block_start += block) {
        const int64_t block_end = block_start + block < last_row ? block_start + block : last_row;
        for (int64_t panel = first_panel; panel < last_panel; panel += tile_panels) {
            const int panels = last_panel - panel < tile_panels ? static_cast<int>(last_panel - panel) : tile_panels;
            const BFloat16* at[tile_panels];
            for (int p = 0; p < panels; ++p) at[p] = weights.panel(panel + p);
            const int64_t first_output = panel * panel_width, left = weights.outputs - first_output;
            const int outputs = static_cast<int>(left < panels * panel_width ? left : panels * panel_width);
            for (int64_t row = block_start; row < block_end; row += tile_rows) {
                const int rows = block_end - row < tile_rows ? static_cast<int>(block_end - row) : tile_rows;
                const BFloat16* addresses[tile_rows];
                for (int r = 0; r < rows; ++r) addresses[r] = row_address(row + r);
                if (panels == tile_panels) {
                    detail::dots_of_rows<tile_rows, tile_panels>(rows, addresses, at, weights.inputs, sums);
                } else {
                    detail::dots_of_rows<tile_rows, 1>(rows, addresses, at, weights.inputs, sums);
                }
                epilogue(Tile{row, first_output, rows, outputs, sums});
            }
        }
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET

#endif
