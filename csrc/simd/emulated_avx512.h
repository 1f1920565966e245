// The AVX-512 instructions that kernels use, in plain C++ after Intel's description of each, so that kernels for AVX-512 can be
// tested on machines without it. Slow; built on request only (`make test-emulated`).
//
// The compiler has the 64-byte types without the instructions. Each function replaces the intrinsic of its name by a macro, so
// the kernels' sources are what is tested, unchanged.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace rxt::emulated {

// The lanes of a register.
template <class Element, int count>
struct Lanes {
    Element at[count];
};

template <class Element, class Register>
static inline Lanes<Element, sizeof(Register) / sizeof(Element)> lanes(const Register& x) {
    Lanes<Element, sizeof(Register) / sizeof(Element)> result;
    std::memcpy(&result, &x, sizeof x);
    return result;
}

template <class Register, class Element, int count>
static inline Register join(const Lanes<Element, count>& x) {
    Register result;
    static_assert(sizeof result == sizeof x, "lanes fill the register");
    std::memcpy(&result, &x, sizeof x);
    return result;
}

using Floats = Lanes<float, 16>;
using Integers = Lanes<int32_t, 16>;

template <class Function>
static inline __m512 each(Function function) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.at[i] = function(i);
    return join<__m512>(out);
}

template <class Function>
static inline __m512i each_integer(Function function) {
    Integers out;
    for (int i = 0; i < 16; ++i) out.at[i] = function(i);
    return join<__m512i>(out);
}

static inline bool chosen(uint32_t mask, int lane) { return (mask >> lane) & 1; }

static inline __m512 set1_ps(float x) { return each([&](int) { return x; }); }
static inline __m512 setzero_ps() { return set1_ps(0.0f); }
static inline __m512i set1_epi32(int32_t x) { return each_integer([&](int) { return x; }); }

template <class Register>
static inline Register load_register(const void* source) {
    Register x;
    std::memcpy(&x, source, sizeof x);
    return x;
}

static inline __m512 maskz_loadu_ps(__mmask16 mask, const float* source) {
    return each([&](int i) { return chosen(mask, i) ? source[i] : 0.0f; });
}
static inline void storeu_ps(void* target, __m512 x) { std::memcpy(target, &x, sizeof x); }
static inline void mask_storeu_ps(float* target, __mmask16 mask, __m512 x) {
    const auto value = lanes<float>(x);
    for (int i = 0; i < 16; ++i)
        if (chosen(mask, i)) target[i] = value.at[i];
}
static inline __m256i maskz_loadu_epi16_256(__mmask16 mask, const void* source) {
    Lanes<uint16_t, 16> out;
    for (int i = 0; i < 16; ++i) out.at[i] = chosen(mask, i) ? static_cast<const uint16_t*>(source)[i] : uint16_t{0};
    return join<__m256i>(out);
}
static inline void mask_storeu_epi16_256(void* target, __mmask16 mask, __m256i x) {
    const auto value = lanes<uint16_t>(x);
    for (int i = 0; i < 16; ++i)
        if (chosen(mask, i)) static_cast<uint16_t*>(target)[i] = value.at[i];
}

static inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
static inline __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
static inline __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
static inline __m512 div_ps(__m512 a, __m512 b) { return a / b; }
static inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    const auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
    return each([&](int i) { return __builtin_fmaf(x.at[i], y.at[i], z.at[i]); });
}
// Where either is NaN, and where both are zero, the second operand.
static inline __m512 max_ps(__m512 a, __m512 b) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    return each([&](int i) { return x.at[i] > y.at[i] ? x.at[i] : y.at[i]; });
}
static inline __m512 min_ps(__m512 a, __m512 b) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    return each([&](int i) { return x.at[i] < y.at[i] ? x.at[i] : y.at[i]; });
}
static inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) {
        bool holds = false;
        switch (predicate) {
            case _CMP_LT_OQ: holds = x.at[i] < y.at[i]; break;
            case _CMP_LE_OQ: holds = x.at[i] <= y.at[i]; break;
            case _CMP_GT_OQ: holds = x.at[i] > y.at[i]; break;
            case _CMP_GE_OQ: holds = x.at[i] >= y.at[i]; break;
            case _CMP_EQ_OQ: holds = x.at[i] == y.at[i]; break;
            case _CMP_UNORD_Q: holds = x.at[i] != x.at[i] || y.at[i] != y.at[i]; break;
            default: __builtin_trap();
        }
        mask |= uint32_t{holds} << i;
    }
    return static_cast<__mmask16>(mask);
}
static inline __m512 mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    return each([&](int i) { return chosen(mask, i) ? y.at[i] : x.at[i]; });
}
static inline __m512i mask_mov_epi32(__m512i kept, __mmask16 mask, __m512i x) {
    const auto a = lanes<int32_t>(kept), b = lanes<int32_t>(x);
    return each_integer([&](int i) { return chosen(mask, i) ? b.at[i] : a.at[i]; });
}
static inline float reduce_add_ps(__m512 a) {
    auto x = lanes<float>(a);
    for (int half = 8; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) x.at[i] += x.at[i + half];
    return x.at[0];
}
static inline float reduce_max_ps(__m512 a) {
    auto x = lanes<float>(a);
    for (int i = 1; i < 16; ++i) x.at[0] = x.at[i] > x.at[0] ? x.at[i] : x.at[0];
    return x.at[0];
}
// Only to the nearest integer, ties to even.
static inline __m512 roundscale_ps(__m512 a, int) {
    const auto x = lanes<float>(a);
    return each([&](int i) { return __builtin_rintf(x.at[i]); });
}
static inline __m512 scalef_ps(__m512 a, __m512 b) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    return each([&](int i) {
        if (x.at[i] != x.at[i] || y.at[i] != y.at[i]) return __builtin_nanf("");
        return __builtin_ldexpf(x.at[i], static_cast<int>(__builtin_floorf(y.at[i])));
    });
}

