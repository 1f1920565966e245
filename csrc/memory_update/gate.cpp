#include "core/parallel.h"
#include "memory_update/kernels.h"
#include "memory_update/sums.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

float sigmoid_of(float x) { return 1.0f / (1.0f + __builtin_expf(-x)); }

template <class Element>
float status_of(const ResidualGate& a, const Element* old, const Element* added) {
    Float total = zero();
    for (int64_t i = 0; i < a.width; i += Float::lanes) {
        const int64_t left = a.width - i;
        Float both = load_up_to(old + i, left) + load_up_to(added + i, left);
        if (a.status_weight != nullptr) both = both * load_up_to(a.status_weight + i, left);
        total = total + both;
    }
    return a.status_weight != nullptr ? sum(total) + a.status_bias : sum(total) / static_cast<float>(a.width);
}

// What the activation is applied to.
float before_activation(const ResidualGate& a, int64_t row, int64_t slot) {
    if (a.kind == GateKind::constant) return a.weight[a.per_slot ? slot : 0];
    const float* status = a.status + row * a.slots;
    if (a.kind == GateKind::elementwise) {
        if (a.per_slot) return a.weight[slot] * status[slot];
        float total = 0.0f;  // of all slots: the mean over slots and width
        for (int64_t s = 0; s < a.slots; ++s) total += status[s];
        return a.weight[0] * (total / static_cast<float>(a.slots));
    }
    const float* weight = a.weight + (a.per_slot ? slot * a.slots : 0);
    Float total = zero();
    for (int64_t s = 0; s < a.slots; s += Float::lanes) {
        total = multiply_add(load_up_to(weight + s, a.slots - s), load_up_to(status + s, a.slots - s), total);
    }
    return sum(total) + a.bias[a.per_slot ? slot : 0];
}

// What a gate does with one slot: out = of_new * new + of_old * old.
struct Opening {
    float of_new, of_old;
};

Opening opening_at(const ResidualGate& a, float before) {
    const float opening = a.tanh ? __builtin_tanhf(before) : sigmoid_of(before);
    return {a.tanh ? 1.0f + opening : opening, 1.0f - opening};
}

// The slope of the activation; in double, since little is left of 1 where a gate is nearly open or closed.
double slope_at(const ResidualGate& a, double before) {
    const double opening = a.tanh ? __builtin_tanh(before) : 1.0 / (1.0 + __builtin_exp(-before));
    return a.tanh ? (1.0 - opening) * (1.0 + opening) : opening * (1.0 - opening);
}

bool has_status(const ResidualGate& a) { return a.kind == GateKind::elementwise || a.kind == GateKind::linear; }

// A gate that looks at one slot only has its status while the slot is in the cache; others need those of all slots first.
bool looks_around(const ResidualGate& a) {
    return a.kind == GateKind::linear || (a.kind == GateKind::elementwise && !a.per_slot);
}

template <class Element>
void gate(const ResidualGate& a) {
    const auto row_of = [&](const void* base, int64_t row) { return static_cast<const Element*>(base) + row * a.width; };
    const int64_t rows = a.batch * a.slots;
    const double work = 6.0 * rows * a.width;
    if (looks_around(a)) {
        parallel_for(rows, work, [&](int64_t row) { a.status[row] = status_of(a, row_of(a.old, row), row_of(a.new_values, row)); });
    }
    parallel_for(rows, work + (a.kind == GateKind::linear ? 2.0 * rows * a.slots : 0.0), [&](int64_t row) {
        const Element* old = row_of(a.old, row);
        const Element* added = row_of(a.new_values, row);
        Element* out = static_cast<Element*>(a.out) + row * a.width;
        Opening opening{1.0f, 1.0f};
        if (a.kind != GateKind::add) {
            if (has_status(a) && !looks_around(a)) a.status[row] = status_of(a, old, added);
            const float before = before_activation(a, row / a.slots, row % a.slots);
            if (a.before != nullptr) a.before[row] = before;
            opening = opening_at(a, before);
        }
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float kept = load_up_to(old + i, left) * broadcast(opening.of_old);
            store_up_to(out + i, multiply_add(load_up_to(added + i, left), broadcast(opening.of_new), kept), left);
        }
    });
}

// The gradient of every status, for gates that look at all slots. A gate with one opening per batch row has one gradient for it,
// which is left in the first slot of before_gradient.
void status_gradients(const ResidualGateBackward& b) {
    const ResidualGate& a = b.forward;
    if (!a.per_slot) {
        for (int64_t row = 0; row < a.batch; ++row) {
            double* before = b.before_gradient + row * a.slots;
            before[0] = sum_of_values(a.slots, [&](int64_t slot) { return before[slot]; });
            for (int64_t slot = 0; slot < a.slots; ++slot) {
                const float weight = a.kind == GateKind::linear ? a.weight[slot] : a.weight[0] / static_cast<float>(a.slots);
                b.status_gradient[row * a.slots + slot] = static_cast<float>(before[0]) * weight;
            }
        }
        return;
    }
    for (int64_t row = 0; row < a.batch; ++row) {
        const double* before = b.before_gradient + row * a.slots;
        const auto term = [&](int64_t output, int64_t slot, int64_t left) {
            return broadcast(static_cast<float>(before[output])) * load_up_to(a.weight + output * a.slots + slot, left);
        };
        sum_of_rows(a.slots, a.slots, 2.0 * a.slots * a.slots, b.status_gradient + row * a.slots, term);
    }
}

