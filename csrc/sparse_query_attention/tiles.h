// Products of small tiles that stay in registers, and the softmax between two of them.
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

// What one step multiplies: one value in fp32, or a pair of bfloat16 where the processor does that.
template <class Operand>
constexpr int values_per_step = 1;
#if RXT_HAS_BFLOAT16_DOT
template <>
constexpr int values_per_step<Pair> = 2;
#endif

template <class Operand>
inline int64_t steps_of(int64_t values) {
    return (values + values_per_step<Operand> - 1) / values_per_step<Operand>;
}

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
    template <int RowStride, int StepStride, class Operand, class Element>
    [[gnu::always_inline]] inline void multiply(int64_t steps, const Operand* left, const Element* right, int64_t right_stride) {
        for (int64_t step = 0; step < steps; ++step) {
            decltype(load(right)) vectors[Vectors];
            RXT_UNROLL
            for (int v = 0; v < Vectors; ++v) vectors[v] = load(right + v * Float::lanes);
            RXT_UNROLL
            for (int row = 0; row < Rows; ++row) {
                const auto factor = broadcast(left[row * RowStride]);
                RXT_UNROLL
                for (int v = 0; v < Vectors; ++v) sums[row][v] = multiply_add(factor, vectors[v], sums[row][v]);
            }
            left += StepStride;
            right += right_stride;
        }
    }
};

constexpr int64_t piece = 64;  // long heads are summed in pieces, which round less

// Scores of a tile of queries (steps, Rows) and a panel of keys (steps, panel).
template <int Rows, class Operand>
[[gnu::always_inline]] inline void score_panel(int64_t steps, const Operand* queries, const Operand* keys, float* scores,
                                               int64_t stride) {
    Tile<Rows, tile_vectors> tile;
    tile.clear();
    tile.template multiply<1, Rows>(steps < piece ? steps : piece, queries, keys, panel);
    tile.write(scores, stride);
    for (int64_t first = piece; first < steps; first += piece) {
        tile.clear();
        tile.template multiply<1, Rows>(
            steps - first < piece ? steps - first : piece, queries + first * Rows, keys + first * panel, panel);
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

constexpr float no_score = -__builtin_inff();

// What a query has seen so far: its largest score, as an exponent of 2, and the sum of 2^(score - largest).
struct RunningSoftmax {
    float largest_score = no_score, total = 0.0f;

    // What is taken from scores whose largest is `found`, together with those before: 0 where all are hidden, so that all weigh 0.
    float base(float found) const {
        const float now = largest_score > found ? largest_score : found;
        return now == no_score ? 0.0f : now;
    }

    // The factor for what has been summed with earlier weights.
    float add(float found, float sum_of_weights) {
        const float now = largest_score > found ? largest_score : found;
        const float factor = largest_score == now ? 1.0f : exp2_of_negative(largest_score - base(found));
        largest_score = now;
        total = total * factor + sum_of_weights;
        return factor;
    }
};

inline float largest_of(const float* scores, int64_t vectors) {
    Float top = broadcast(no_score);
    for (int64_t v = 0; v < vectors; ++v) top = maximum(load(scores + v * Float::lanes), top);
    return largest(top);
}

// A row of scores, exponents of 2 over `vectors` vectors, becomes weights 2^(score - largest), in place. Returns the factor for
// what has been summed with earlier ones.
inline float weigh(float* scores, int64_t vectors, RunningSoftmax& softmax) {
    const float found = largest_of(scores, vectors);
    const Float offset = broadcast(softmax.base(found));
    Float sums = zero();
    for (int64_t v = 0; v < vectors; ++v) {
        const Float weight = exp2_of_negative(load(scores + v * Float::lanes) - offset);
        store(scores + v * Float::lanes, weight);
        sums = sums + weight;
    }
    return softmax.add(found, sum(sums));
}

#if RXT_HAS_BFLOAT16_DOT

// The same for an even number of vectors of scores that are still to be multiplied by `scale`; weights are rounded to bfloat16.
inline float weigh(const float* scores, float scale, int64_t vectors, RunningSoftmax& softmax, Pair* weights) {
    const float found = largest_of(scores, vectors) * scale;
    const Float factor = broadcast(scale), offset = broadcast(-softmax.base(found));
    Float sums = zero();
    for (int64_t v = 0; v < vectors; v += 2) {
        const Float low = exp2_of_negative<true>(multiply_add(load(scores + v * Float::lanes), factor, offset));
        const Float high = exp2_of_negative<true>(multiply_add(load(scores + (v + 1) * Float::lanes), factor, offset));
        store_pairs(weights + v / 2 * Float::lanes, low, high);
        sums = sums + (low + high);
    }
    return softmax.add(found, sum(sums));
}

#endif

// -infinity in the columns from `first` up to `count`.
inline void hide_from(float* scores, int64_t first, int64_t count) {
    for (int64_t column = first > 0 ? first : 0; column < count; ++column) scores[column] = no_score;
}

}  // namespace rxt::RXT_INSTRUCTION_SET::attention
