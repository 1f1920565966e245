#include "mixture_of_experts/router.h"

#include "mixture_of_experts/tasks.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

// A float32 that counts as the bfloat16 next to it.
struct RoundedFloat {
    float value;
};

inline Float rounded(Float x) {
    alignas(64) BFloat16 halves[Float::lanes];
    store(halves, x);
    return load(halves);
}

using RXT_INSTRUCTION_SET::load;
using RXT_INSTRUCTION_SET::load_part;
inline Float load(const RoundedFloat* source) { return rounded(load(&source->value)); }
inline Float load_part(const RoundedFloat* source, int count) { return rounded(load_part(&source->value, count)); }

// x as fp32, rounded where the router is to work in bfloat16.
template <class Element, class Arguments>
WideRows inputs_of(const Arguments& a) {
    if (a.inputs == nullptr) return {static_cast<const float*>(a.x), a.x_stride};
    parallel_for(a.tokens, 1.0 * a.tokens * a.dim, [&](int64_t token) {
        const Element* from = static_cast<const Element*>(a.x) + token * a.x_stride;
        float* to = a.inputs + token * a.dim;
        for (int64_t i = 0; i < a.dim; i += Float::lanes) {
            const int64_t left = a.dim - i;
            const Float x = load_up_to(from + i, left);
            store_up_to(to + i, a.rounds_inputs ? rounded(x) : x, left);
        }
    });
    return {a.inputs, a.dim};
}

constexpr int64_t token_block = 12;

template <class Element, class Weight>
void forward(const RouterForward& a) {
    const WideRows x = inputs_of<Element>(a);
    const auto* weight = static_cast<const Weight*>(a.weight);
    // Few tokens: their logits are shared out by experts.
    constexpr int64_t expert_block = 32;
    const int64_t token_tasks = (a.tokens + token_block - 1) / token_block;
    const int64_t expert_tasks = (a.experts + expert_block - 1) / expert_block;
    parallel_for(token_tasks * expert_tasks, 2.0 * a.tokens * a.experts * a.dim, [&](int64_t task) {
        const int64_t first = task / expert_tasks * token_block, expert = task % expert_tasks * expert_block;
        const int count = static_cast<int>(a.tokens - first < token_block ? a.tokens - first : token_block);
        const int64_t experts = a.experts - expert < expert_block ? a.experts - expert : expert_block;
        const float* rows[token_block];
        for (int r = 0; r < count; ++r) rows[r] = x(first + r);
        float* logits = a.logits + first * a.experts + expert;
        multiply_output_major<Weight>(rows, count, [&](int64_t n) { return weight + (expert + n) * a.dim; }, a.dim, experts,
                                      logits, a.experts);
        if (!a.rounds_logits) return;
        for (int r = 0; r < count; ++r)
            for (int64_t n = 0; n < experts; ++n) {
                float& logit = logits[r * a.experts + n];
                logit = to_float(to_bfloat16(logit));
            }
    });
    parallel_for(a.tokens, 40.0 * a.tokens * a.experts, [&](int64_t token) {
        a.sums[token] = route_token(a.logits + token * a.experts, a.experts, a.top_k, a.by_index,
                                    a.probabilities + token * a.experts, a.chosen + token * a.top_k,
                                    a.weights + token * a.top_k);
    });
    double total = 0.0;
    for (int64_t token = 0; token < a.tokens; ++token) total += a.sums[token];
    *a.loss = static_cast<float>(total * a.experts / (static_cast<double>(a.tokens * a.top_k) + 1e-6));
}

