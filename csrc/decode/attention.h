// Self-attention over the cache and the memory read (specification 2.4, 2.5). Keys and values stand in panels, as weights do; a few rows
// of queries go through scores, weights and sums together while their scores are in the nearest cache.
#pragma once

#include "decode/key_value.h"
#include "decode/rotation.h"
#include "matmul/pairs.h"

namespace rxt::RXT_INSTRUCTION_SET {

template <int number>
struct Count {
    static constexpr int value = number;
};

// exp(s / sqrt(dim)) = 2^(s log2(e) / sqrt(dim)): with this factor, scores are exponents of two.
inline float exponent_of_two(int64_t dim) { return 1.44269504f / __builtin_sqrtf(static_cast<float>(dim)); }

// Where the processor multiplies pairs of bfloat16, queries of a cache of them are rounded and scaled after their products; otherwise
// they are scaled before.
template <class Stored>
constexpr bool in_pairs = RXT_HAS_BFLOAT16_DOT && sizeof(Stored) == sizeof(BFloat16);
template <bool rounded>
struct QueryElement {
    using Type = float;
};
template <>
struct QueryElement<true> {
    using Type = BFloat16;
};

template <class Stored>
inline auto* query_of(const Workspace& work, int64_t token, int64_t head, int64_t dim) {
    using Element = typename QueryElement<in_pairs<Stored>>::Type;
    const int64_t size = sizeof(Element) == sizeof(float) ? dim : dim + dim % 2;
    return reinterpret_cast<Element*>(work.queries + token * work.attention_width) + head * size;
}

inline void set_query(float* query, int64_t d, int64_t dim, float x) { query[d] = x * exponent_of_two(dim); }
inline void set_query(BFloat16* query, int64_t d, int64_t dim, float x) {
    query[d] = to_bfloat16(x);
    if (d == dim - 1 && dim % 2 != 0) query[dim] = BFloat16{0};
}

// Queries, keys and values of one projection where they belong: queries rotated and scaled in scratch, keys rotated and values in the
// cache, gates in scratch. With `cache` null there are no keys and values: the memory has its own.
template <class Stored>
inline void place_heads(const Step& step, const Attention& attention, const KeyValue* cache, const Sums& sums) {
    const Workspace& work = step.work;
    const int64_t dim = attention.head_dim, own = cache != nullptr ? attention.key_value_heads * dim : 0;
    const int64_t ends[] = {attention.query_heads * dim, attention.query_heads * dim + own,
                            attention.query_heads * dim + 2 * own, attention.input.outputs};
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
                rotate(step, t, values, from, to - from, dim, [&](int64_t head, int64_t d, float x) {
                    set_query(query_of<Stored>(work, t, head, dim), d, dim, x);
                });
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

// Rows of queries that meet a head's keys and values together, and chains of partial sums over the tokens: with one, the multipliers
// would wait for each other. Both are constants, so that a row's bits do not depend on what else is computed.
#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable || RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2
constexpr int attention_rows = 3, attention_chains = 2;
#else
constexpr int attention_rows = 6, attention_chains = 4;
#endif
static_assert(attention_rows <= most_attention_rows, "there is room for their scores");

// Scores of some rows and all tokens of `panels` panels of keys.
template <int rows, class Stored>
inline void score_tokens(const float* const* queries, const HeadOfCache<Stored>& cached, int64_t dim, int64_t panels,
                         float* const* scores) {
    constexpr int beside = detail::panels_beside(rows), width = inputs_per_step<Stored>;
    const auto tile = [&](int64_t panel, auto count) __attribute__((always_inline)) {
        constexpr int own = decltype(count)::value;
        Float sum[rows][own][vectors_per_panel];
        RXT_UNROLL
        for (int r = 0; r < rows; ++r)
            RXT_UNROLL
            for (int p = 0; p < own; ++p)
                RXT_UNROLL
                for (int v = 0; v < vectors_per_panel; ++v) sum[r][p][v] = zero();
        const Stored* keys = cached.keys + panel * cached.key_panel;
        const auto step = [&](int64_t d, int present) __attribute__((always_inline)) {
            detail::add_step<rows, own, Stored>(
                [&](int r, int i) __attribute__((always_inline)) { return queries[r][d + i]; },
                [&](int p) __attribute__((always_inline)) { return keys + p * cached.key_panel + d * panel_width; }, present,
                sum);
        };
        int64_t d = 0;
        for (; d + width <= dim; d += width) step(d, width);
        if (d < dim) step(d, 1);
        RXT_UNROLL
        for (int r = 0; r < rows; ++r)
            RXT_UNROLL
            for (int p = 0; p < own; ++p)
                RXT_UNROLL
                for (int v = 0; v < vectors_per_panel; ++v)
                    store(scores[r] + (panel + p) * panel_width + v * Float::lanes, sum[r][p][v]);
    };
    int64_t panel = 0;
    for (; panel + beside <= panels; panel += beside) tile(panel, Count<beside>());
    for (; panel < panels; ++panel) tile(panel, Count<1>());
}

// The first `own` scores become weights, the others up to `count` zeros; returns 1 / the sum of the weights.
inline float weigh_tokens(float* scores, int64_t own, int64_t count) {
    const int64_t whole = own / Float::lanes * Float::lanes;
    Float top = broadcast(scores[0]);
    for (int64_t i = 0; i < whole; i += Float::lanes) top = maximum(top, load(scores + i));
    float highest = largest(top);
    for (int64_t i = whole; i < own; ++i) highest = scores[i] > highest ? scores[i] : highest;
    const Float shift = broadcast(highest);
    Float total = zero();
    for (int64_t i = 0; i < whole; i += Float::lanes) {
        const Float weight = exp2_of_negative(load(scores + i) - shift);
        store(scores + i, weight);
        total = total + weight;
    }
    if (whole < own) {
        const int rest = static_cast<int>(own - whole);
        store_part(scores + whole, exp2_of_negative(load_part(scores + whole, rest) - shift), rest);
        total = total + load_part(scores + whole, rest);
    }
    for (int64_t i = own; i < count; ++i) scores[i] = 0.0f;
    return 1.0f / sum(total);
}

// Sums of one panel of values over `tokens` tokens, weighted, for some rows: out[row] is panel_width values.
template <int rows, class Stored>
inline void mix_values(const float* const* weights, const Stored* values, int64_t tokens, float (*out)[panel_width]) {
    constexpr int width = inputs_per_step<Stored>, step = attention_chains > width ? attention_chains : width;
    Float sum[attention_chains][rows][vectors_per_panel];
    RXT_UNROLL
    for (int c = 0; c < attention_chains; ++c)
        RXT_UNROLL
        for (int r = 0; r < rows; ++r)
            RXT_UNROLL
            for (int v = 0; v < vectors_per_panel; ++v) sum[c][r][v] = zero();
    const auto add = [&](int64_t t, int64_t present) __attribute__((always_inline)) {
        RXT_UNROLL
        for (int first = 0; first < step; first += width) {
            if (first >= present) break;
            Float value[width][vectors_per_panel];
            load_step(values + (t + first) * panel_width, value);
            RXT_UNROLL
            for (int i = 0; i < width; ++i) {
                if (first + i >= present) break;
                RXT_UNROLL
                for (int r = 0; r < rows; ++r)
                    RXT_UNROLL
                    for (int v = 0; v < vectors_per_panel; ++v) {
                        Float& own = sum[(first + i) % attention_chains][r][v];
                        own = multiply_add(broadcast(weights[r][t + first + i]), value[i][v], own);
                    }
            }
        }
    };
    int64_t t = 0;
    for (; t + step <= tokens; t += step) add(t, step);
    if (t < tokens) add(t, tokens - t);
    RXT_UNROLL
    for (int r = 0; r < rows; ++r)
        RXT_UNROLL
        for (int v = 0; v < vectors_per_panel; ++v) {
            Float total = sum[0][r][v];
            RXT_UNROLL
            for (int c = 1; c < attention_chains; ++c) total = total + sum[c][r][v];
            store(out[r] + v * Float::lanes, total);
        }
}

#if RXT_HAS_BFLOAT16_DOT

// As score_tokens, for queries that are rounded to pairs of bfloat16; the rows of scores are `stride` apart.
template <int rows>
inline void score_tokens(const BFloat16* const* queries, const HeadOfCache<BFloat16>& cached, int64_t dim, int64_t panels,
                         float* scores, int64_t stride) {
    constexpr int beside = detail::panels_beside(rows);
    int64_t panel = 0;
    const auto tiles = [&](auto count) {
        constexpr int own = decltype(count)::value;
        for (; panel + own <= panels; panel += own) {
            detail::pairs_tile<rows, own>(queries, 2, cached.keys + panel * cached.key_panel, cached.key_panel, dim,
                                          {scores + panel * panel_width, stride, panel_width});
        }
    };
    tiles(Count<beside>());
    tiles(Count<1>());
}

// As weigh_tokens, for scores of whole panels that are still to be scaled. Weights, in pairs, take the place of the scores.
inline float weigh_tokens(float* scores, int64_t own, int64_t panels, float scale, Pair* weights) {
    static_assert(panel_width == Float::lanes, "a panel's scores are one register");
    for (int64_t i = own; i < panels * panel_width; ++i) scores[i] = -__builtin_inff();
    Float top = load(scores);
    for (int64_t p = 1; p < panels; ++p) top = maximum(top, load(scores + p * panel_width));
    const Float factor = broadcast(scale), shift = broadcast(-largest(top) * scale);
    Float total = zero();
    for (int64_t p = 0; p < panels; p += 2) {
        const auto weight = [&](int64_t panel) {
            if (panel == panels) return zero();
            return exp2_of_negative<true>(multiply_add(load(scores + panel * panel_width), factor, shift));
        };
        const Float low = weight(p), high = weight(p + 1);
        store_pairs(weights + p / 2 * panel_width, low, high);
        total = total + (low + high);
    }
    return 1.0f / sum(total);
}

// As mix_values, for weights in pairs.
template <int rows>
inline void mix_values(const Pair* const* weights, const BFloat16* values, int64_t tokens, float (*out)[panel_width]) {
    Float sum[attention_chains][rows];
    RXT_UNROLL
    for (int c = 0; c < attention_chains; ++c)
        RXT_UNROLL
        for (int r = 0; r < rows; ++r) sum[c][r] = zero();
    const int64_t whole = tokens / 2;
    int64_t t = 0;
    const auto add = [&](int64_t step, int chain, Pairs value) __attribute__((always_inline)) {
        RXT_UNROLL
        for (int r = 0; r < rows; ++r) sum[chain][r] = multiply_add(broadcast(weights[r][step]), value, sum[chain][r]);
    };
    for (; t + attention_chains <= whole; t += attention_chains) {
        RXT_UNROLL
        for (int c = 0; c < attention_chains; ++c) add(t + c, c, load_pairs(values + 2 * (t + c) * panel_width));
    }
    for (; t < whole; ++t) add(t, 0, load_pairs(values + 2 * t * panel_width));
    if (tokens % 2 != 0) add(whole, 0, first_of_pairs(load_pairs(values + 2 * whole * panel_width)));
    RXT_UNROLL
    for (int r = 0; r < rows; ++r) {
        Float total = sum[0][r];
        RXT_UNROLL
        for (int c = 1; c < attention_chains; ++c) total = total + sum[c][r];
        store(out[r], total);
    }
}

#endif

// Rows [row, row + rows) of the task: a row is a token and one of the queries that share a key.
template <int rows, class Stored, class Seen>
__attribute__((noinline)) void attend_rows(const Step& step, const Attention& attention, const HeadOfCache<Stored>& cached,
                                           int64_t head, int64_t first, int64_t row, Seen seen, float* scores) {
    const Workspace& work = step.work;
    const int64_t dim = attention.head_dim, group = attention.queries_per_key();
    const int64_t most = seen(first + (row + rows - 1) / group), panels = panel_count(most), padded = panels * panel_width;
    const auto token = [&](int r) { return first + (row + r) / group; };
    const auto query = [&](int r) {
        return query_of<Stored>(work, token(r), attention.query_head(head, (row + r) % group), dim);
    };
    decltype(query(0)) queries[rows];
    RXT_UNROLL
    for (int r = 0; r < rows; ++r) queries[r] = query(r);
    float inverse[rows];
    const auto write = [&](const auto& mix) __attribute__((always_inline)) {
        for (int64_t panel = 0; panel < panel_count(dim); ++panel) {
            const int64_t from = panel * panel_width, width = dim - from < panel_width ? dim - from : panel_width;
            alignas(64) float mixed[rows][panel_width];
            mix(cached.values + panel * cached.value_panel, mixed);
            RXT_UNROLL
            for (int r = 0; r < rows; ++r) {
                const int64_t place = token(r) * work.attention_width + (head * group + (row + r) % group) * dim + from;
                for (int64_t i = 0; i < width; i += Float::lanes) {
                    Float result = load(mixed[r] + i) * broadcast(inverse[r]);
                    if (attention.gated)
                        result = result * activated(step.model->gate_activation, load_up_to(work.gates + place + i, width - i));
                    store_up_to(work.heads + place + i, result, width - i);
                }
            }
        }
    };
#if RXT_HAS_BFLOAT16_DOT
    if constexpr (in_pairs<Stored>) {
        const Pair* weights[rows];
        score_tokens<rows>(queries, cached, dim, panels, scores, padded);
        RXT_UNROLL
        for (int r = 0; r < rows; ++r) {
            auto* own = reinterpret_cast<Pair*>(scores + r * padded);
            inverse[r] = weigh_tokens(scores + r * padded, seen(token(r)), panels, exponent_of_two(dim), own);
            weights[r] = own;
        }
        return write([&](const Stored* values, float (*mixed)[panel_width]) { mix_values<rows>(weights, values, most, mixed); });
    } else
#endif
    {
        float* weights[rows];
        RXT_UNROLL
        for (int r = 0; r < rows; ++r) weights[r] = scores + r * padded;
        score_tokens<rows>(queries, cached, dim, panels, weights);
        RXT_UNROLL
        for (int r = 0; r < rows; ++r) inverse[r] = weigh_tokens(weights[r], seen(token(r)), most);
        write([&](const Stored* values, float (*mixed)[panel_width]) { mix_values<rows>(weights, values, most, mixed); });
    }
}

// Chooses the template for a number of rows that is known at run time.
template <int rows, class Stored, class Seen>
inline void attend_up_to(int64_t count, const Step& step, const Attention& attention, const HeadOfCache<Stored>& cached,
                         int64_t head, int64_t first, int64_t row, Seen seen, float* scores) {
    if constexpr (rows > 1) {
        if (count < rows)
            return attend_up_to<rows - 1>(count, step, attention, cached, head, first, row, seen, scores);
    }
    attend_rows<rows>(step, attention, cached, head, first, row, seen, scores);
}

// Tokens [first, first + count) against one key/value head. seen(t) is how many of its keys token t sees: rising with t.
template <class Stored, class Seen>
inline void attend(const Step& step, const Attention& attention, const HeadOfCache<Stored>& cached, int64_t head, int64_t first,
                   int64_t count, Seen seen, float* scores) {
    const int64_t rows = count * attention.queries_per_key();
    for (int64_t row = 0; row < rows; row += attention_rows)
        attend_up_to<attention_rows>(rows - row, step, attention, cached, head, first, row, seen, scores);
}

// Tokens of one task: no more than keep all threads busy.
inline int64_t tokens_of_task(const Step& step, const Attention& attention, int64_t tokens, int64_t segments) {
    const int64_t wanted = (step.threads + segments * attention.key_value_heads - 1) / (segments * attention.key_value_heads);
    const int64_t even = (tokens + wanted - 1) / wanted;
    return even < 1 ? 1 : even;
}

// Tasks are dealt out by turns, since those of later tokens are longer.
template <class Stored>
inline void attend_to_cache(const Step& step, const Team& team, const Attention& attention, const KeyValue& cache) {
    float* scores = step.work.thread + team.thread * step.work.thread_size;
    int64_t task = 0;
    for (int64_t s = 0; s < step.segment_count; ++s) {
        const int64_t first = step.segments[s], last = step.segments[s + 1], row = step.rows[first];
        const int64_t block = tokens_of_task(step, attention, last - first, step.segment_count);
        for (int64_t t = first; t < last; t += block)
            for (int64_t head = 0; head < cache.heads; ++head)
                if (task++ % team.threads == team.thread)
                    attend(step, attention, HeadOfCache<Stored>(cache, row, head), head, t, last - t < block ? last - t : block,
                           [&](int64_t i) { return step.positions[step.model->causal ? i : last - 1] + 1; }, scores);
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
        const int64_t block = tokens_of_task(step, attention, last - first, segments);
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
    const Rows rows = rows_for(attention.input, step.work, team, normed, width, step.count);
    // By turns, at least two each: keys and values, which stand behind the queries, have a longer way to their places.
    const int64_t panels = attention.input.panels();
    int64_t turn = stream_panels;
    while (turn > 1 && panels < 2 * turn * team.threads) turn /= 2;
    for (int64_t first = team.thread * turn; first < panels; first += team.threads * turn)
        project(attention.input, {first, panels - first < turn ? panels : first + turn}, step.count, rows, in_order,
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
