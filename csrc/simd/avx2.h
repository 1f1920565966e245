// Vectors of fp32 for AVX2 with FMA.
#pragma once

#include "simd/intrinsics.h"

#include "core/types.h"

namespace rxt::avx2 {

struct Float {
    static constexpr int lanes = 8;
    __m256 value;
};

inline Float broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Float zero() { return {_mm256_setzero_ps()}; }

inline __m256i first_lanes(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Float load(const float* source) { return {_mm256_loadu_ps(source)}; }

inline Float widen(__m128i halves) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
}

inline Float load(const BFloat16* source) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))); }

// The first `count` values; zeros after them, and nothing is read there.
inline Float load_part(const float* source, int count) { return {_mm256_maskload_ps(source, first_lanes(count))}; }

inline Float load_part(const BFloat16* source, int count) {
    alignas(16) uint16_t halves[8] = {};
    for (int lane = 0; lane < count; ++lane) halves[lane] = source[lane].bits;
    return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(halves)));
}

// Rounded to nearest, ties to even; a NaN stays one.
inline __m128i narrow(Float x) {
    const __m256i bits = _mm256_castps_si256(x.value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.value, x.value, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm256_castsi256_si128(
        _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, _mm256_setzero_si256()), 0b11011000));
}

inline void store(float* target, Float x) { _mm256_storeu_ps(target, x.value); }
inline void store(BFloat16* target, Float x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(target), narrow(x)); }
inline void store_part(float* target, Float x, int count) { _mm256_maskstore_ps(target, first_lanes(count), x.value); }

inline void store_part(BFloat16* target, Float x, int count) {
    alignas(16) uint16_t halves[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(halves), narrow(x));
    for (int lane = 0; lane < count; ++lane) target[lane].bits = halves[lane];
}

inline Float operator+(Float a, Float b) { return {_mm256_add_ps(a.value, b.value)}; }
inline Float operator-(Float a, Float b) { return {_mm256_sub_ps(a.value, b.value)}; }
inline Float operator*(Float a, Float b) { return {_mm256_mul_ps(a.value, b.value)}; }
inline Float operator/(Float a, Float b) { return {_mm256_div_ps(a.value, b.value)}; }

inline Float multiply_add(Float a, Float b, Float c) { return {_mm256_fmadd_ps(a.value, b.value, c.value)}; }

// NaN in `a` survives: the instruction returns its second operand when either is NaN.
inline Float maximum(Float a, Float b) { return {_mm256_max_ps(b.value, a.value)}; }
inline Float minimum(Float a, Float b) { return {_mm256_min_ps(b.value, a.value)}; }

// Lanes of `x` where `a < b`, of `y` elsewhere.
inline Float where_less(Float a, Float b, Float x, Float y) {
    return {_mm256_blendv_ps(y.value, x.value, _mm256_cmp_ps(a.value, b.value, _CMP_LT_OQ))};
}

inline float sum(Float x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x.value), _mm256_extractf128_ps(x.value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

inline float largest(Float x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x.value), _mm256_extractf128_ps(x.value, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// x rounded to the nearest integer.
inline Float round_nearest(Float x) {
    return {_mm256_round_ps(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// x * 2^n, for an integral n from -126 to 127.
inline Float scale_by_power(Float x, Float n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.value), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(x.value, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

}  // namespace rxt::avx2
