// Queries, keys and values in the order in which tiles read them.
#pragma once

#include "sparse_query_attention/heads.h"
#include "sparse_query_attention/tiles.h"

namespace rxt::RXT_INSTRUCTION_SET::attention {

#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2
// A square of `lanes` rows, transposed. `source_stride` in elements, `target_stride` in floats.
template <class Element>
inline void transpose_square(const Element* source, int64_t source_stride, float* target, int64_t target_stride) {
    __m256 rows[8], pairs[8], quads[8];
    for (int i = 0; i < 8; ++i) rows[i] = load(source + i * source_stride).value;
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(target + i * target_stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
        _mm256_storeu_ps(target + (i + 4) * target_stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
    }
}
#else
template <class Element>
inline void transpose_square(const Element* source, int64_t source_stride, float* target, int64_t target_stride) {
    for (int i = 0; i < Float::lanes; ++i) {
        for (int j = 0; j < Float::lanes; ++j) target[j * target_stride + i] = to_float(source[i * source_stride + j]);
    }
}
#endif

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
