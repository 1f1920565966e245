// Squares of rows turned into columns.
#pragma once

#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

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

}  // namespace rxt::RXT_INSTRUCTION_SET
