// Vectors of fp32 for AVX-512 (F, BW, DQ, VL).
#pragma once

#include "simd/intrinsics.h"

#include "core/types.h"

namespace rxt::avx512 {

// Rounded to nearest, ties to even; a NaN stays one.
inline __m256i narrow(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
}

#include "simd/avx512_vectors.inc"

}  // namespace rxt::avx512
