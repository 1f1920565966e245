// Self-attention over the cache and the memory read (specification 2.4, 2.5): scores and sums are products with packed panels,
// exactly as those of weights.
#pragma once

#include "decode/key_value.h"
#include "decode/rotation.h"

namespace rxt::RXT_INSTRUCTION_SET {

// Queries, keys and values of one projection where they belong: queries rotated and scaled in scratch, keys rotated and values in the
// cache, gates in scratch. With `cache` null there are no keys and values: the memory has its own.
template <class Stored>
inline void place_heads(const Step& step, const Attention& attention, const KeyValue* cache, const Sums& sums) {
    const Workspace& work = step.work;
    const int64_t dim = attention.head_dim, own = cache != nullptr ? attention.key_value_heads * dim : 0;
    const int64_t ends[] = {attention.query_heads * dim, attention.query_heads * dim + own,
                            attention.query_heads * dim + 2 * own, attention.input.outputs};
    // exp(s / sqrt(dim)) = 2^(s log2(e) / sqrt(dim)): the scores come out of the product as exponents of two.
    const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(dim));
    const int64_t first = sums.first_output(), last_of_sums = first + sums.panels * panel_width;
    int64_t begin = 0;
    for (int part = 0; part < 4; begin = ends[part++]) {
        const int64_t from = first > begin ? first : begin;
        const int64_t to = last_of_sums < ends[part] ? last_of_sums : ends[part];
        if (from >= to) continue;
        for (int r = 0; r < sums.rows; ++r) {
            const int64_t t = sums.first_row + r;
            const float* values = sums.row(r) + from - first;
            if (part == 0) {
                float* queries = work.queries + t * work.attention_width;
                rotate(step, t, values, from, to - from, dim,
                       [&](int64_t head, int64_t d, float x) { queries[head * dim + d] = x * scale; });
            } else if (part == 1) {
                rotate(step, t, values, from - begin, to - from, dim, [&](int64_t head, int64_t d, float x) {
                    HeadOfCache<Stored>(*cache, step.rows[t], head).set_key(step.positions[t], d, x);
                });
            } else if (part == 2) {
                for (int64_t i = 0; i < to - from; ++i) {
                    const int64_t o = from - begin + i;
                    HeadOfCache<Stored>(*cache, step.rows[t], o / dim).set_value(step.positions[t], o % dim, values[i]);
                }
            } else {
                float* gates = work.gates + t * work.attention_width + from - begin;
                for (int64_t i = 0; i < to - from; ++i) gates[i] = values[i];
            }
        }
    }
}

// Tokens [first, first + count) against one key/value head. seen(t) is how many of its keys token t sees: rising with t.
template <class Stored, class Seen>
inline void attend(const Step& step, const Attention& attention, const HeadOfCache<Stored>& cached, int64_t head, int64_t first,
                   int64_t count, Seen seen, float* scores) {
    const Workspace& work = step.work;
    const int64_t dim = attention.head_dim, group = attention.queries_per_key(), rows = count * group;
    const int64_t most = seen(first + count - 1), padded = panel_count(most) * panel_width;
    const Panels<Stored> keys{cached.keys, nullptr, most, dim};
    const auto query = [&](int64_t row) {
        return work.queries + (first + row / group) * work.attention_width + attention.query_head(head, row % group) * dim;
    };
    stream(rows, query, keys, 0, keys.count(), [&](const Sums& sums) {
        for (int r = 0; r < sums.rows; ++r) {
            float* target = scores + (sums.first_row + r) * padded + sums.first_output();
            for (int i = 0; i < sums.panels * panel_width; i += Float::lanes) store(target + i, load(sums.row(r) + i));
        }
    });
    float* inverse = scores + rows * padded;  // 1 / the sum of a row's weights
    for (int64_t row = 0; row < rows; ++row) {
        float* weights = scores + row * padded;
        const int64_t own = seen(first + row / group);
        const int64_t whole = own / Float::lanes * Float::lanes;
        const int rest = static_cast<int>(own - whole);
        for (int64_t i = own; i < padded; ++i) weights[i] = -__builtin_inff();  // 2^-inf = 0: as if they were not there
        Float top = broadcast(weights[0]);
        for (int64_t i = 0; i < whole; i += Float::lanes) top = maximum(top, load(weights + i));
        float highest = largest(top);
        for (int64_t i = whole; i < own; ++i) highest = weights[i] > highest ? weights[i] : highest;
        Float total = zero();
        const int64_t end = rest > 0 ? whole + Float::lanes : whole;
        for (int64_t i = 0; i < end; i += Float::lanes) {
            const Float weight = exp2(load(weights + i) - broadcast(highest));
            store(weights + i, weight);
            total = total + weight;
        }
        for (int64_t i = end; i < padded; ++i) weights[i] = 0.0f;
        inverse[row] = 1.0f / sum(total);
    }
    for (int64_t panel = 0; panel < panel_count(dim); ++panel) {
        const int64_t from = panel * panel_width, width = dim - from < panel_width ? dim - from : panel_width;
        const Panels<Stored> values{cached.values + panel * cached.value_panel, nullptr, width, most};
        stream(rows, [&](int64_t row) { return scores + row * padded; }, values, 0, 1, [&](const Sums& sums) {
            for (int r = 0; r < sums.rows; ++r) {
                const int64_t row = sums.first_row + r, t = first + row / group;
                const int64_t place = t * work.attention_width + (head * group + row % group) * dim + from;
                const Float scale = broadcast(inverse[row]);
                for (int64_t i = 0; i < width; i += Float::lanes) {
                    Float mixed = load(sums.row(r) + i) * scale;
                    if (attention.gated)
                        mixed = mixed * activated(step.model->gate_activation, load_up_to(work.gates + place + i, width - i));
                    store_up_to(work.heads + place + i, mixed, width - i);
                }
            }
        });
    }
}

