// Squares of rows turned into columns.
#pragma once

#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable

// A square of `lanes` rows, transposed. `source_stride` in elements, `target_stride` in floats.
template <class Element>
inline void transpose_square(const Element* source, int64_t source_stride, float* target, int64_t target_stride) {
    for (int i = 0; i < Float::lanes; ++i) {
        for (int j = 0; j < Float::lanes; ++j) target[j * target_stride + i] = to_float(source[i * source_stride + j]);
    }
}

#else

namespace detail {

inline __m256 load_eight(const float* source) { return _mm256_loadu_ps(source); }

inline __m256 load_eight(const BFloat16* source) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// A square of eight, in registers of AVX2, which every set has that has AVX-512.
template <class Element>
inline void transpose_eight(const Element* source, int64_t source_stride, float* target, int64_t target_stride) {
    __m256 rows[8], pairs[8], quads[8];
    RXT_UNROLL
    for (int i = 0; i < 8; ++i) rows[i] = load_eight(source + i * source_stride);
    RXT_UNROLL
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    RXT_UNROLL
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    RXT_UNROLL
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(target + i * target_stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
        _mm256_storeu_ps(target + (i + 4) * target_stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
    }
}

}  // namespace detail

// A square of `lanes` rows, transposed. `source_stride` in elements, `target_stride` in floats.
template <class Element>
inline void transpose_square(const Element* source, int64_t source_stride, float* target, int64_t target_stride) {
    for (int i = 0; i < Float::lanes; i += 8)
        for (int j = 0; j < Float::lanes; j += 8)
            detail::transpose_eight(source + i * source_stride + j, source_stride, target + j * target_stride + i, target_stride);
}

#endif

}  // namespace rxt::RXT_INSTRUCTION_SET
