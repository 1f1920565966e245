// The product of rows and packed weights for decoding: few rows, weights that come from memory and are used once.
//
// Memory gives most when several lines of it are read at once, so a row is multiplied with a group of panels side by side. Every sum
// runs over the inputs from first to last in one chain, whatever the number of rows and panels: the bits of a row do not depend on
// what else is computed with it. Weights of 8 bits have a product of their own (bytes.h).
#pragma once

#include "matmul/step.h"

namespace rxt::RXT_INSTRUCTION_SET {

// Vectors of sums that the registers hold beside the operands; the most rows of a tile; the most panels that are read side by side.
#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable
constexpr int stream_sums = 6, stream_rows = 3, stream_panels = 4;
#elif RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2
constexpr int stream_sums = 12, stream_rows = 6, stream_panels = 4;
#else
constexpr int stream_sums = 24, stream_rows = 12, stream_panels = 8;
#endif

// Sums of rows from `first_row` on and of panels from `first_panel` on.
struct Sums {
    static constexpr int stride = stream_panels * static_cast<int>(panel_width);
    int64_t first_row, first_panel;
    int rows, panels;
    float* values;

    int64_t first_output() const { return first_panel * panel_width; }
    float* row(int index) const { return values + index * stride; }
};

namespace detail {

// Panels of a tile of so many rows: a power of two.
constexpr int panels_beside(int rows) {
    int panels = stream_panels;
    while (panels > 1 && rows * panels * vectors_per_panel > stream_sums) panels /= 2;
    return panels;
}

template <int rows, int panels, class Weight>
__attribute__((noinline)) void stream_tile(const float* const* a, const Weight* weights, int64_t distance, int64_t inputs,
                                           float* out) {
    constexpr int width = inputs_per_step<Weight>;
    Float sum[rows][panels][vectors_per_panel];
    RXT_UNROLL
    for (int r = 0; r < rows; ++r)
        RXT_UNROLL
        for (int p = 0; p < panels; ++p)
            RXT_UNROLL
            for (int v = 0; v < vectors_per_panel; ++v) sum[r][p][v] = zero();
    const auto step = [&](int64_t k, int present) __attribute__((always_inline)) {
        add_step<rows, panels, Weight>([&](int r, int i) __attribute__((always_inline)) { return a[r][k + i]; },
                                       [&](int p) __attribute__((always_inline)) { return weights + p * distance + k * panel_width; },
                                       present, sum);
    };
    constexpr int unrolled = rows == 1 ? 4 : 1;
    int64_t k = 0;
    for (; k + unrolled * width <= inputs; k += unrolled * width)
        RXT_UNROLL
        for (int u = 0; u < unrolled; ++u) step(k + u * width, width);
    for (; k + width <= inputs; k += width) step(k, width);
    if (k < inputs) step(k, 1);
    RXT_UNROLL
    for (int r = 0; r < rows; ++r)
        RXT_UNROLL
        for (int p = 0; p < panels; ++p)
            RXT_UNROLL
            for (int v = 0; v < vectors_per_panel; ++v)
                store(out + r * Sums::stride + p * panel_width + v * Float::lanes, sum[r][p][v]);
}

// `panels` panels in tiles of at most `beside`.
template <int rows, int beside, class Weight>
inline void stream_across(const float* const* a, const Weight* weights, int64_t distance, int64_t inputs, int panels,
                          float* out) {
    int p = 0;
    for (; p + beside <= panels; p += beside)
        stream_tile<rows, beside>(a, weights + p * distance, distance, inputs, out + p * panel_width);
    if constexpr (beside > 1) {
        if (p < panels)
            stream_across<rows, beside / 2>(a, weights + p * distance, distance, inputs, panels - p, out + p * panel_width);
    }
}

// Chooses the template for a number of rows that is known at run time.
template <int most_rows, class Weight>
inline void stream_rows_across(int rows, const float* const* a, const Weight* weights, int64_t distance, int64_t inputs,
                               int panels, float* out) {
    if constexpr (most_rows > 1) {
        if (rows < most_rows) return stream_rows_across<most_rows - 1>(rows, a, weights, distance, inputs, panels, out);
    }
    stream_across<most_rows, panels_beside(most_rows)>(a, weights, distance, inputs, panels, out);
}

template <class Weight>
__attribute__((noinline)) void stream_group(int rows, const float* const* a, const Panels<Weight>& weights, int64_t panel,
                                            int panels, float* out) {
    stream_rows_across<stream_rows>(rows, a, weights.panel(panel), weights.elements_of_one(), weights.inputs, panels, out);
}

}  // namespace detail

// Rows [0, rows) times panels [first_panel, last_panel), in groups of panels that begin at first_panel; in a group all rows go by, in
// tiles of nearly equal height. group(first row, rows, first panel, panels, values) computes the sums of a tile, and epilogue(const
// Sums&) takes them.
template <class Group, class Epilogue>
inline void stream_tiles(int64_t rows, int64_t first_panel, int64_t last_panel, Group&& group, Epilogue&& epilogue) {
    alignas(64) float values[stream_rows * Sums::stride];
    // Many rows: fewer panels at a time, which then stay in the nearest cache.
    const int most_panels = rows > 2 * stream_rows ? 2 : stream_panels;
    const int64_t tiles = (rows + stream_rows - 1) / stream_rows;
    for (int64_t panel = first_panel; panel < last_panel; panel += most_panels) {
        const int panels = last_panel - panel < most_panels ? static_cast<int>(last_panel - panel) : most_panels;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = rows * tile / tiles;
            const int count = static_cast<int>(rows * (tile + 1) / tiles - first);
            group(first, count, panel, panels, values);
            epilogue(Sums{first, panel, count, panels, values});
        }
    }
}

// The same, row(i) being the address of row i.
template <class Weight, class RowAddress, class Epilogue>
inline void stream(int64_t rows, RowAddress row, const Panels<Weight>& weights, int64_t first_panel, int64_t last_panel,
                   Epilogue&& epilogue) {
    const auto group = [&](int64_t first, int count, int64_t panel, int panels, float* values) {
        const float* addresses[stream_rows];
        for (int r = 0; r < count; ++r) addresses[r] = row(first + r);
        detail::stream_group(count, addresses, weights, panel, panels, values);
    };
    stream_tiles(rows, first_panel, last_panel, group, epilogue);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
