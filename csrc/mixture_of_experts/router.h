// The router for one token: from logits to the experts it goes to and their weights (specification 2.8).
#pragma once

#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

// probabilities = softmax(logits); where a logit is NaN, all of them are.
inline void softmax(const float* logits, int64_t count, float* probabilities) {
    Float highest_lanes = broadcast(-__builtin_inff());
    int64_t i = 0;
    for (; i + Float::lanes <= count; i += Float::lanes) highest_lanes = maximum(load(logits + i), highest_lanes);
    float highest = largest(highest_lanes);
    for (; i < count; ++i) highest = logits[i] > highest ? logits[i] : highest;
    Float totals = zero();
    for (i = 0; i < count; i += Float::lanes) {
        const int64_t left = count - i;
        store_up_to(probabilities + i, exp(load_up_to(logits + i, left) - broadcast(highest)), left);
        totals = totals + load_up_to(probabilities + i, left);
    }
    const Float total = broadcast(sum(totals));
    for (i = 0; i < count; i += Float::lanes)
        store_up_to(probabilities + i, load_up_to(probabilities + i, count - i) / total, count - i);
}

// The `top_k` largest probabilities in falling order; among equals the lower expert first, and NaN before all numbers.
// Returns their sum.
template <class Index>
inline float choose_largest(const float* probabilities, int64_t experts, int64_t top_k, Index* chosen, float* kept) {
    const auto before = [](float a, float b) { return a > b || (a != a && b == b); };
    int64_t held = 0;
    for (int64_t expert = 0; expert < experts; ++expert) {
        const float probability = probabilities[expert];
        if (held == top_k && !before(probability, kept[top_k - 1])) continue;
        int64_t place = held < top_k ? held++ : top_k - 1;
        for (; place > 0 && before(probability, kept[place - 1]); --place) {
            kept[place] = kept[place - 1];
            chosen[place] = chosen[place - 1];
        }
        kept[place] = probability;
        chosen[place] = static_cast<Index>(expert);
    }
    float total = 0.0f;
    for (int64_t k = 0; k < top_k; ++k) total += kept[k];
    return total;
}

// Puts a token's choices in the order of rising experts.
template <class Index>
inline void sort_by_expert(int64_t top_k, Index* chosen, float* values) {
    for (int64_t i = 1; i < top_k; ++i) {
        const Index expert = chosen[i];
        const float value = values[i];
        int64_t place = i;
        for (; place > 0 && chosen[place - 1] > expert; --place) {
            chosen[place] = chosen[place - 1];
            values[place] = values[place - 1];
        }
        chosen[place] = expert;
        values[place] = value;
    }
}

// logits (experts,) -> chosen and weights (top_k,); `probabilities` (experts,) is scratch. Returns the sum of the chosen
// probabilities, the token's part of the load-balance loss.
template <class Index>
inline float route_token(const float* logits, int64_t experts, int64_t top_k, bool by_index, float* probabilities,
                         Index* chosen, float* weights) {
    softmax(logits, experts, probabilities);
    const float total = choose_largest(probabilities, experts, top_k, chosen, weights);
    for (int64_t k = 0; k < top_k; ++k) weights[k] = weights[k] / (total + 1e-9f);
    if (by_index) sort_by_expert(top_k, chosen, weights);
    return total;
}

}  // namespace rxt::RXT_INSTRUCTION_SET
