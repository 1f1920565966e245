// The product of rows and weights of bfloat16 for decoding, where the processor multiplies pairs of them.
#pragma once

#include "matmul/bytes.h"
#include "matmul/pairs.h"

namespace rxt::RXT_INSTRUCTION_SET {

#if RXT_HAS_BFLOAT16_DOT

namespace detail {

template <int rows, int beside>
inline void pairs_across(const BFloat16* const* a, const BFloat16* weights, int64_t distance, int64_t inputs, int panels, float* out) {
    int p = 0;
    for (; p + beside <= panels; p += beside)
        pairs_tile<rows, beside>(a, 2, weights + p * distance, distance, inputs, {out + p * panel_width, Sums::stride, panel_width});
    if constexpr (beside > 1) {
        if (p < panels)
            pairs_across<rows, beside / 2>(a, weights + p * distance, distance, inputs, panels - p, out + p * panel_width);
    }
}

template <int most_rows>
inline void pairs_rows_across(int rows, const BFloat16* const* a, const BFloat16* weights, int64_t distance, int64_t inputs,
                              int panels, float* out) {
    if constexpr (most_rows > 1) {
        if (rows < most_rows) return pairs_rows_across<most_rows - 1>(rows, a, weights, distance, inputs, panels, out);
    }
    pairs_across<most_rows, panels_beside(most_rows)>(a, weights, distance, inputs, panels, out);
}

}  // namespace detail

// As stream(), for rows that were rounded to bfloat16: RoundedRows hold its bits, and no scales. place(i) is the number of row i among
// them.
template <class Place, class Epilogue>
inline void stream_pairs(int64_t rows, const RoundedRows& rounded, Place place, const Panels<BFloat16>& weights,
                         int64_t first_panel, int64_t last_panel, Epilogue&& epilogue) {
    const auto* values = reinterpret_cast<const BFloat16*>(rounded.values);
    const auto group = [&](int64_t first, int count, int64_t panel, int panels, float* sums) {
        const BFloat16* addresses[stream_rows];
        for (int r = 0; r < count; ++r) addresses[r] = values + place(first + r) * rounded.stride;
        detail::pairs_rows_across<stream_rows>(count, addresses, weights.panel(panel), weights.elements_of_one(), weights.inputs,
                                               panels, sums);
    };
    stream_tiles(rows, first_panel, last_panel, group, epilogue);
}

#endif

}  // namespace rxt::RXT_INSTRUCTION_SET
