// Tiles of sums of rows and weights of bfloat16, where the processor multiplies pairs of them and adds both products to a sum in fp32
// (AVX-512 BF16): twice the arithmetic of fp32, and weights need no unpacking. Rows are rounded to bfloat16, as torch does with the
// activations of a model in bfloat16.
#pragma once

#include "matmul/step.h"

namespace rxt::RXT_INSTRUCTION_SET {

#if RXT_HAS_BFLOAT16_DOT

// `values` has room for an even number of them; an odd last one is paired with a zero.
inline void round_row_to_bfloat16(const float* row, int64_t inputs, BFloat16* values) {
    for (int64_t k = 0; k < inputs; k += Float::lanes) store_up_to(values + k, load_up_to(row + k, inputs - k), inputs - k);
    if (inputs % 2 != 0) values[inputs] = BFloat16{0};
}

namespace detail {

// Inputs 2 k and 2 k + 1 of row r lie at a[r] + k * stride.
template <int rows, int panels>
__attribute__((noinline)) void pairs_tile(const BFloat16* const* a, int64_t stride, const BFloat16* weights, int64_t distance,
                                          int64_t inputs, const Target& out) {
    static_assert(vectors_per_panel == 1, "a panel's sums are one register");
    Float sum[rows][panels];
    RXT_UNROLL
    for (int r = 0; r < rows; ++r)
        RXT_UNROLL
        for (int p = 0; p < panels; ++p) sum[r][p] = zero();
    const int64_t pairs = (inputs + 1) / 2;
    for (int64_t k = 0; k < pairs; ++k) {
        if constexpr (panels <= rows) {
            Pairs w[panels];
            RXT_UNROLL
            for (int p = 0; p < panels; ++p) w[p] = load_pairs(weights + p * distance + 2 * k * panel_width);
            RXT_UNROLL
            for (int r = 0; r < rows; ++r) {
                const Pairs x = broadcast(pair_at(a[r] + k * stride));
                RXT_UNROLL
                for (int p = 0; p < panels; ++p) sum[r][p] = multiply_add(x, w[p], sum[r][p]);
            }
        } else {
            Pairs x[rows];
            RXT_UNROLL
            for (int r = 0; r < rows; ++r) x[r] = broadcast(pair_at(a[r] + k * stride));
            RXT_UNROLL
            for (int p = 0; p < panels; ++p) {
                const Pairs w = load_pairs(weights + p * distance + 2 * k * panel_width);
                RXT_UNROLL
                for (int r = 0; r < rows; ++r) sum[r][p] = multiply_add(x[r], w, sum[r][p]);
            }
        }
    }
    RXT_UNROLL
    for (int r = 0; r < rows; ++r)
        RXT_UNROLL
        for (int p = 0; p < panels; ++p) store(out.at + r * out.row + p * out.panel, sum[r][p]);
}

// Chooses the template for a number of rows that is known at run time.
template <int most_rows, int panels>
inline void pairs_of_rows(int rows, const BFloat16* const* a, int64_t stride, const BFloat16* weights, int64_t distance,
                          int64_t inputs, const Target& out) {
    if constexpr (most_rows > 1) {
        if (rows < most_rows) return pairs_of_rows<most_rows - 1, panels>(rows, a, stride, weights, distance, inputs, out);
    }
    pairs_tile<most_rows, panels>(a, stride, weights, distance, inputs, out);
}

}  // namespace detail

#endif

}  // namespace rxt::RXT_INSTRUCTION_SET
