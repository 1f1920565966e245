// The vectors of the instruction set that this file is compiled for, and functions over them.
//
// A kernel file is compiled once per instruction set with RXT_INSTRUCTION_SET set to its name. It includes this header and puts
// all that it defines into `namespace rxt::RXT_INSTRUCTION_SET`. It uses no templates of the standard library: the linker keeps one
// copy of those, and could keep the one that was compiled for instructions which this machine lacks.
#pragma once

#define RXT_SET_portable 0
#define RXT_SET_avx2 1
#define RXT_SET_avx512 2
#define RXT_SET_avx512_bf16 3
#define RXT_SET_NUMBER_(name) RXT_SET_##name
#define RXT_SET_NUMBER(name) RXT_SET_NUMBER_(name)

#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable
#include "simd/portable.h"
#elif RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2
#include "simd/avx2.h"
#elif RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx512
#include "simd/avx512.h"
#else
#include "simd/avx512_bf16.h"
#endif

// Written before a loop of constant length over vectors that are to stay in registers: an array whose loops are not all unrolled
// lies in memory, and every sum is then stored in every step. Compilers decide otherwise from one version and caller to the next.
#if defined(__clang__)
#define RXT_UNROLL _Pragma("unroll")
#else
#define RXT_UNROLL _Pragma("GCC unroll 64")
#endif

#define RXT_HAS_BFLOAT16_DOT (RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx512_bf16)
#define RXT_HAS_INTEGER_DOT (RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx512_bf16)

namespace rxt::RXT_INSTRUCTION_SET {

// 2^x to about one unit in the last place; below -126 it is 0, and infinity from 128 on. NaN stays NaN.
inline Float exp2(Float x) {
    const Float bounded = minimum(maximum(x, broadcast(-127.0f)), broadcast(129.0f));
    // Round, and leave room: 2^n with n up to 127 is a number; the rest of a large x stays in the fraction.
    const Float n = minimum(maximum(round_nearest(bounded), broadcast(-126.0f)), broadcast(127.0f));
    const Float fraction = bounded - n;
    // Taylor-like minimax polynomial of 2^f on [-1/2, 1/2]; its error is below 2^-24.
    Float p = broadcast(1.5403530e-4f);
    p = multiply_add(p, fraction, broadcast(1.3333558e-3f));
    p = multiply_add(p, fraction, broadcast(9.6181291e-3f));
    p = multiply_add(p, fraction, broadcast(5.5504109e-2f));
    p = multiply_add(p, fraction, broadcast(2.4022651e-1f));
    p = multiply_add(p, fraction, broadcast(6.9314718e-1f));
    p = multiply_add(p, fraction, broadcast(1.0f));
    const Float result = scale_by_power(p, n);
    return where_less(x, broadcast(-126.0f), zero(), where_less(broadcast(127.99999f), x, broadcast(__builtin_inff()), result));
}

// 2^f on [-1/2, 1/2], which is 1 at 0: a minimax polynomial, within 2e-7 of it. What is to be rounded to bfloat16 needs less, 1e-4.
template <bool coarse>
[[gnu::always_inline]] inline Float exp2_of_fraction(Float fraction) {
    if constexpr (coarse) {
        Float p = broadcast(5.500893e-2f);
        p = multiply_add(p, fraction, broadcast(2.4221097e-1f));
        p = multiply_add(p, fraction, broadcast(6.9328293e-1f));
        return multiply_add(p, fraction, broadcast(1.0f));
    }
    Float p = broadcast(1.32647273e-3f);
    p = multiply_add(p, fraction, broadcast(9.67151299e-3f));
    p = multiply_add(p, fraction, broadcast(5.55073358e-2f));
    p = multiply_add(p, fraction, broadcast(2.40222424e-1f));
    p = multiply_add(p, fraction, broadcast(6.93147004e-1f));
    return multiply_add(p, fraction, broadcast(1.0f));
}

// 2^x for x <= 0, as accurate as that; exactly 0 from -127 down, where hidden scores are. NaN stays NaN.
template <bool coarse = false>
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
    const Float p = exp2_of_fraction<coarse>(fraction);
#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2
    return p * power;
#elif RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable
    return where_less(x, broadcast(-126.0f), zero(), scale_by_power(p, maximum(power, broadcast(-126.0f))));
#else
    return scale_by_power(p, power);
#endif
}

inline float exp2_of_negative(float x) { return largest(exp2_of_negative(broadcast(x))); }

inline Float exp(Float x) {
    // Two steps: log2(e) rounded once would cost accuracy at large |x|.
    const Float high = x * broadcast(1.44269504f);
    const Float n = round_nearest(minimum(maximum(high, broadcast(-127.0f)), broadcast(128.0f)));
    Float rest = multiply_add(n, broadcast(-0.693145752f), x);
    rest = multiply_add(n, broadcast(-1.42860677e-6f), rest);
    Float p = broadcast(1.3981999e-3f);
    p = multiply_add(p, rest, broadcast(8.3345160e-3f));
    p = multiply_add(p, rest, broadcast(4.1665795e-2f));
    p = multiply_add(p, rest, broadcast(1.6666667e-1f));
    p = multiply_add(p, rest, broadcast(0.5f));
    p = multiply_add(p, rest, broadcast(1.0f));
    p = multiply_add(p, rest, broadcast(1.0f));
    const Float bounded = minimum(maximum(n, broadcast(-126.0f)), broadcast(127.0f));
    const Float result = scale_by_power(p, bounded) * where_less(bounded, n, broadcast(2.0f), broadcast(1.0f));
    return where_less(x, broadcast(-87.33654f), zero(), where_less(broadcast(88.72283f), x, broadcast(__builtin_inff()), result));
}

inline Float sigmoid(Float x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(zero() - x)); }

template <class Element>
inline Float load_up_to(const Element* source, int64_t count) {
    return count >= Float::lanes ? load(source) : load_part(source, static_cast<int>(count));
}

template <class Element>
inline void store_up_to(Element* target, Float x, int64_t count) {
    if (count >= Float::lanes) {
        store(target, x);
    } else {
        store_part(target, x, static_cast<int>(count));
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
