#include "core/parallel.h"
#include "memory_update/kernels.h"
#include "memory_update/sums.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

constexpr float norm_epsilon = 1e-6f, layer_norm_epsilon = 1e-5f;

template <class Element>
const Element* row_of(const void* base, const MemoryNorm& a, int64_t row) {
    return static_cast<const Element*>(base) + row * a.width;
}

// What a row is normalised with: (x - mean) * inverse. `pull` is 1 where the inverse is that of a standard deviation, 1 / (2 r)
// where it is that of the root of r, and 0 where it does not depend on the row: then x has no part in its own gradient.
struct RowStatistics {
    float mean, inverse, pull;
};

template <class Element>
RowStatistics statistics_of(const MemoryNorm& a, int64_t row) {
    const Element* x = row_of<Element>(a.x, a, row);
    const auto width = static_cast<float>(a.width);
    if (a.kind == MemoryNormKind::layer) {
        Float total = zero();
        for (int64_t i = 0; i < a.width; i += Float::lanes) total = total + load_up_to(x + i, a.width - i);
        const float mean = sum(total) / width;
        Float deviations = zero();
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            Float deviation = load_up_to(x + i, left) - broadcast(mean);
            if (left < Float::lanes) {  // lanes behind the end hold -mean
                float lanes[Float::lanes];
                store(lanes, deviation);
                deviation = load_part(lanes, static_cast<int>(left));
            }
            deviations = multiply_add(deviation, deviation, deviations);
        }
        return {mean, 1.0f / __builtin_sqrtf(sum(deviations) / width + layer_norm_epsilon), 1.0f};
    }
    if (a.given_rms != nullptr) return {0.0f, 1.0f / __builtin_sqrtf(a.given_rms[row % a.slots] + norm_epsilon), 0.0f};
    Float squares = zero();
    for (int64_t i = 0; i < a.width; i += Float::lanes) {
        const Float values = load_up_to(x + i, a.width - i);
        squares = multiply_add(values, values, squares);
    }
    const float rms = __builtin_sqrtf(sum(squares) / width);
    // The root of the root of zero has no slope; a row of zeros is given none.
    return {0.0f, 1.0f / __builtin_sqrtf(rms + norm_epsilon), rms > 0.0f ? 0.5f / rms : 0.0f};
}

float mix_of(const MemoryNorm& a, int64_t slot) {
    return 1.0f / (1.0f + __builtin_expf(-a.gate[a.gate_per_slot ? slot : 0]));
}

Float scale_at(const MemoryNorm& a, int64_t slot, int64_t i, int64_t left) {
    return a.scale_per_slot ? broadcast(a.scale[slot]) : load_up_to(a.scale + i, left);
}

// weight * standardised + bias, for a layer norm.
Float weighed(const MemoryNorm& a, Float standardised, int64_t i, int64_t left) {
    if (a.weight == nullptr) return standardised;
    return multiply_add(standardised, load_up_to(a.weight + i, left), load_up_to(a.bias + i, left));
}

template <class Element>
void norm(const MemoryNorm& a) {
    parallel_for(a.rows, 8.0 * a.rows * a.width, [&](int64_t row) {
        const Element* x = row_of<Element>(a.x, a, row);
        Element* out = static_cast<Element*>(a.out) + row * a.width;
        const int64_t slot = row % a.slots;
        const RowStatistics statistics = statistics_of<Element>(a, row);
        const float mix = mix_of(a, slot);
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float values = load_up_to(x + i, left);
            const Float standardised = (values - broadcast(statistics.mean)) * broadcast(statistics.inverse);
            const Float normed = weighed(a, standardised, i, left) * scale_at(a, slot, i, left);
            store_up_to(out + i, multiply_add(broadcast(mix), normed, broadcast(1.0f - mix) * values), left);
        }
    });
}