// Tokens of one task: as many as their scores have room for, and no more than keep all threads busy.
inline int64_t tokens_of_task(const Step& step, const Attention& attention, int64_t tokens, int64_t keys, int64_t segments) {
    const int64_t group = attention.queries_per_key(), padded = panel_count(keys) * panel_width;
    const int64_t room = step.work.score_size / (group * (padded + 1));
    const int64_t wanted = (step.threads + segments * attention.key_value_heads - 1) / (segments * attention.key_value_heads);
    const int64_t even = (tokens + wanted - 1) / wanted;
    const int64_t most = even < room ? even : room;
    return most < 1 ? 1 : most;
}

// Tasks are dealt out by turns, since those of later tokens are longer.
template <class Stored>
inline void attend_to_cache(const Step& step, const Team& team, const Attention& attention, const KeyValue& cache) {
    float* scores = step.work.thread + team.thread * step.work.thread_size;
    int64_t task = 0;
    for (int64_t s = 0; s < step.segment_count; ++s) {
        const int64_t first = step.segments[s], last = step.segments[s + 1], row = step.rows[first];
        const int64_t block =
            tokens_of_task(step, attention, last - first, step.positions[last - 1] + 1, step.segment_count);
        for (int64_t t = first; t < last; t += block)
            for (int64_t head = 0; head < cache.heads; ++head)
                if (task++ % team.threads == team.thread)
                    attend(step, attention, HeadOfCache<Stored>(cache, row, head), head, t, last - t < block ? last - t : block,
                           [&](int64_t i) { return step.positions[i] + 1; }, scores);
    }
}

template <class Stored>
inline void attend_to_memory(const Step& step, const Team& team, const Attention& attention, const KeyValue& memory) {
    float* scores = step.work.thread + team.thread * step.work.thread_size;
    const bool shared = step.memory_rows == 1;
    const int64_t segments = shared ? 1 : step.segment_count;
    int64_t task = 0;
    for (int64_t s = 0; s < segments; ++s) {
        const int64_t first = shared ? 0 : step.segments[s], last = shared ? step.count : step.segments[s + 1];
        const int64_t block = tokens_of_task(step, attention, last - first, step.slots, segments);
        for (int64_t t = first; t < last; t += block)
            for (int64_t head = 0; head < memory.heads; ++head)
                if (task++ % team.threads == team.thread)
                    attend(step, attention, HeadOfCache<Stored>(memory, shared ? 0 : step.rows[first], head), head, t,
                           last - t < block ? last - t : block, [&](int64_t) { return step.slots; }, scores);
    }
}

// The whole attention of a layer, added to the residual stream. `cache` is null for the memory read.
template <class Stored>
inline void attention_stage(const Step& step, const Team& team, const Attention& attention, const KeyValue* cache,
                            const KeyValue* memory) {
    const int64_t width = step.model->width;
    const float* normed = normed_rows(step, team, attention.norm);
    project(attention.input, team.share(attention.input.panels()), step.count,
            [&](int64_t t) { return normed + t * width; },
            [&](const Sums& sums) { place_heads<Stored>(step, attention, cache, sums); });
    team.wait();
    if (cache != nullptr) {
        attend_to_cache<Stored>(step, team, attention, *cache);
    } else {
        attend_to_memory<Stored>(step, team, attention, *memory);
    }
    team.wait();
    add_output(step, team, attention.output);
    team.wait();
}

}  // namespace rxt::RXT_INSTRUCTION_SET
