// Packed weights as vectors of fp32: what differs between the types of weights and the instruction sets.
#pragma once

#include "matmul/panels.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

constexpr int vectors_per_panel = static_cast<int>(panel_width) / Float::lanes;

// Inputs that are unpacked at once: two where a pair shares its memory.
template <class Weight>
constexpr int inputs_per_step = sizeof(Weight) == 4 ? 1 : 2;

// The weights of one input and all outputs of a panel: `at` points to the step, panel_width * inputs_per_step elements, and `input`
// is its number in it.
inline void load_input(const float* at, int, Float* w) {
    RXT_UNROLL
    for (int v = 0; v < vectors_per_panel; ++v) w[v] = load(at + v * Float::lanes);
}

#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable

template <class Weight>
inline void load_input(const Weight* at, int input, Float* w) {
    for (int v = 0; v < vectors_per_panel; ++v)
        for (int lane = 0; lane < Float::lanes; ++lane)
            w[v].value[lane] = to_float(at[2 * (v * Float::lanes + lane) + input]);
}

// A pair is one 32-bit word. The even input is in its lower half and the odd one in its upper half, where a float32 has its own.
#elif RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2

inline void load_input(const int8_t* at, int input, Float* w) {
    RXT_UNROLL
    for (int v = 0; v < vectors_per_panel; ++v) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 2 * v * Float::lanes));
        const __m256i pairs = _mm256_cvtepi8_epi16(bytes);
        w[v] = {_mm256_cvtepi32_ps(_mm256_srai_epi32(input == 0 ? _mm256_slli_epi32(pairs, 16) : pairs, 16))};
    }
}

inline void load_input(const BFloat16* at, int input, Float* w) {
    RXT_UNROLL
    for (int v = 0; v < vectors_per_panel; ++v) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 2 * v * Float::lanes));
        w[v] = {_mm256_castsi256_ps(input == 0 ? _mm256_slli_epi32(pairs, 16)
                                               : _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
}

#else

inline void load_input(const int8_t* at, int input, Float* w) {
    const __m512i pairs = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    w[0] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(input == 0 ? _mm512_slli_epi32(pairs, 16) : pairs, 16))};
}

inline void load_input(const BFloat16* at, int input, Float* w) {
    const __m512i pairs = _mm512_loadu_si512(at);
    w[0] = {_mm512_castsi512_ps(input == 0 ? _mm512_slli_epi32(pairs, 16)
                                           : _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

#endif

// The weights of all inputs of a step.
template <class Weight>
inline void load_step(const Weight* at, Float (*w)[vectors_per_panel]) {
    RXT_UNROLL
    for (int i = 0; i < inputs_per_step<Weight>; ++i) load_input(at, i, w[i]);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
