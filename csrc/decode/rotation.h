// Rotary positions (specification 2.2), and where rotated queries and keys go.
#pragma once

#include <math.h>

#include "decode/projections.h"

namespace rxt::RXT_INSTRUCTION_SET {

inline float as_bfloat16(float x) { return to_float(to_bfloat16(x)); }

// Sines and cosines of all tokens; each thread makes some.
inline void prepare_angles(const Step& step, const Team& team) {
    const Model& model = *step.model;
    if (model.inverse_frequencies == nullptr) return;
    const Range tokens = team.share(step.count);
    for (int64_t t = tokens.first; t < tokens.last; ++t)
        for (int64_t j = 0; j < model.rotary_pairs; ++j) {
            float angle = static_cast<float>(step.positions[t]) * model.inverse_frequencies[j];
            if (model.rounds_angles) angle = as_bfloat16(angle);
            const float cosine = cosf(angle), sine = sinf(angle);
            step.work.cosines[t * model.rotary_pairs + j] = model.rounds_angles ? as_bfloat16(cosine) : cosine;
            step.work.sines[t * model.rotary_pairs + j] = model.rounds_angles ? as_bfloat16(sine) : sine;
        }
}

// place(head, d, value) for outputs [first, first + count) of heads of head_dim that begin at output 0, rotated at token `t`.
template <class Place>
inline void rotate(const Step& step, int64_t t, const float* values, int64_t first, int64_t count, int64_t head_dim,
                   Place place) {
    const Model& model = *step.model;
    const bool rotates = model.inverse_frequencies != nullptr;
    const float* cosines = step.work.cosines + t * model.rotary_pairs;
    const float* sines = step.work.sines + t * model.rotary_pairs;
    for (int64_t done = 0; done < count;) {
        const int64_t head = (first + done) / head_dim, d = (first + done) % head_dim;
        const int64_t left = head_dim - d, run = left < count - done ? left : count - done;
        const float* x = values + done;
        if (rotates) {
            for (int64_t i = 0; i < run; i += 2) {
                const int64_t pair = (d + i) / 2;
                const float cosine = cosines[pair], sine = sines[pair];
                place(head, model.splits_pairs ? pair : 2 * pair, x[i] * cosine - x[i + 1] * sine);
                place(head, model.splits_pairs ? pair + head_dim / 2 : 2 * pair + 1, x[i] * sine + x[i + 1] * cosine);
            }
        } else {
            for (int64_t i = 0; i < run; ++i) place(head, d + i, x[i]);
        }
        done += run;
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
