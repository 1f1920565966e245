// With g the gradient of a token's output, w its weight at an expert, and h = l act(b) the hidden units (b the gate, l the linear
// half; without gating h = act(b)):
//
//     dh = W2^T g        dw = dh h + g b2       dl = w dh act(b)      db = w dh l act'(b)
//     dx = sum over experts of W1^T [dl, db]    dW1 = sum over tokens of [dl, db] x^T     dW2 = sum over tokens of g (w h)^T
#include "mixture_of_experts/activation.h"
#include "mixture_of_experts/tasks.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

// For hidden units [first, first + count) of a place, a part's worth or less: the gradients before the activation, w h, and their part
// of dh h.
void hidden_gradients(const ExpertsBackward& a, const Round& round, int64_t place, int64_t first, int64_t count, const float* sums) {
    const Experts& e = a.experts;
    const int64_t own_place = place - round.first_place;
    const Float weight = broadcast(e.weights[e.groups.order[place]]);
    const float* before = a.before + place * e.width() + first;
    float* outgoing = a.before_gradient + own_place * e.width() + first;
    float* hidden = a.hidden + own_place * e.hidden + first;
    alignas(64) float active[hidden_part], slope[hidden_part];
    const float* activated = before + (e.gated ? e.gate_at() : 0);
    for (int64_t i = 0; i < count; i += Float::lanes) store(active + i, load_up_to(activated + i, count - i));
    activate_row_with_slope(e.activation, active, slope, count);
    Float products = zero();
    for (int64_t i = 0; i < count; i += Float::lanes) {
        const int64_t left = count - i;
        const Float own = load_up_to(sums + i, left), weighted = own * weight;
        Float value = load(active + i);
        if (e.gated) {
            const Float linear = load_up_to(before + e.linear_at() + i, left);
            store_up_to(outgoing + e.linear_at() + i, weighted * value, left);
            store_up_to(outgoing + e.gate_at() + i, weighted * linear * load(slope + i), left);
            value = linear * value;
        } else {
            store_up_to(outgoing + i, weighted * load(slope + i), left);
        }
        products = multiply_add(own, value, products);
        store_up_to(hidden + i, value * weight, left);
    }
    a.products[own_place * a.hidden_parts + first / hidden_part] = sum(products);
}

// dw of the choices of a block, from the parts of dh h.
template <class Element>
void weight_gradients(const ExpertsBackward& a, const Round& round, const WideRows& gradient, const RowBlock& block) {
    const Experts& e = a.experts;
    for (int64_t place = block.first; place < block.first + block.count; ++place) {
        const float* products = a.products + (place - round.first_place) * a.hidden_parts;
        float total = 0.0f;
        for (int64_t part = 0; part < a.hidden_parts; ++part) total += products[part];
        if (e.second_bias != nullptr) {
            const auto* bias = static_cast<const Element*>(e.second_bias[block.expert]);
            const float* row = gradient(e.groups.tokens[place]);
            Float with_bias = zero();
            for (int64_t i = 0; i < e.dim; i += Float::lanes)
                with_bias = multiply_add(load_up_to(bias + i, e.dim - i), load_up_to(row + i, e.dim - i), with_bias);
            total += sum(with_bias);
        }
        a.weights_gradient[e.groups.order[place]] = total;
    }
}

// The gradient of every expert's matrix: target[output, input] = sum over its tokens of outgoing(place)[output] * incoming(place)[input].
template <class Element, class Outgoing, class Incoming>
void matrix_gradients(const Experts& e, const Round& round, const Matrix* targets, const Outgoing& outgoing,
                      const Incoming& incoming) {
    const bool by_input = targets[0].output_stride == 1;
    const int64_t height = by_input ? targets[0].inputs : targets[0].outputs;
    const int64_t width = by_input ? targets[0].outputs : targets[0].inputs;
    // Rows of a task are packed once and meet all of its columns, the columns once for all of its rows.
    constexpr int64_t most_rows = 96, most_columns = 512;
    const auto even = [](int64_t whole, int64_t most, int64_t unit) {
        const int64_t parts = (whole + most - 1) / most;
        return ((whole + parts - 1) / parts + unit - 1) / unit * unit;
    };
    const int64_t row_step = even(height, most_rows, tile_rows), column_step = even(width, most_columns, column_unit);
    const int64_t row_tasks = (height + row_step - 1) / row_step;
    const int64_t column_tasks = (width + column_step - 1) / column_step;
    const int64_t experts = round.last_expert - round.first_expert;
    const double work = 2.0 * round.places * height * width + 1.0 * experts * height * width;
    parallel_for_uneven(experts * row_tasks * column_tasks, work, [&](int64_t index) {
        const int64_t expert = round.first_expert + index / (row_tasks * column_tasks);
        const int64_t row = index / column_tasks % row_tasks * row_step, column = index % column_tasks * column_step;
        const int rows = static_cast<int>(height - row < row_step ? height - row : row_step);
        const int64_t columns = width - column < column_step ? width - column : column_step;
        const int64_t first = e.groups.starts[expert], tokens = e.groups.starts[expert + 1] - first;
        const Matrix& target = targets[expert];
        const int64_t target_stride = by_input ? target.input_stride : target.output_stride;
        const auto finish = [&](int r, const float* sums) {
            auto* to = static_cast<Element*>(target.data) + (row + r) * target_stride + column;
            for (int64_t i = 0; i < columns; i += Float::lanes) store_up_to(to + i, load(sums + i), columns - i);
        };
        const auto out = [&](int64_t k) { return outgoing(first + k); };
        const auto in = [&](int64_t k) { return incoming(first + k); };
        if (by_input) {
            multiply_outer<Element>([&](int64_t k) { return in(k) + row; }, rows, [&](int64_t k) { return out(k) + column; }, tokens,
                           columns, finish);
        } else {
            multiply_outer<Element>([&](int64_t k) { return out(k) + row; }, rows, [&](int64_t k) { return in(k) + column; }, tokens,
                           columns, finish);
        }
    });
}

