// The processor's intrinsics; in a build that emulates AVX-512, its instructions written out in plain C++.
#pragma once

#include <immintrin.h>

#ifdef RXT_EMULATE_AVX512
#include "simd/emulated_avx512.h"
#endif