static inline __m512i slli_epi32(__m512i a, int count) {
    const auto x = lanes<uint32_t>(a);
    return each_integer([&](int i) { return static_cast<int32_t>(x.at[i] << count); });
}
static inline __m512i srli_epi32(__m512i a, int count) {
    const auto x = lanes<uint32_t>(a);
    return each_integer([&](int i) { return static_cast<int32_t>(x.at[i] >> count); });
}
static inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
static inline __m512i or_si512(__m512i a, __m512i b) { return a | b; }
static inline void store_register(void* target, __m512i x) { std::memcpy(target, &x, sizeof x); }
static inline __m512i add_epi32(__m512i a, __m512i b) {
    const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
    return each_integer([&](int i) { return static_cast<int32_t>(x.at[i] + y.at[i]); });
}
static inline __m512i cvtepu16_epi32(__m256i a) {
    const auto x = lanes<uint16_t>(a);
    return each_integer([&](int i) { return static_cast<int32_t>(x.at[i]); });
}
static inline __m512i cvtepi8_epi16(__m256i a) {
    const auto x = lanes<int8_t>(a);
    Lanes<int16_t, 32> out;
    for (int i = 0; i < 32; ++i) out.at[i] = x.at[i];
    return join<__m512i>(out);
}
static inline __m512i madd_epi16(__m512i a, __m512i b) {
    const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
    return each_integer([&](int i) { return x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1]; });
}
static inline __m512i dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
    const auto c = lanes<int32_t>(sums), products = lanes<int32_t>(madd_epi16(a, b));
    return each_integer([&](int i) { return c.at[i] + products.at[i]; });
}
static inline __m512i srai_epi32(__m512i a, int count) {
    const auto x = lanes<int32_t>(a);
    return each_integer([&](int i) { return x.at[i] >> count; });
}
static inline __m256i cvtepi32_epi16(__m512i a) {
    const auto x = lanes<uint32_t>(a);
    Lanes<uint16_t, 16> out;
    for (int i = 0; i < 16; ++i) out.at[i] = static_cast<uint16_t>(x.at[i]);
    return join<__m256i>(out);
}
static inline __m512 cvtepi32_ps(__m512i a) {
    const auto x = lanes<int32_t>(a);
    return each([&](int i) { return static_cast<float>(x.at[i]); });
}

// To bfloat16, to nearest, ties to even; denormal values become zero.
static inline __m256i cvtneps_pbh(__m512 a) {
    const auto x = lanes<float>(a);
    Lanes<uint16_t, 16> out;
    for (int i = 0; i < 16; ++i) {
        const bool denormal = x.at[i] == x.at[i] && __builtin_fabsf(x.at[i]) < 0x1p-126f;
        out.at[i] = to_bfloat16(denormal ? __builtin_copysignf(0.0f, x.at[i]) : x.at[i]).bits;
    }
    return join<__m256i>(out);
}
// Those of `low`, then those of `high`.
static inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
    const auto first = lanes<uint16_t>(cvtneps_pbh(low)), second = lanes<uint16_t>(cvtneps_pbh(high));
    Lanes<uint16_t, 32> out;
    for (int i = 0; i < 16; ++i) {
        out.at[i] = first.at[i];
        out.at[16 + i] = second.at[i];
    }
    return join<__m512i>(out);
}
// c + a.even * b.even + a.odd * b.odd; the odd product first, as the instruction adds them.
template <class Pairs>
static inline __m512 dpbf16_ps(__m512 c, Pairs a, Pairs b) {
    const auto sum = lanes<float>(c);
    const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
    return each([&](int i) {
        const float odd = to_float(BFloat16{x.at[2 * i + 1]}) * to_float(BFloat16{y.at[2 * i + 1]});
        return sum.at[i] + (odd + to_float(BFloat16{x.at[2 * i]}) * to_float(BFloat16{y.at[2 * i]}));
    });
}

}  // namespace rxt::emulated

