// With g the gradient of a token's output, w its weight at an expert, and h = l act(b) the hidden units (b the gate, l the linear
// half; without gating h = act(b)):
//
//     dh = W2^T g        dw = dh h + g b2       dl = w dh act(b)      db = w dh l act'(b)
//     dx = sum over experts of W1^T [dl, db]    dW1 = sum over tokens of [dl, db] x^T     dW2 = sum over tokens of g (w h)^T
#include "mixture_of_experts/activation.h"
#include "mixture_of_experts/tasks.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

// For some hidden units and a block of tokens: the gradients before the activation, w h, and this part of dh h.
template <class Element>
void hidden_gradients(const ExpertsBackward& a, const WideRows& gradient, const RowBlock& block, int64_t first, int64_t count,
                      int64_t part) {
    const Experts& e = a.experts;
    const int rows = static_cast<int>(block.count);
    const float* addresses[most_block_rows];
    for (int r = 0; r < rows; ++r) addresses[r] = gradient(e.groups.tokens[block.first + r]);
    const int64_t stride = padded_columns(count);
    alignas(64) float sums[most_sums];
    multiply_matrix<Element>(addresses, rows, e.second[block.expert].transposed(), first, count, sums, stride);
    for (int r = 0; r < rows; ++r) {
        const int64_t place = block.first + r;
        const Float weight = broadcast(e.weights[e.groups.order[place]]);
        const float* before = a.before + place * e.width() + first;
        float* outgoing = a.before_gradient + place * e.width() + first;
        float* hidden = a.hidden + place * e.hidden + first;
        Float products = zero();
        for (int64_t i = 0; i < count; i += Float::lanes) {
            const int64_t left = count - i;
            const Float own = load_up_to(sums + r * stride + i, left), weighted = own * weight;
            Float value;
            if (e.gated) {
                const Float linear = load_up_to(before + e.linear_at() + i, left);
                const ValueAndSlope gate = activate_with_slope(e.activation, load_up_to(before + e.gate_at() + i, left));
                value = linear * gate.value;
                store_up_to(outgoing + e.linear_at() + i, weighted * gate.value, left);
                store_up_to(outgoing + e.gate_at() + i, weighted * linear * gate.slope, left);
            } else {
                const ValueAndSlope active = activate_with_slope(e.activation, load_up_to(before + i, left));
                value = active.value;
                store_up_to(outgoing + i, weighted * active.slope, left);
            }
            products = multiply_add(own, value, products);
            store_up_to(hidden + i, value * weight, left);
        }
        a.products[place * a.hidden_parts + part] = sum(products);
    }
}

// dw of one choice, from the parts of dh h.
template <class Element>
void weight_gradient(const ExpertsBackward& a, const WideRows& gradient, const RowBlock& block, int64_t parts) {
    const Experts& e = a.experts;
    for (int64_t place = block.first; place < block.first + block.count; ++place) {
        float total = 0.0f;
        for (int64_t part = 0; part < parts; ++part) total += a.products[place * a.hidden_parts + part];
        if (e.second_bias != nullptr) {
            const auto* bias = static_cast<const Element*>(e.second_bias[block.expert]);
            const float* row = gradient(e.groups.tokens[place]);
            Float products = zero();
            for (int64_t i = 0; i < e.dim; i += Float::lanes)
                products = multiply_add(load_up_to(bias + i, e.dim - i), load_up_to(row + i, e.dim - i), products);
            total += sum(products);
        }
        a.weights_gradient[e.groups.order[place]] = total;
    }
}

// Some columns of dx, for each choice by itself.
template <class Element>
void input_gradients(const ExpertsBackward& a, const RowBlock& block, int64_t first, int64_t count) {
    const Experts& e = a.experts;
    const int rows = static_cast<int>(block.count);
    const float* addresses[most_block_rows];
    for (int r = 0; r < rows; ++r) addresses[r] = a.before_gradient + (block.first + r) * e.width();
    const int64_t stride = padded_columns(count);
    alignas(64) float sums[most_sums];
    multiply_matrix<Element>(addresses, rows, e.first[block.expert].transposed(), first, count, sums, stride);
    for (int r = 0; r < rows; ++r) {
        float* part = a.x_parts + e.groups.order[block.first + r] * e.dim + first;
        for (int64_t i = 0; i < count; i += Float::lanes)
            store_up_to(part + i, load_up_to(sums + r * stride + i, count - i), count - i);
    }
}

