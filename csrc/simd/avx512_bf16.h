// Vectors of fp32 for AVX-512 with BF16 and VNNI, which round to bfloat16 and multiply pairs of it in one instruction.
#pragma once

#include "simd/intrinsics.h"

#include "core/types.h"

namespace rxt::avx512_bf16 {

// Rounded to nearest, ties to even; a NaN stays one. Denormal values become zero.
inline __m256i narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

#include "simd/avx512_vectors.inc"

}  // namespace rxt::avx512_bf16
