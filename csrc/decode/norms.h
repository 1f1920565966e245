// Norms of rows, and activations.
#pragma once

#include <math.h>

#include "decode/kernels.h"
#include "core/team.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

constexpr float rms_epsilon = 1.1920929e-7f, layer_norm_epsilon = 1e-5f;

template <class Element>
inline void norm_row(const Norm& norm, const Element* x, int64_t width, float* out) {
    Float mean = zero();
    if (norm.bias != nullptr) {
        Float total = zero();
        for (int64_t i = 0; i < width; i += Float::lanes) total = total + load_up_to(x + i, width - i);
        mean = broadcast(sum(total) / static_cast<float>(width));
    }
    Float squares = zero();
    for (int64_t i = 0; i < width; i += Float::lanes) {
        const int64_t left = width - i;
        store_up_to(out + i, load_up_to(x + i, left) - mean, left);  // reads zeros behind the end again below
        const Float centred = load_up_to(out + i, left);
        squares = multiply_add(centred, centred, squares);
    }
    const float epsilon = norm.bias != nullptr ? layer_norm_epsilon : rms_epsilon;
    const Float scale = broadcast(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + epsilon));
    for (int64_t i = 0; i < width; i += Float::lanes) {
        const int64_t left = width - i;
        Float normed = load_up_to(out + i, left) * scale * load_up_to(norm.weight + i, left);
        if (norm.bias != nullptr) normed = normed + load_up_to(norm.bias + i, left);
        store_up_to(out + i, normed, left);
    }
}

// The norms of all rows of the residual stream: of few, every thread makes its own; of many, each thread makes some and waits.
inline const float* normed_rows(const Step& step, const Team& team, const Norm& norm) {
    const int64_t width = step.model->width;
    const bool own = step.count <= few_tokens;
    float* normed = own ? step.work.thread + team.thread * step.work.thread_size : step.work.normed;
    const Range rows = own ? Range{0, step.count} : team.share(step.count);
    for (int64_t row = rows.first; row < rows.last; ++row)
        norm_row(norm, step.work.x + row * width, width, normed + row * width);
    if (!own) team.wait();
    return normed;
}

template <class Function>
inline Float lane_by_lane(Float x, Function function) {
    alignas(64) float values[Float::lanes];
    store(values, x);
    for (float& value : values) value = function(value);
    return load(values);
}

inline Float activated(ActivationKind kind, Float x) {
    switch (kind) {
        case ActivationKind::silu: return x * sigmoid(x);
        case ActivationKind::relu: return lane_by_lane(x, [](float v) { return v < 0.0f ? 0.0f : v; });
        case ActivationKind::gelu: return lane_by_lane(x, [](float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); });
        case ActivationKind::sigmoid: return sigmoid(x);
        case ActivationKind::tanh: return lane_by_lane(x, [](float v) { return tanhf(v); });
        default: return x;
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
