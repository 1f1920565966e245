// Element types of tensors.
#pragma once

#include <cstdint>
#include <cstring>

namespace rxt {

enum class DType { float32, bfloat16, int8, int64, boolean };

// The upper half of a float32.
struct BFloat16 {
    uint16_t bits;
};

// `static`, not `inline`: these are compiled for every instruction set, and each must keep its own copy.
static inline float to_float(float x) { return x; }

static inline float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounded to nearest, ties to even; a NaN stays one.
static inline BFloat16 to_bfloat16(float x) {
    if (x != x) return {0x7fc0};
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

static inline void assign(float& target, float x) { target = x; }
static inline void assign(BFloat16& target, float x) { target = to_bfloat16(x); }

}  // namespace rxt
