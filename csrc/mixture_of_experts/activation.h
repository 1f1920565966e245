// The activations of experts, and their slopes.
#pragma once

#include "mixture_of_experts/kernels.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

struct ValueAndSlope {
    Float value, slope;
};

// The normal distribution: its cumulative function, and its density times sqrt(2 pi).
struct Normal {
    Float cumulative, bell;
};

// With t = 1 / (1 + 0.3 |x| / sqrt(2)), erfc(|x| / sqrt(2)) * exp(x^2 / 2) is a polynomial in t: fitted to a relative error of 2e-8.
inline Normal normal(Float x) {
    const Float size = maximum(x, zero() - x);
    const Float bell = exp(x * x * broadcast(-0.5f));
    const Float t = broadcast(1.0f) / multiply_add(size, broadcast(0.21213203f), broadcast(1.0f));
    Float p = broadcast(-0.129434433f);
    p = multiply_add(p, t, broadcast(0.485098325f));
    p = multiply_add(p, t, broadcast(-0.511230708f));
    p = multiply_add(p, t, broadcast(0.546400469f));
    p = multiply_add(p, t, broadcast(-0.0936354627f));
    p = multiply_add(p, t, broadcast(0.214438322f));
    p = multiply_add(p, t, broadcast(0.148481827f));
    p = multiply_add(p, t, broadcast(0.170692034f));
    p = multiply_add(p, t, broadcast(0.169189608f));
    const Float tail = broadcast(0.5f) * bell * p * t;
    return {where_less(x, zero(), tail, broadcast(1.0f) - tail), bell};
}

template <Activation activation>
[[gnu::always_inline]] inline Float activate(Float x) {
    if constexpr (activation == Activation::silu) return x * sigmoid(x);
    if constexpr (activation == Activation::relu) return maximum(x, zero());
    if constexpr (activation == Activation::gelu) return x * normal(x).cumulative;
    if constexpr (activation == Activation::sigmoid) return sigmoid(x);
    return x;
}

template <Activation activation>
[[gnu::always_inline]] inline ValueAndSlope activate_with_slope(Float x) {
    const Float one = broadcast(1.0f);
    if constexpr (activation == Activation::silu) {
        const Float s = sigmoid(x);
        return {x * s, s * multiply_add(x, one - s, one)};
    }
    if constexpr (activation == Activation::relu) return {maximum(x, zero()), where_less(zero(), x, one, zero())};
    if constexpr (activation == Activation::gelu) {
        const Normal n = normal(x);
        return {x * n.cumulative, multiply_add(x * n.bell, broadcast(0.39894228f), n.cumulative)};
    }
    if constexpr (activation == Activation::sigmoid) {
        const Float s = sigmoid(x);
        return {s, s * (one - s)};
    }
    return {x, one};
}

template <Activation activation>
struct Kind {
    static constexpr Activation value = activation;
};

// task(Kind<...>()) of an activation that is known at run time: once for many values.
template <class Task>
inline void with_kind(Activation activation, Task&& task) {
    switch (activation) {
        case Activation::silu: return task(Kind<Activation::silu>());
        case Activation::relu: return task(Kind<Activation::relu>());
        case Activation::gelu: return task(Kind<Activation::gelu>());
        case Activation::sigmoid: return task(Kind<Activation::sigmoid>());
        default: return task(Kind<Activation::linear>());
    }
}

// x[i] becomes its activation; up to `count`, rounded up to whole vectors.
inline void activate_row(Activation activation, float* x, int64_t count) {
    with_kind(activation, [&](auto kind) {
        for (int64_t i = 0; i < count; i += Float::lanes) store(x + i, activate<decltype(kind)::value>(load(x + i)));
    });
}

// x[i] becomes its activation, and slope[i] the slope there.
inline void activate_row_with_slope(Activation activation, float* x, float* slope, int64_t count) {
    with_kind(activation, [&](auto kind) {
        for (int64_t i = 0; i < count; i += Float::lanes) {
            const ValueAndSlope found = activate_with_slope<decltype(kind)::value>(load(x + i));
            store(x + i, found.value);
            store(slope + i, found.slope);
        }
    });
}

}  // namespace rxt::RXT_INSTRUCTION_SET
