// Vectors of fp32 for AVX-512 with BF16 and VNNI, which round to bfloat16 and multiply pairs of it in one instruction.
#pragma once

#include <cstring>

#include "simd/intrinsics.h"

#include "core/types.h"

namespace rxt::avx512_bf16 {

// Rounded to nearest, ties to even; a NaN stays one. Denormal values become zero.
inline __m256i narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

#include "simd/avx512_vectors.inc"

// Two values of bfloat16 in a word, the first one in its lower half.
struct Pair {
    uint32_t bits;
};

inline Pair pair_of(BFloat16 first, BFloat16 second) { return {first.bits | uint32_t{second.bits} << 16}; }

inline Pair pair_at(const BFloat16* values) {
    Pair pair;
    std::memcpy(&pair, values, sizeof pair);
    return pair;
}

// As many pairs as Float has lanes. A product of pairs is the sum of both products.
struct Pairs {
    __m512bh value;
};

inline Pairs broadcast(Pair pair) { return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair.bits)))}; }
inline Pairs load_pairs(const void* source) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(source))}; }
inline Pairs load(const Pair* source) { return load_pairs(source); }
inline Float multiply_add(Pairs a, Pairs b, Float c) { return {_mm512_dpbf16_ps(c.value, a.value, b.value)}; }

// The first values of pairs, with zeros beside them.
inline Pairs first_of_pairs(Pairs pairs) {
    return {reinterpret_cast<__m512bh>(_mm512_and_si512(reinterpret_cast<__m512i>(pairs.value), _mm512_set1_epi32(0xffff)))};
}

// Neighbours become pairs: those of `low`, then those of `high`.
inline void store_pairs(Pair* target, Float low, Float high) {
    _mm512_storeu_si512(target, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.value, low.value)));
}

}  // namespace rxt::avx512_bf16
