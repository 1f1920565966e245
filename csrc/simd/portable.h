// Vectors of fp32 in plain C++: the compiler's own vector types, which it maps to SSE2, NEON or whatever there is.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace rxt::portable {

struct Float {
    using Register = float __attribute__((vector_size(32)));
    static constexpr int lanes = 8;
    Register value;
};

using Integer = int32_t __attribute__((vector_size(32)));

inline Float broadcast(float x) { return {Float::Register{} + x}; }
inline Float zero() { return {Float::Register{}}; }

inline Float load(const float* source) {
    Float x;
    std::memcpy(&x.value, source, sizeof x.value);
    return x;
}

inline Float load(const BFloat16* source) {
    Integer bits;
    for (int lane = 0; lane < Float::lanes; ++lane) bits[lane] = static_cast<int32_t>(uint32_t{source[lane].bits} << 16);
    Float x;
    std::memcpy(&x.value, &bits, sizeof bits);
    return x;
}

// The first `count` values; zeros after them, and nothing is read there.
template <class Element>
inline Float load_part(const Element* source, int count) {
    float values[Float::lanes] = {};
    for (int lane = 0; lane < count; ++lane) values[lane] = to_float(source[lane]);
    return load(values);
}

inline void store(float* target, Float x) { std::memcpy(target, &x.value, sizeof x.value); }

inline void store(BFloat16* target, Float x) {
    for (int lane = 0; lane < Float::lanes; ++lane) target[lane] = to_bfloat16(x.value[lane]);
}

inline void store_part(float* target, Float x, int count) {
    for (int lane = 0; lane < count; ++lane) target[lane] = x.value[lane];
}

inline void store_part(BFloat16* target, Float x, int count) {
    for (int lane = 0; lane < count; ++lane) target[lane] = to_bfloat16(x.value[lane]);
}

inline Float operator+(Float a, Float b) { return {a.value + b.value}; }
inline Float operator-(Float a, Float b) { return {a.value - b.value}; }
inline Float operator*(Float a, Float b) { return {a.value * b.value}; }
inline Float operator/(Float a, Float b) { return {a.value / b.value}; }

inline Float multiply_add(Float a, Float b, Float c) { return {a.value * b.value + c.value}; }

// NaN in `a` survives.
inline Float maximum(Float a, Float b) { return {b.value > a.value ? b.value : a.value}; }
inline Float minimum(Float a, Float b) { return {b.value < a.value ? b.value : a.value}; }

// Lanes of `x` where `a < b`, of `y` elsewhere.
inline Float where_less(Float a, Float b, Float x, Float y) { return {a.value < b.value ? x.value : y.value}; }

inline float sum(Float x) {
    return ((x.value[0] + x.value[4]) + (x.value[2] + x.value[6])) + ((x.value[1] + x.value[5]) + (x.value[3] + x.value[7]));
}

inline float largest(Float x) {
    float found = x.value[0];
    for (int lane = 1; lane < Float::lanes; ++lane) found = x.value[lane] > found ? x.value[lane] : found;
    return found;
}

// x rounded to the nearest integer, for |x| < 2^22.
inline Float round_nearest(Float x) {
    const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it pushes the fraction out of the significand
    return x + magic - magic;
}

// x * 2^n, for an integral n from -126 to 127.
inline Float scale_by_power(Float x, Float n) {
    Integer exponent = (__builtin_convertvector(n.value, Integer) + 127) << 23;
    Float power;
    std::memcpy(&power.value, &exponent, sizeof exponent);
    return x * power;
}

}  // namespace rxt::portable
