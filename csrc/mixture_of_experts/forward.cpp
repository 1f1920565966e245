#include "mixture_of_experts/activation.h"
#include "mixture_of_experts/tasks.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

// Both halves of some hidden units for a block of tokens, and the activation while they are in the cache.
template <class Element>
void hidden_units(const ExpertsForward& a, const WideRows& x, const RowBlock& block, int64_t first, int64_t count) {
    const Experts& e = a.experts;
    const int rows = static_cast<int>(block.count);
    const float* addresses[most_block_rows];
    for (int r = 0; r < rows; ++r) addresses[r] = x(e.groups.tokens[block.first + r]);
    const int64_t half = padded_columns(count), stride = e.gated ? 2 * half : half;
    alignas(64) float sums[most_sums];
    const Matrix& weight = e.first[block.expert];
    multiply_matrix<Element>(addresses, rows, weight, e.linear_at() + first, count, sums, stride);
    if (e.gated) multiply_matrix<Element>(addresses, rows, weight, e.gate_at() + first, count, sums + half, stride);
    const auto* bias =
        e.first_bias == nullptr ? nullptr : static_cast<const Element*>(e.first_bias[block.expert]) + first;
    for (int r = 0; r < rows; ++r) {
        const int64_t place = block.first + r;
        for (int64_t i = 0; i < count; i += Float::lanes) {
            const int64_t left = count - i;
            const auto part = [&](int64_t at, int64_t column) {
                const Float value = load_up_to(sums + r * stride + column + i, left);
                const Float with_bias = bias == nullptr ? value : value + load_up_to(bias + at + i, left);
                if (a.before != nullptr) store_up_to(a.before + place * e.width() + at + first + i, with_bias, left);
                return with_bias;
            };
            const Float linear = part(e.linear_at(), 0);
            const Float hidden =
                e.gated ? linear * activate(e.activation, part(e.gate_at(), half)) : activate(e.activation, linear);
            store_up_to(a.hidden + place * e.hidden + first + i, hidden, left);
        }
    }
}

// Some outputs of an expert for a block of tokens, times their routing weights.
template <class Element>
void weighted_outputs(const ExpertsForward& a, const RowBlock& block, int64_t first, int64_t count) {
    const Experts& e = a.experts;
    const int rows = static_cast<int>(block.count);
    const float* addresses[most_block_rows];
    for (int r = 0; r < rows; ++r) addresses[r] = a.hidden + (block.first + r) * e.hidden;
    const int64_t stride = padded_columns(count);
    alignas(64) float sums[most_sums];
    multiply_matrix<Element>(addresses, rows, e.second[block.expert], first, count, sums, stride);
    const auto* bias =
        e.second_bias == nullptr ? nullptr : static_cast<const Element*>(e.second_bias[block.expert]) + first;
    for (int r = 0; r < rows; ++r) {
        const int64_t choice = e.groups.order[block.first + r];
        const Float weight = broadcast(e.weights[choice]);
        float* result = a.results + choice * e.dim + first;
        for (int64_t i = 0; i < count; i += Float::lanes) {
            const int64_t left = count - i;
            Float value = load_up_to(sums + r * stride + i, left);
            if (bias != nullptr) value = value + load_up_to(bias + i, left);
            store_up_to(result + i, value * weight, left);
        }
    }
}

template <class Element>
void forward(const ExpertsForward& a) {
    const Experts& e = a.experts;
    const int64_t choices = e.tokens * e.top_k, rows = e.groups.most_rows;
    const WideRows x = wide_rows<Element>(e.x, e.x_stride, e.tokens, e.dim, e.inputs);
    const int64_t units = e.gated ? columns_beside(2 * rows, 128) : columns_beside(rows, 256);
    for_blocks(e.groups, e.hidden, units, 2.0 * choices * e.dim * e.width(),
               [&](const RowBlock& block, int64_t first, int64_t count) { hidden_units<Element>(a, x, block, first, count); });
    for_blocks(e.groups, e.dim, columns_beside(rows, 256), 2.0 * choices * e.dim * e.hidden,
               [&](const RowBlock& block, int64_t first, int64_t count) { weighted_outputs<Element>(a, block, first, count); });
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