// The gradient of every expert's bias: the sum of scale(place) * row(place) over its tokens. Thousands of them in one chain of sums
// would be less accurate than torch is, so parts of it are added up.
constexpr int64_t terms_of_part = 64;

template <class Element, class Scale, class Row>
void bias_gradients(const Experts& e, const Round& round, int64_t width, void* const* targets, const Scale& scale, const Row& row) {
    parallel_for_uneven(round.last_expert - round.first_expert, 2.0 * round.places * width, [&](int64_t index) {
        const int64_t expert = round.first_expert + index;
        auto* target = static_cast<Element*>(targets[expert]);
        for (int64_t i = 0; i < width; i += Float::lanes) {
            const int64_t left = width - i;
            Float total = zero();
            for (int64_t place = e.groups.starts[expert], last = e.groups.starts[expert + 1]; place < last;) {
                Float part = zero();
                for (const int64_t end = detail::at_most(last, place + terms_of_part); place < end; ++place)
                    part = multiply_add(load_up_to(row(place) + i, left), broadcast(scale(place)), part);
                total = total + part;
            }
            store_up_to(target + i, total, left);
        }
    });
}

template <class Element>
void backward_of_round(const ExpertsBackward& a, const Round& round, const WideRows& x, const WideRows& gradient) {
    const Experts& e = a.experts;
    const auto x_row = [&](int64_t place) { return x(e.groups.tokens[place]); };
    const auto gradient_row = [&](int64_t place) { return gradient(e.groups.tokens[place]); };
    const auto before_row = [&](int64_t place) { return a.before_gradient + (place - round.first_place) * e.width(); };
    const auto hidden_row = [&](int64_t place) { return a.hidden + (place - round.first_place) * e.hidden; };
    products<Element>(e, round, e.hidden, e.dim, gradient_row, [&](int64_t expert) { return e.second[expert].transposed(); },
                      [&](const RowBlock&, int64_t place, int64_t first, int64_t count, const float* sums) {
                          for (int64_t i = 0; i < count; i += hidden_part)
                              hidden_gradients(a, round, place, first + i, detail::at_most(count - i, hidden_part), sums + i);
                      });
    parallel_for(round.block_count, 2.0 * round.places * e.dim,
                 [&](int64_t block) { weight_gradients<Element>(a, round, gradient, round.blocks[block]); });
    products<Element>(e, round, e.dim, e.width(), before_row, [&](int64_t expert) { return e.first[expert].transposed(); },
                      [&](const RowBlock&, int64_t place, int64_t first, int64_t count, const float* sums) {
                          float* part = a.x_parts + e.groups.order[place] * e.dim + first;
                          for (int64_t i = 0; i < count; i += Float::lanes)
                              store_up_to(part + i, load_up_to(sums + i, count - i), count - i);
                      });
    matrix_gradients<Element>(e, round, a.first_gradient, before_row, x_row);
    matrix_gradients<Element>(e, round, a.second_gradient, gradient_row, hidden_row);
    if (a.first_bias_gradient != nullptr)
        bias_gradients<Element>(e, round, e.width(), a.first_bias_gradient, [](int64_t) { return 1.0f; }, before_row);
    if (a.second_bias_gradient != nullptr)
        bias_gradients<Element>(e, round, e.dim, a.second_bias_gradient,
                                [&](int64_t place) { return e.weights[e.groups.order[place]]; }, gradient_row);
}

template <class Element>
void backward(const ExpertsBackward& a) {
    const Experts& e = a.experts;
    const WideRows x = wide_rows<Element>(e.x, e.x_stride, e.tokens, e.dim, e.inputs);
    const WideRows gradient = wide_rows<BFloat16>(a.gradient, e.dim, e.tokens, e.dim, a.gradients);
    for (int64_t r = 0; r < e.groups.round_count; ++r) backward_of_round<Element>(a, e.groups.rounds[r], x, gradient);
    parallel_for(e.tokens, 1.0 * e.tokens * e.top_k * e.dim, [&](int64_t token) {
        sum_parts(a.x_parts + token * e.top_k * e.dim, e.top_k, e.dim, static_cast<Element*>(a.x_gradient) + token * e.dim);
    });
}

}  // namespace

void experts_backward(const ExpertsBackward& a) {
    a.experts.dtype == DType::float32 ? backward<float>(a) : backward<BFloat16>(a);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
