#include "mixture_of_experts/activation.h"
#include "mixture_of_experts/tasks.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

// What goes into the activation, of hidden units [first, first + count) of a place: the bias is added, and it is kept where the
// backward pass will ask for it. `at` is where this half of the first matrix begins.
template <class Element>
void finish_half(const ExpertsForward& a, const RowBlock& block, int64_t place, int64_t at, int64_t count, float* sums) {
    const Experts& e = a.experts;
    if (e.first_bias != nullptr) {
        const auto* bias = static_cast<const Element*>(e.first_bias[block.expert]) + at;
        for (int64_t i = 0; i < count; i += Float::lanes) store(sums + i, load(sums + i) + load_up_to(bias + i, count - i));
    }
    if (a.before == nullptr) return;
    float* before = a.before + place * e.width() + at;
    for (int64_t i = 0; i < count; i += Float::lanes) store_up_to(before + i, load(sums + i), count - i);
}

// Hidden units [first, first + count) of a place from the sums of both halves, which are overwritten; those of the gate are null
// without one.
template <class Element>
void activate_units(const ExpertsForward& a, const Round& round, const RowBlock& block, int64_t place, int64_t first, int64_t count,
                    float* linear, float* gate) {
    const Experts& e = a.experts;
    finish_half<Element>(a, block, place, e.linear_at() + first, count, linear);
    if (e.gated) finish_half<Element>(a, block, place, e.gate_at() + first, count, gate);
    activate_row(e.activation, e.gated ? gate : linear, count);
    float* hidden = a.hidden + (place - round.first_place) * e.hidden + first;
    for (int64_t i = 0; i < count; i += Float::lanes)
        store_up_to(hidden + i, e.gated ? load(linear + i) * load(gate + i) : load(linear + i), count - i);
}

// Both halves of some hidden units, and the activation while they are in the cache.
template <class Element>
void gated_units(const ExpertsForward& a, const Round& round, const WideRows& x) {
    const Experts& e = a.experts;
    const auto row = [&](int64_t place) { return x(e.groups.tokens[place]); };
    const auto few = [&](const RowBlock& block, int64_t first, int64_t count) {
        const float* addresses[enough_rows_to_pack];
        for (int64_t r = 0; r < block.count; ++r) addresses[r] = row(block.first + r);
        const int64_t half = padded_columns(count), stride = 2 * half;
        alignas(64) float sums[most_sums];
        const Matrix& weight = e.first[block.expert];
        const int rows = static_cast<int>(block.count);
        multiply_unpacked<Element>(addresses, rows, weight, e.linear_at() + first, count, sums, stride);
        multiply_unpacked<Element>(addresses, rows, weight, e.gate_at() + first, count, sums + half, stride);
        for (int r = 0; r < rows; ++r)
            activate_units<Element>(a, round, block, block.first + r, first, count, sums + r * stride, sums + r * stride + half);
    };
    const auto many = [&](const RowBlock& block, int64_t first, int64_t count) {
        constexpr int64_t half = outputs_of_task / 2;
        const auto halves_at = [&](int i) {
            const int64_t column = i * panel_width, units = detail::at_most(count - column, panel_width);
            return PanelPair{{e.linear_at() + first + column, e.gate_at() + first + column}, {units, units}, {column, half + column}};
        };
        multiply_pairs<pairs_of_task, Element>(
            [&](int64_t i) { return row(block.first + i); }, block.count, e.first[block.expert],
            static_cast<int>(panel_count(count)), halves_at, [&](int64_t first_row, int rows, float* sums) {
                for (int r = 0; r < rows; ++r, sums += outputs_of_task)
                    activate_units<Element>(a, round, block, block.first + first_row + r, first, count, sums, sums + half);
            });
    };
    for_blocks(round, e.hidden, columns_beside(2 * e.groups.few_rows, 128), outputs_of_task / 2,
               2.0 * round.places * e.dim * e.width(), few, many);
}

template <class Element>
void plain_units(const ExpertsForward& a, const Round& round, const WideRows& x) {
    const Experts& e = a.experts;
    products<Element>(e, round, e.hidden, e.dim, [&](int64_t place) { return x(e.groups.tokens[place]); },
                      [&](int64_t expert) { return e.first[expert]; },
                      [&](const RowBlock& block, int64_t place, int64_t first, int64_t count, float* sums) {
                          activate_units<Element>(a, round, block, place, first, count, sums, nullptr);
                      });
}

// Outputs of every choice, times their routing weights.
template <class Element>
void weighted_outputs(const ExpertsForward& a, const Round& round) {
    const Experts& e = a.experts;
    products<Element>(
        e, round, e.dim, e.hidden, [&](int64_t place) { return a.hidden + (place - round.first_place) * e.hidden; },
        [&](int64_t expert) { return e.second[expert]; },
        [&](const RowBlock& block, int64_t place, int64_t first, int64_t count, const float* sums) {
            const auto* bias = e.second_bias == nullptr ? nullptr : static_cast<const Element*>(e.second_bias[block.expert]) + first;
            const int64_t choice = e.groups.order[place];
            const Float weight = broadcast(e.weights[choice]);
            float* result = a.results + choice * e.dim + first;
            for (int64_t i = 0; i < count; i += Float::lanes) {
                const int64_t left = count - i;
                Float value = load_up_to(sums + i, left);
                if (bias != nullptr) value = value + load_up_to(bias + i, left);
                store_up_to(result + i, value * weight, left);
            }
        });
}

template <class Element>
void forward(const ExpertsForward& a) {
    const Experts& e = a.experts;
    const int64_t choices = e.tokens * e.top_k;
    const WideRows x = wide_rows<Element>(e.x, e.x_stride, e.tokens, e.dim, e.inputs);
    for (int64_t r = 0; r < e.groups.round_count; ++r) {
        const Round& round = e.groups.rounds[r];
        e.gated ? gated_units<Element>(a, round, x) : plain_units<Element>(a, round, x);
        weighted_outputs<Element>(a, round);
    }
    // The experts of a token in the order of its choices.
    parallel_for(e.tokens, 1.0 * choices * e.dim, [&](int64_t token) {
        const float* parts = a.results + token * e.top_k * e.dim;
        if (a.output_dtype == DType::float32) {
            sum_parts(parts, e.top_k, e.dim, static_cast<float*>(a.output) + token * e.dim);
        } else {
            sum_parts(parts, e.top_k, e.dim, static_cast<BFloat16*>(a.output) + token * e.dim);
        }
    });
}

}  // namespace

void experts_forward(const ExpertsForward& a) {
    a.experts.dtype == DType::float32 ? forward<float>(a) : forward<BFloat16>(a);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