// With p the probabilities, T the sum of the chosen ones + 1e-9, c the gradient of the loss times E / (N K + 1e-6):
//     dp = (dw - sum(dw p) / T) / T + c for the chosen, else 0;    dlogits = p (dp - sum(dp p))
void logits_gradient(const RouterBackward& a, int64_t token, float through_loss) {
    float* gradient = a.logits_gradient + token * a.experts;
    const int64_t* chosen = a.chosen + token * a.top_k;
    const float* incoming = a.weights_gradient + token * a.top_k;
    softmax(a.logits + token * a.experts, a.experts, gradient);
    double kept = 1e-9, weighted = 0.0;
    for (int64_t k = 0; k < a.top_k; ++k) {
        kept += gradient[chosen[k]];
        weighted += static_cast<double>(incoming[k]) * gradient[chosen[k]];
    }
    const auto through = [&](int64_t k) { return (incoming[k] - weighted / kept) / kept + through_loss; };
    double inner = 0.0;
    for (int64_t k = 0; k < a.top_k; ++k) inner += through(k) * gradient[chosen[k]];
    // The chosen ones are read before all are scaled; an expert is chosen once.
    for (int64_t k = 0; k < a.top_k; ++k)
        gradient[chosen[k]] = static_cast<float>(gradient[chosen[k]] * (through(k) - inner));
    const Float scale = broadcast(static_cast<float>(-inner));
    alignas(64) float values[Float::lanes];
    for (int64_t first = 0; first < a.experts; first += Float::lanes) {
        const int64_t left = a.experts - first;
        const int present = static_cast<int>(left < Float::lanes ? left : Float::lanes);
        store(values, load_up_to(gradient + first, left) * scale);
        for (int64_t k = 0; k < a.top_k; ++k) {
            const int64_t lane = chosen[k] - first;
            if (lane >= 0 && lane < present) values[lane] = gradient[chosen[k]];
        }
        for (int lane = 0; lane < present; ++lane) gradient[first + lane] = values[lane];
    }
}

template <class Element>
void write_sums(const float* sums, int64_t stride, int rows, int64_t columns, Element* target, int64_t target_stride) {
    for (int r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += Float::lanes)
            store_up_to(target + r * target_stride + c, load(sums + r * stride + c), columns - c);
}

constexpr int64_t tile_height = 24, tile_width = 256;

// task(row, rows, column, columns) for every tile of a matrix.
template <class Task>
void for_tiles(int64_t rows, int64_t columns, double work, const Task& task) {
    const int64_t across = (columns + tile_width - 1) / tile_width, down = (rows + tile_height - 1) / tile_height;
    parallel_for(down * across, work, [&](int64_t index) {
        const int64_t row = index / across * tile_height, column = index % across * tile_width;
        task(row, static_cast<int>(rows - row < tile_height ? rows - row : tile_height), column,
             columns - column < tile_width ? columns - column : tile_width);
    });
}

template <class Element, class Weight>
void backward(const RouterBackward& a) {
    const WideRows x = inputs_of<Element>(a);
    const auto* weight = static_cast<const Weight*>(a.weight);
    const double choices = static_cast<double>(a.tokens * a.top_k) + 1e-6;
    const float through_loss = static_cast<float>(*a.loss_gradient * static_cast<double>(a.experts) / choices);
    parallel_for(a.tokens, 40.0 * a.tokens * a.experts, [&](int64_t token) { logits_gradient(a, token, through_loss); });

    const double work = 2.0 * a.tokens * a.experts * a.dim;
    for_tiles(a.tokens, a.dim, work, [&](int64_t token, int rows, int64_t column, int64_t columns) {
        alignas(64) float sums[tile_height * tile_width];
        const float* gradient = a.logits_gradient + token * a.experts;
        multiply_input_major([&](int r, int64_t k) { return gradient[r * a.experts + k]; }, rows,
                             [&](int64_t k) { return weight + k * a.dim + column; }, a.experts, columns, sums, tile_width);
        write_sums(sums, tile_width, rows, columns, static_cast<Element*>(a.x_gradient) + token * a.dim + column, a.dim);
    });
    for_tiles(a.experts, a.dim, work, [&](int64_t expert, int rows, int64_t column, int64_t columns) {
        alignas(64) float sums[tile_height * tile_width];
        const float* gradient = a.logits_gradient + expert;
        multiply_input_major([&](int r, int64_t k) { return gradient[k * a.experts + r]; }, rows,
                             [&](int64_t k) { return x(k) + column; }, a.tokens, columns, sums, tile_width);
        write_sums(sums, tile_width, rows, columns, static_cast<Element*>(a.weight_gradient) + expert * a.dim + column,
                   a.dim);
    });
}

}  // namespace

void route_forward(const RouterForward& a) {
    if (a.dtype == DType::bfloat16) return forward<BFloat16, BFloat16>(a);
    a.rounds_inputs ? forward<float, RoundedFloat>(a) : forward<float, float>(a);
}

void route_backward(const RouterBackward& a) {
    if (a.dtype == DType::bfloat16) return backward<BFloat16, BFloat16>(a);
    a.rounds_inputs ? backward<float, RoundedFloat>(a) : backward<float, float>(a);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
