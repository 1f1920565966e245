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

}  // namespace rxt::RXT_INSTRUCTION_SET::attention