#define _mm512_set1_ps(x) ::rxt::emulated::set1_ps(x)
#define _mm512_setzero_ps() ::rxt::emulated::setzero_ps()
#define _mm512_set1_epi32(x) ::rxt::emulated::set1_epi32(x)
#define _mm512_loadu_ps(source) ::rxt::emulated::load_register<__m512>(source)
#define _mm512_loadu_si512(source) ::rxt::emulated::load_register<__m512i>(source)
#define _mm512_storeu_si512(target, x) ::rxt::emulated::store_register(target, x)
#define _mm512_maskz_loadu_ps(mask, source) ::rxt::emulated::maskz_loadu_ps(mask, source)
#define _mm512_storeu_ps(target, x) ::rxt::emulated::storeu_ps(target, x)
#define _mm512_mask_storeu_ps(target, mask, x) ::rxt::emulated::mask_storeu_ps(target, mask, x)
#define _mm256_maskz_loadu_epi16(mask, source) ::rxt::emulated::maskz_loadu_epi16_256(mask, source)
#define _mm256_mask_storeu_epi16(target, mask, x) ::rxt::emulated::mask_storeu_epi16_256(target, mask, x)
#define _mm512_add_ps(a, b) ::rxt::emulated::add_ps(a, b)
#define _mm512_sub_ps(a, b) ::rxt::emulated::sub_ps(a, b)
#define _mm512_mul_ps(a, b) ::rxt::emulated::mul_ps(a, b)
#define _mm512_div_ps(a, b) ::rxt::emulated::div_ps(a, b)
#define _mm512_fmadd_ps(a, b, c) ::rxt::emulated::fmadd_ps(a, b, c)
#define _mm512_max_ps(a, b) ::rxt::emulated::max_ps(a, b)
#define _mm512_min_ps(a, b) ::rxt::emulated::min_ps(a, b)
#define _mm512_cmp_ps_mask(a, b, predicate) ::rxt::emulated::cmp_ps_mask(a, b, predicate)
#define _mm512_mask_blend_ps(mask, a, b) ::rxt::emulated::mask_blend_ps(mask, a, b)
#define _mm512_mask_mov_epi32(kept, mask, x) ::rxt::emulated::mask_mov_epi32(kept, mask, x)
#define _mm512_reduce_add_ps(a) ::rxt::emulated::reduce_add_ps(a)
#define _mm512_reduce_max_ps(a) ::rxt::emulated::reduce_max_ps(a)
#define _mm512_roundscale_ps(a, mode) ::rxt::emulated::roundscale_ps(a, mode)
#define _mm512_scalef_ps(a, b) ::rxt::emulated::scalef_ps(a, b)
#define _mm512_slli_epi32(a, count) ::rxt::emulated::slli_epi32(a, count)
#define _mm512_srli_epi32(a, count) ::rxt::emulated::srli_epi32(a, count)
#define _mm512_and_si512(a, b) ::rxt::emulated::and_si512(a, b)
#define _mm512_or_si512(a, b) ::rxt::emulated::or_si512(a, b)
#define _mm512_add_epi32(a, b) ::rxt::emulated::add_epi32(a, b)
#define _mm512_cvtepu16_epi32(a) ::rxt::emulated::cvtepu16_epi32(a)
#define _mm512_cvtepi8_epi16(a) ::rxt::emulated::cvtepi8_epi16(a)
#define _mm512_madd_epi16(a, b) ::rxt::emulated::madd_epi16(a, b)
#define _mm512_dpwssd_epi32(c, a, b) ::rxt::emulated::dpwssd_epi32(c, a, b)
#define _mm512_srai_epi32(a, count) ::rxt::emulated::srai_epi32(a, count)
#define _mm512_cvtepi32_epi16(a) ::rxt::emulated::cvtepi32_epi16(a)
#define _mm512_cvtepi32_ps(a) ::rxt::emulated::cvtepi32_ps(a)
#define _mm512_castps_si512(a) reinterpret_cast<__m512i>(a)
#define _mm512_castsi512_ps(a) reinterpret_cast<__m512>(a)
#define _mm512_cvtneps_pbh(a) ::rxt::emulated::cvtneps_pbh(a)
#define _mm512_cvtne2ps_pbh(high, low) ::rxt::emulated::cvtne2ps_pbh(high, low)
#define _mm512_dpbf16_ps(c, a, b) ::rxt::emulated::dpbf16_ps(c, a, b)