// Gradients of weight and bias, summed over the batch and, where there is one opening, over the slots.
void parameter_gradients(const ResidualGateBackward& b) {
    const ResidualGate& a = b.forward;
    const auto before = [&](int64_t row, int64_t slot) { return b.before_gradient[row * a.slots + slot]; };
    const int64_t outputs = a.per_slot ? a.slots : 1;
    if (a.kind == GateKind::linear) {
        parallel_for(outputs, 2.0 * outputs * a.batch * a.slots, [&](int64_t output) {
            float* target = b.weight_gradient + output * a.slots;
            for (int64_t slot = 0; slot < a.slots; slot += Float::lanes) {
                const int64_t left = a.slots - slot;
                Float total = zero();
                for (int64_t row = 0; row < a.batch; ++row) {
                    const Float status = load_up_to(a.status + row * a.slots + slot, left);
                    total = multiply_add(broadcast(static_cast<float>(before(row, output))), status, total);
                }
                store_up_to(target + slot, total, left);
            }
            b.bias_gradient[output] = sum_of_values(a.batch, [&](int64_t row) { return before(row, output); });
        });
    } else if (a.per_slot) {
        for (int64_t slot = 0; slot < a.slots; ++slot) {
            b.weight_gradient[slot] = sum_of_values(a.batch, [&](int64_t row) {
                return before(row, slot) * (has_status(a) ? a.status[row * a.slots + slot] : 1.0f);
            });
        }
    } else if (has_status(a)) {
        b.weight_gradient[0] = sum_of_values(a.batch, [&](int64_t row) {
            const float* status = a.status + row * a.slots;
            return before(row, 0) * sum_of_values(a.slots, [&](int64_t slot) { return status[slot]; }) / static_cast<float>(a.slots);
        });
    } else {
        b.weight_gradient[0] = sum_of_values(a.batch * a.slots, [&](int64_t row) { return b.before_gradient[row]; });
    }
}

// With b what the activation is applied to, s the status and dG the gradient of the opening:
//
//     db = slope * sum over width of dout (new - old),    ds = db through weight or W^T
//     dold = of_old * dout + du,    dnew = of_new * dout + du,    du = ds / width, or ds * status_weight
template <class Element>
void gate_backward(const ResidualGateBackward& b) {
    const ResidualGate& a = b.forward;
    const auto row_of = [&](const void* base, int64_t row) { return static_cast<const Element*>(base) + row * a.width; };
    const auto target_of = [&](void* base, int64_t row) { return static_cast<Element*>(base) + row * a.width; };
    const int64_t rows = a.batch * a.slots;
    const double work = 8.0 * rows * a.width;
    const auto open = [&](int64_t row) {
        const Element* old = row_of(a.old, row);
        const Element* added = row_of(a.new_values, row);
        const Element* gradient = row_of(b.out_gradient, row);
        WideSum total;
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float incoming = load_up_to(gradient + i, left);
            total.add(incoming, load_up_to(added + i, left));
            total.add(incoming, zero() - load_up_to(old + i, left));
        }
        b.before_gradient[row] = slope_at(a, a.before[row]) * total.total();
    };
    if (looks_around(a)) {
        parallel_for(rows, work, open);
        status_gradients(b);
    }
    parallel_for(rows, work, [&](int64_t row) {
        if (!looks_around(a)) {
            open(row);
            if (has_status(a)) b.status_gradient[row] = static_cast<float>(b.before_gradient[row]) * a.weight[row % a.slots];
        }
        const Opening opening = opening_at(a, a.before[row]);
        const Float of_status = broadcast(!has_status(a)               ? 0.0f
                                          : a.status_weight != nullptr ? b.status_gradient[row]
                                                                       : b.status_gradient[row] / static_cast<float>(a.width));
        const Element* gradient = row_of(b.out_gradient, row);
        Element* old_gradient = target_of(b.old_gradient, row);
        Element* new_gradient = target_of(b.new_gradient, row);
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float incoming = load_up_to(gradient + i, left);
            Float of_both = of_status;
            if (a.status_weight != nullptr) of_both = of_both * load_up_to(a.status_weight + i, left);
            store_up_to(old_gradient + i, multiply_add(incoming, broadcast(opening.of_old), of_both), left);
            store_up_to(new_gradient + i, multiply_add(incoming, broadcast(opening.of_new), of_both), left);
        }
    });
    parameter_gradients(b);
    if (a.status_weight == nullptr) return;
    sum_of_rows(rows, a.width, 3.0 * rows * a.width, b.status_weight_gradient, [&](int64_t row, int64_t i, int64_t left) {
        const Float both = load_up_to(row_of(a.old, row) + i, left) + load_up_to(row_of(a.new_values, row) + i, left);
        return broadcast(b.status_gradient[row]) * both;
    });
    *b.status_bias_gradient = sum_of_values(rows, [&](int64_t row) { return b.status_gradient[row]; });
}

}  // namespace

void residual_gate(const ResidualGate& a) { a.dtype == DType::float32 ? gate<float>(a) : gate<BFloat16>(a); }

void residual_gate_backward(const ResidualGateBackward& a) {
    a.forward.dtype == DType::float32 ? gate_backward<float>(a) : gate_backward<BFloat16>(a);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
