// Queries, keys and values in the order in which tiles read them.
#pragma once

#include "simd/transpose.h"
#include "sparse_query_attention/heads.h"
#include "sparse_query_attention/tiles.h"

namespace rxt::RXT_INSTRUCTION_SET::attention {

// `count` heads that lie `stride` apart become the columns of a panel (width, panel); the columns after them are 0.
template <class Element>
inline void pack_panel(const Element* source, int64_t stride, int64_t count, int64_t width, float* target) {
    int64_t first = 0;
    if (count >= panel) {
        for (; first + Float::lanes <= width; first += Float::lanes) {
            for (int64_t column = 0; column < panel; column += Float::lanes) {
                transpose_square(source + column * stride + first, stride, target + first * panel + column, panel);
            }
        }
    }
    for (int64_t i = first; i < width; ++i) {
        for (int64_t column = 0; column < panel; ++column) {
            target[i * panel + column] = column < count ? to_float(source[column * stride + i]) : 0.0f;
        }
    }
}

#if RXT_HAS_BFLOAT16_DOT

inline BFloat16 rounded(float x) { return to_bfloat16(x); }
inline BFloat16 rounded(BFloat16 x) { return x; }

// The same, rounded to pairs of bfloat16: (width / 2, panel). An odd last value is paired with a zero.
template <class Element>
inline void pack_panel(const Element* source, int64_t stride, int64_t count, int64_t width, Pair* target) {
    for (int64_t column = 0; column < panel; ++column) {
        const Element* head = source + column * stride;
        for (int64_t i = 0; i < width; i += 2) {
            const bool inside = column < count;
            const BFloat16 first = inside ? rounded(head[i]) : BFloat16{0};
            const BFloat16 second = inside && i + 1 < width ? rounded(head[i + 1]) : BFloat16{0};
            target[i / 2 * panel + column] = pair_of(first, second);
        }
    }
}

#endif

constexpr float log2_of_e = 1.44269504088896341f;

// One query, rotated and scaled, widened to fp32.
template <class Element>
inline void read_query(const AttentionForward& a, int64_t batch, int64_t time, int64_t head, float scale, float* values) {
    read_head(head_at<Element>(a.query, a.query_strides, batch, time, query_head(a, head)), a.head_dim, values);
    if (a.query_rotary.cosine != nullptr) rotate(a.query_rotary, batch, time, a.split, a.head_dim, values);
    for (int64_t i = 0; i < a.head_dim; ++i) values[i] *= scale;
}

// Rows of `width` values as tiles (width, Rows): row `row` becomes column row % Rows of its tile.
template <int Rows>
inline void put_in_tile(const float* values, int64_t row, int64_t width, float* tiles) {
    float* column = tiles + row / Rows * Rows * width + row % Rows;
    for (int64_t i = 0; i < width; ++i) column[i * Rows] = values[i];
}

#if RXT_HAS_BFLOAT16_DOT

// The same, rounded to pairs of bfloat16: (width / 2, Rows). There is a value behind an odd width, and it is 0.
template <int Rows>
inline void put_in_tile(const float* values, int64_t row, int64_t width, Pair* tiles) {
    const int64_t steps = steps_of<Pair>(width);
    Pair* column = tiles + row / Rows * Rows * steps + row % Rows;
    for (int64_t i = 0; i < steps; ++i) {
        column[i * Rows] = pair_of(to_bfloat16(values[2 * i]), to_bfloat16(values[2 * i + 1]));
    }
}

#endif

}  // namespace rxt::RXT_INSTRUCTION_SET::attention
