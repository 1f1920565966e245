// Products of small tiles that stay in registers, and the exponential between two of them.
//
// Every matrix product of attention is made of one step: a few rows, whose elements are broadcast, times vectors that are read
// straight on. Scores have keys along the lanes, for which keys are packed transposed; weighted values have head_dim there.
#pragma once

#include <cstdint>

#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET::attention {

#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) >= RXT_SET_avx512
constexpr int tile_rows = 12;  // 24 sums in 32 registers
#else
constexpr int tile_rows = 6;  // 12 sums in 16 registers
#endif
constexpr int tile_vectors = 2;
constexpr int panel = tile_vectors * Float::lanes;  // keys side by side

template <int Rows, int Vectors>
struct Tile {
    Float sums[Rows][Vectors];

    [[gnu::always_inline]] inline void clear() {
        RXT_UNROLL
        for (int row = 0; row < Rows; ++row) {
            RXT_UNROLL
            for (int v = 0; v < Vectors; ++v) sums[row][v] = zero();
        }
    }

    [[gnu::always_inline]] inline void write(float* target, int64_t stride) const {
        RXT_UNROLL
        for (int row = 0; row < Rows; ++row) {
            RXT_UNROLL
            for (int v = 0; v < Vectors; ++v) store(target + row * stride + v * Float::lanes, sums[row][v]);
        }
    }

    [[gnu::always_inline]] inline void add_to(float* target, int64_t stride) const {
        RXT_UNROLL
        for (int row = 0; row < Rows; ++row) {
            RXT_UNROLL
            for (int v = 0; v < Vectors; ++v) {
                float* place = target + row * stride + v * Float::lanes;
                store(place, load(place) + sums[row][v]);
            }
        }
    }

    // sums[row] += sum over steps of left[row * RowStride + step * StepStride] * (vectors at right + step * right_stride)
    template <int RowStride, int StepStride, class Element>
    [[gnu::always_inline]] inline void multiply(int64_t steps, const float* left, const Element* right, int64_t right_stride) {
        for (int64_t step = 0; step < steps; ++step) {
            Float vectors[Vectors];
            RXT_UNROLL
            for (int v = 0; v < Vectors; ++v) vectors[v] = load(right + v * Float::lanes);
            RXT_UNROLL
            for (int row = 0; row < Rows; ++row) {
                const Float factor = broadcast(left[row * RowStride]);
                RXT_UNROLL
                for (int v = 0; v < Vectors; ++v) sums[row][v] = multiply_add(factor, vectors[v], sums[row][v]);
            }
            left += StepStride;
            right += right_stride;
        }
    }
};

constexpr int64_t piece = 64;  // long heads are summed in pieces, which round less

// Scores of a tile of queries (width, Rows) and a panel of keys (width, panel).
template <int Rows>
[[gnu::always_inline]] inline void score_panel(int64_t width, const float* queries, const float* keys, float* scores,
                                               int64_t stride) {
    Tile<Rows, tile_vectors> tile;
    tile.clear();
    tile.template multiply<1, Rows>(width < piece ? width : piece, queries, keys, panel);
    tile.write(scores, stride);
    for (int64_t first = piece; first < width; first += piece) {
        tile.clear();
        tile.template multiply<1, Rows>(
            width - first < piece ? width - first : piece, queries + first * Rows, keys + first * panel, panel);
        tile.add_to(scores, stride);
    }
}

// The product of two heads, summed as score_panel does it: equal heads give equal sums.
inline float dot(int64_t width, const float* a, const float* b) {
    Float total = zero();
    for (int64_t first = 0; first < width; first += piece) {
        Float sum = zero();
        for (int64_t i = first; i < width && i < first + piece; ++i) sum = multiply_add(broadcast(a[i]), broadcast(b[i]), sum);
        total = first == 0 ? sum : total + sum;
    }
    return largest(total);
}

// 2^x for x <= 0, within 2e-7; exactly 0 from -127 down, where hidden scores are. NaN stays NaN.
inline Float exp2_of_negative(Float x) {
#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2
    // The sum's low bits hold n + 127; moved up to the exponent they are 2^n, which for n = -127 is 0.
    const Float magic = broadcast(12582912.0f + 127.0f);  // 1.5 * 2^23: the fraction of x is pushed out of the significand
    const Float bounded = maximum(x, broadcast(-127.0f));
    const Float shifted = bounded + magic;
    const Float power = {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted.value), 23))};
    const Float fraction = bounded - (shifted - magic);
#else
    const Float bounded = maximum(x, broadcast(-160.0f));
    const Float n = round_nearest(bounded);
    const Float power = n;
    const Float fraction = bounded - n;
#endif
    // Minimax polynomial of 2^f on [-1/2, 1/2] that is 1 at 0.
    Float p = broadcast(1.32647273e-3f);
    p = multiply_add(p, fraction, broadcast(9.67151299e-3f));
    p = multiply_add(p, fraction, broadcast(5.55073358e-2f));
    p = multiply_add(p, fraction, broadcast(2.40222424e-1f));
    p = multiply_add(p, fraction, broadcast(6.93147004e-1f));
    p = multiply_add(p, fraction, broadcast(1.0f));
#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2
    return p * power;
#elif RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable
    return where_less(x, broadcast(-126.0f), zero(), scale_by_power(p, maximum(power, broadcast(-126.0f))));
#else
    return scale_by_power(p, power);
#endif
}

inline float exp2_of_negative(float x) { return largest(exp2_of_negative(broadcast(x))); }

constexpr float no_score = -__builtin_inff();

// A row of scores over `vectors` vectors becomes weights 2^(score - largest). `largest_so_far` and `total` of earlier keys are
// brought up to date; the result is the factor for what has been summed with them.
inline float weigh(float* scores, int64_t vectors, float& largest_so_far, float& total) {
    Float top = broadcast(no_score);
    for (int64_t v = 0; v < vectors; ++v) top = maximum(load(scores + v * Float::lanes), top);
    const float before = largest_so_far, found = largest(top);
    const float now = before > found ? before : found;
    const float base = now == no_score ? 0.0f : now;  // where all are hidden, all weigh 0
    const Float offset = broadcast(base);
    Float sums = zero();
    for (int64_t v = 0; v < vectors; ++v) {
        const Float weight = exp2_of_negative(load(scores + v * Float::lanes) - offset);
        store(scores + v * Float::lanes, weight);
        sums = sums + weight;
    }
    const float factor = before == now ? 1.0f : exp2_of_negative(before - base);
    largest_so_far = now;
    total = total * factor + sum(sums);
    return factor;
}

// -infinity in the columns from `first` up to `count`.
inline void hide_from(float* scores, int64_t first, int64_t count) {
    for (int64_t column = first > 0 ? first : 0; column < count; ++column) scores[column] = no_score;
}

}  // namespace rxt::RXT_INSTRUCTION_SET::attention
