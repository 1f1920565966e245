#include "core/parallel.h"
#include "memory_update/kernels.h"
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

template <class Element>
void gate(const ResidualGate& a) {
    const auto row_of = [&](const void* base, int64_t row) { return static_cast<const Element*>(base) + row * a.width; };
    const int64_t rows = a.batch * a.slots;
    const double work = 6.0 * rows * a.width;
    const bool has_status = a.kind == GateKind::elementwise || a.kind == GateKind::linear;
    // A gate that looks at one slot only has its status while the slot is in the cache; others need those of all slots first.
    const bool looks_around = a.kind == GateKind::linear || (a.kind == GateKind::elementwise && !a.per_slot);
    if (looks_around) {
        parallel_for(rows, work, [&](int64_t row) { a.status[row] = status_of(a, row_of(a.old, row), row_of(a.new_values, row)); });
    }
    parallel_for(rows, work + (a.kind == GateKind::linear ? 2.0 * rows * a.slots : 0.0), [&](int64_t row) {
        const Element* old = row_of(a.old, row);
        const Element* added = row_of(a.new_values, row);
        Element* out = static_cast<Element*>(a.out) + row * a.width;
        float share_new = 1.0f, share_old = 1.0f;
        if (a.kind != GateKind::add) {
            if (has_status && !looks_around) a.status[row] = status_of(a, old, added);
            const float before = before_activation(a, row / a.slots, row % a.slots);
            const float opening = a.tanh ? __builtin_tanhf(before) : sigmoid_of(before);
            share_new = a.tanh ? 1.0f + opening : opening;
            share_old = 1.0f - opening;
        }
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float kept = load_up_to(old + i, left) * broadcast(share_old);
            store_up_to(out + i, multiply_add(load_up_to(added + i, left), broadcast(share_new), kept), left);
        }
    });
}

}  // namespace

void residual_gate(const ResidualGate& a) { a.dtype == DType::float32 ? gate<float>(a) : gate<BFloat16>(a); }

}  // namespace rxt::RXT_INSTRUCTION_SET