// With z the standardised row, y = weight z + bias, g the gradient of the output and h = mix g:
//
//     dx = inverse (e - pull z mean(e z) - [layer] mean(e)) + (1 - mix) g,    e = h scale weight
//     dscale = sum of h y,    dweight = sum of h scale z,    dbias = sum of h scale
//     dgate = mix (1 - mix) sum of g (scale y - x)
template <class Element>
void norm_backward(const MemoryNormBackward& b) {
    const MemoryNorm& a = b.forward;
    const bool layer = a.kind == MemoryNormKind::layer;
    const double work = 14.0 * a.rows * a.width;
    // Of every row: mean, inverse and mix, and the sums over its width for the gradients of gate and scale.
    const auto values_of = [&](int64_t row) { return b.row_values + row * memory_norm_row_values; };
    const auto standardised_at = [&](int64_t row, int64_t i, int64_t left) {
        const double* kept = values_of(row);
        const auto mean = static_cast<float>(kept[0]), inverse = static_cast<float>(kept[1]);
        return (load_up_to(row_of<Element>(a.x, a, row) + i, left) - broadcast(mean)) * broadcast(inverse);
    };
    const auto mixed_at = [&](int64_t row, int64_t i, int64_t left) {
        return load_up_to(row_of<Element>(b.out_gradient, a, row) + i, left) * broadcast(static_cast<float>(values_of(row)[2]));
    };
    parallel_for(a.rows, work, [&](int64_t row) {
        const Element* x = row_of<Element>(a.x, a, row);
        const Element* gradient = row_of<Element>(b.out_gradient, a, row);
        Element* target = static_cast<Element*>(b.x_gradient) + row * a.width;
        const int64_t slot = row % a.slots;
        const RowStatistics statistics = statistics_of<Element>(a, row);
        const float mix = mix_of(a, slot);
        double* kept = values_of(row);
        kept[0] = statistics.mean;
        kept[1] = statistics.inverse;
        kept[2] = mix;
        WideSum of_gate, of_scale;
        Float pulls = zero(), total = zero();
        const auto enters = [&](int64_t i, int64_t left) {  // e of the formulas
            const Float through = load_up_to(gradient + i, left) * broadcast(mix) * scale_at(a, slot, i, left);
            return layer ? through * load_up_to(a.weight + i, left) : through;
        };
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float incoming = load_up_to(gradient + i, left), standardised = standardised_at(row, i, left);
            const Float normed = weighed(a, standardised, i, left);
            of_scale.add(incoming, normed);
            of_gate.add(incoming, normed * scale_at(a, slot, i, left));
            of_gate.add(incoming, zero() - load_up_to(x + i, left));
            const Float entering = enters(i, left);
            pulls = multiply_add(entering, standardised, pulls);
            total = total + entering;
        }
        kept[3] = mix * (1.0f - mix) * of_gate.total();
        kept[4] = mix * of_scale.total();
        const auto width = static_cast<float>(a.width);
        const Float pull = broadcast(-statistics.pull * sum(pulls) / width), shift = broadcast(layer ? sum(total) / width : 0.0f);
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float own = multiply_add(standardised_at(row, i, left), pull, enters(i, left) - shift);
            const Float passed = load_up_to(gradient + i, left) * broadcast(1.0f - mix);
            store_up_to(target + i, multiply_add(own, broadcast(statistics.inverse), passed), left);
        }
    });
    // A parameter has one value, or one per slot: the sum of its rows.
    const auto sum_of_slots = [&](bool per_slot, int which, float* target) {
        const int64_t outputs = per_slot ? a.slots : 1;
        for (int64_t output = 0; output < outputs; ++output) {
            target[output] = sum_of_values(a.rows / outputs, [&](int64_t i) { return values_of(output + i * outputs)[which]; });
        }
    };
    sum_of_slots(a.gate_per_slot, 3, b.gate_gradient);
    if (a.scale_per_slot) {
        sum_of_slots(true, 4, b.scale_gradient);
    } else {
        sum_of_rows(a.rows, a.width, work, b.scale_gradient, [&](int64_t row, int64_t i, int64_t left) {
            return mixed_at(row, i, left) * weighed(a, standardised_at(row, i, left), i, left);
        });
    }
    if (!layer) return;
    const auto through_scale = [&](int64_t row, int64_t i, int64_t left) {
        return mixed_at(row, i, left) * scale_at(a, row % a.slots, i, left);
    };
    sum_of_rows(a.rows, a.width, work, b.bias_gradient, through_scale);
    sum_of_rows(a.rows, a.width, work, b.weight_gradient, [&](int64_t row, int64_t i, int64_t left) {
        return through_scale(row, i, left) * standardised_at(row, i, left);
    });
}

}  // namespace

void memory_norm(const MemoryNorm& a) { a.dtype == DType::float32 ? norm<float>(a) : norm<BFloat16>(a); }

void memory_norm_backward(const MemoryNormBackward& a) {
    a.forward.dtype == DType::float32 ? norm_backward<float>(a) : norm_backward<BFloat16>(a);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
