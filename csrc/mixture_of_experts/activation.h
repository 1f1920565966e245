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

inline ValueAndSlope activate_with_slope(Activation activation, Float x) {
    const Float one = broadcast(1.0f);
    switch (activation) {
        case Activation::silu: {
            const Float s = sigmoid(x);
            return {x * s, s * multiply_add(x, one - s, one)};
        }
        case Activation::relu: return {maximum(x, zero()), where_less(zero(), x, one, zero())};
        case Activation::gelu: {
            const Normal n = normal(x);
            return {x * n.cumulative, multiply_add(x * n.bell, broadcast(0.39894228f), n.cumulative)};
        }
        case Activation::sigmoid: {
            const Float s = sigmoid(x);
            return {s, s * (one - s)};
        }
        default: return {x, one};
    }
}

inline Float activate(Activation activation, Float x) {
    switch (activation) {
        case Activation::silu: return x * sigmoid(x);
        case Activation::relu: return maximum(x, zero());
        case Activation::gelu: return x * normal(x).cumulative;
        case Activation::sigmoid: return sigmoid(x);
        default: return x;
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