// The gradient of every expert's matrix: target[output, input] = sum over its tokens of outgoing(place)[output] * incoming(place)[input].
template <class Element, class Outgoing, class Incoming>
void matrix_gradients(const Experts& e, const Matrix* targets, const Outgoing& outgoing, const Incoming& incoming) {
    const bool by_input = targets[0].output_stride == 1;
    const int64_t height = by_input ? targets[0].inputs : targets[0].outputs;
    const int64_t width = by_input ? targets[0].outputs : targets[0].inputs;
    const int64_t column_step = padded_columns(width) < 256 ? padded_columns(width) : 256;
    const int64_t row_step = most_sums / column_step < most_block_rows ? most_sums / column_step : most_block_rows;
    const int64_t row_tasks = (height + row_step - 1) / row_step;
    const int64_t column_tasks = (width + column_step - 1) / column_step;
    const double work = 2.0 * e.tokens * e.top_k * height * width + 1.0 * e.experts * height * width;
    parallel_for_uneven(e.experts * row_tasks * column_tasks, work, [&](int64_t index) {
        const int64_t expert = index / (row_tasks * column_tasks);
        const int64_t row = index / column_tasks % row_tasks * row_step, column = index % column_tasks * column_step;
        const int rows = static_cast<int>(height - row < row_step ? height - row : row_step);
        const int64_t columns = width - column < column_step ? width - column : column_step;
        const int64_t first = e.groups.starts[expert], tokens = e.groups.starts[expert + 1] - first;
        alignas(64) float sums[most_sums];
        const int64_t stride = padded_columns(columns);
        if (by_input) {
            multiply_outer([&](int64_t k) { return incoming(first + k) + row; }, rows,
                           [&](int64_t k) { return outgoing(first + k) + column; }, tokens, columns, sums, stride);
        } else {
            multiply_outer([&](int64_t k) { return outgoing(first + k) + row; }, rows,
                           [&](int64_t k) { return incoming(first + k) + column; }, tokens, columns, sums, stride);
        }
        const Matrix& target = targets[expert];
        const int64_t target_stride = by_input ? target.input_stride : target.output_stride;
        for (int r = 0; r < rows; ++r)
            for (int64_t i = 0; i < columns; i += Float::lanes)
                store_up_to(static_cast<Element*>(target.data) + (row + r) * target_stride + column + i,
                            load(sums + r * stride + i), columns - i);
    });
}

// The gradient of every expert's bias: the sum of scale(place) * row(place) over its tokens.
template <class Element, class Scale, class Row>
void bias_gradients(const Experts& e, int64_t width, void* const* targets, const Scale& scale, const Row& row) {
    parallel_for_uneven(e.experts, 2.0 * e.tokens * e.top_k * width, [&](int64_t expert) {
        auto* target = static_cast<Element*>(targets[expert]);
        for (int64_t i = 0; i < width; i += Float::lanes) {
            const int64_t left = width - i;
            Float total = zero();
            for (int64_t place = e.groups.starts[expert]; place < e.groups.starts[expert + 1]; ++place)
                total = multiply_add(load_up_to(row(place) + i, left), broadcast(scale(place)), total);
            store_up_to(target + i, total, left);
        }
    });
}

template <class Element>
void backward(const ExpertsBackward& a) {
    const Experts& e = a.experts;
    const int64_t choices = e.tokens * e.top_k, rows = e.groups.most_rows;
    const WideRows x = wide_rows<Element>(e.x, e.x_stride, e.tokens, e.dim, e.inputs);
    const WideRows gradient = wide_rows<BFloat16>(a.gradient, e.dim, e.tokens, e.dim, a.gradients);
    const int64_t columns = columns_beside(rows, 256), parts = (e.hidden + columns - 1) / columns;
    for_blocks(e.groups, e.hidden, columns, 2.0 * choices * e.dim * e.hidden,
               [&](const RowBlock& block, int64_t first, int64_t count) {
                   hidden_gradients<Element>(a, gradient, block, first, count, first / columns);
               });
    parallel_for(e.groups.block_count, 2.0 * choices * e.dim,
                 [&](int64_t block) { weight_gradient<Element>(a, gradient, e.groups.blocks[block], parts); });
    for_blocks(e.groups, e.dim, columns, 2.0 * choices * e.dim * e.width(),
               [&](const RowBlock& block, int64_t first, int64_t count) { input_gradients<Element>(a, block, first, count); });
    parallel_for(e.tokens, 1.0 * choices * e.dim, [&](int64_t token) {
        sum_parts(a.x_parts + token * e.top_k * e.dim, e.top_k, e.dim, static_cast<Element*>(a.x_gradient) + token * e.dim);
    });

    const auto x_row = [&](int64_t place) { return x(e.groups.tokens[place]); };
    const auto gradient_row = [&](int64_t place) { return gradient(e.groups.tokens[place]); };
    const auto before_row = [&](int64_t place) { return a.before_gradient + place * e.width(); };
    const auto hidden_row = [&](int64_t place) { return a.hidden + place * e.hidden; };
    matrix_gradients<Element>(e, a.first_gradient, before_row, x_row);
    matrix_gradients<Element>(e, a.second_gradient, gradient_row, hidden_row);
    if (a.first_bias_gradient != nullptr)
        bias_gradients<Element>(e, e.width(), a.first_bias_gradient, [](int64_t) { return 1.0f; }, before_row);
    if (a.second_bias_gradient != nullptr)
        bias_gradients<Element>(e, e.dim, a.second_bias_gradient,
                                [&](int64_t place) { return e.weights[e.groups.order[place]]; }, gradient_row);
}

}  // namespace

void experts_backward(const ExpertsBackward& a) {
    a.experts.dtype == DType::float32 ? backward<float>(a) : backward<BFloat16>(a);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
