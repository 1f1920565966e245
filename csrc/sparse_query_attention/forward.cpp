// The forward pass for many queries: keys and values of every head are packed once, then blocks of queries run over them with
// a running maximum.
#include "core/parallel.h"
#include "sparse_query_attention/kernels.h"
#include "sparse_query_attention/packing.h"
#include "sparse_query_attention/short.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace attention {
namespace {

constexpr int64_t block_rows = 48;  // queries that share a key block while it is in the first-level cache
constexpr int64_t key_block = 192;
static_assert(block_rows % tile_rows == 0 && key_block % panel == 0);

// Keys and values of all heads; an Operand is a value in fp32 or a pair of bfloat16.
template <class Operand>
struct Packed {
    int64_t padded_keys, padded_width, width_steps, key_steps;
    Operand* keys;    // (batch, key_heads, padded_keys / panel, width_steps, panel)
    Operand* values;  // (batch, key_heads, key_steps, padded_width)

    Packed(const AttentionForward& a, float* scratch)
        : padded_keys(round_up(a.key_time, panel)),
          padded_width(round_up(a.head_dim, Float::lanes)),
          width_steps(steps_of<Operand>(a.head_dim)),
          key_steps(steps_of<Operand>(padded_keys)),
          keys(reinterpret_cast<Operand*>(scratch)),
          values(keys + a.batch * a.key_heads * padded_keys * padded_width) {}

    // Of the panel, or the pair, that key `first` begins.
    Operand* keys_at(int64_t group, int64_t first) const { return keys + (group * padded_keys + first) * width_steps; }
    Operand* values_at(int64_t group, int64_t first) const {
        return values + (group * key_steps + first / values_per_step<Operand>) * padded_width;
    }
};

inline void write_values(const float* rows, int64_t width, float* target) {
    for (int64_t i = 0; i < panel * width; ++i) target[i] = rows[i];
}

#if RXT_HAS_BFLOAT16_DOT
inline void write_values(const float* rows, int64_t width, Pair* target) {
    for (int64_t i = 0; i < panel; i += 2) {
        for (int64_t j = 0; j < width; ++j) {
            target[i / 2 * width + j] = pair_of(to_bfloat16(rows[i * width + j]), to_bfloat16(rows[(i + 1) * width + j]));
        }
    }
}
#endif

// One panel of keys, rotated, and the values beside them. Hidden ones become 0, so that whatever they are does no harm.
template <class Element, class Operand>
void pack(const AttentionForward& a, const Packed<Operand>& packed, int64_t group, int64_t first) {
    const int64_t batch = group / a.key_heads, head = group % a.key_heads, width = a.head_dim;
    const int64_t left = keys_of(a, batch) - first, count = left < panel ? left : panel;
    if (count <= 0) return;
    const bool* mask = a.key_mask != nullptr ? a.key_mask + batch * a.key_mask_stride + first : nullptr;
    const auto visible = [&](int64_t i) { return i < count && (mask == nullptr || mask[i]); };
    alignas(64) float rows[panel * attention_largest_head];
    if (a.key_rotary.cosine == nullptr && mask == nullptr) {
        pack_panel(head_at<Element>(a.key, a.key_strides, batch, first, head), a.key_strides.time, count, width,
                   packed.keys_at(group, first));
    } else {
        for (int64_t i = 0; i < count; ++i) {
            float* key = rows + i * width;
            if (!visible(i)) {
                for (int64_t j = 0; j < width; ++j) key[j] = 0.0f;
                continue;
            }
            read_head(head_at<Element>(a.key, a.key_strides, batch, first + i, head), width, key);
            if (a.key_rotary.cosine != nullptr) rotate(a.key_rotary, batch, first + i, a.split, width, key);
        }
        pack_panel(rows, width, count, width, packed.keys_at(group, first));
    }
    for (int64_t i = 0; i < panel; ++i) {
        float* row = rows + i * packed.padded_width;
        const int64_t read = visible(i) ? width : 0;
        if (read > 0) read_head(head_at<Element>(a.value, a.value_strides, batch, first + i, head), width, row);
        for (int64_t j = read; j < packed.padded_width; ++j) row[j] = 0.0f;
    }
    write_values(rows, packed.padded_width, packed.values_at(group, first));
}

// -infinity where a key of this block is hidden by the mask.
void hide_masked(const bool* mask, int64_t count, float* scores) {
    for (int64_t column = 0; column < count; ++column) {
        if (mask[column]) continue;
        for (int row = 0; row < tile_rows; ++row) scores[row * key_block + column] = no_score;
    }
}

// The sum over this block of keys begins at 0 and is then added to that of the blocks before it: short sums round less.
template <int Vectors, class Operand>
void add_values(int64_t count, const Operand* weights, const Operand* values, int64_t width, const float* factors, float* mixed) {
    Tile<tile_rows, Vectors> tile;
    tile.clear();
    tile.template multiply<key_block / values_per_step<Operand>, 1>(steps_of<Operand>(count), weights, values, width);
    for (int row = 0; row < tile_rows; ++row) {
        const Float factor = broadcast(factors[row]);
        for (int v = 0; v < Vectors; ++v) {
            float* target = mixed + row * width + v * Float::lanes;
            store(target, multiply_add(load(target), factor, tile.sums[row][v]));
        }
    }
}

// How scores become weights. In fp32 they are exponents of 2 as they come, since queries are scaled, and weights take their place.
template <class Operand>
struct Weighing {
    explicit Weighing(float scale) : query_scale(scale * log2_of_e) {}

    const float* weights() const { return scores; }
    float weigh_row(int row, int64_t columns, RunningSoftmax& softmax) {
        return weigh(scores + row * key_block, columns / Float::lanes, softmax);
    }

    float query_scale;
    alignas(64) float scores[tile_rows * key_block];
};

#if RXT_HAS_BFLOAT16_DOT
// Queries are rounded, so they are not scaled before, but have the sign of the scale.
template <>
struct Weighing<Pair> {
    explicit Weighing(float scale) : query_scale(scale > 0.0f ? 1.0f : scale < 0.0f ? -1.0f : scale) {
        score_scale = scale == 0.0f ? 1.0f : (scale < 0.0f ? -scale : scale) * log2_of_e;
    }

    const Pair* weights() const { return pairs; }
    float weigh_row(int row, int64_t columns, RunningSoftmax& softmax) {
        return weigh(scores + row * key_block, score_scale, columns / Float::lanes, softmax, pairs + row * key_block / 2);
    }

    float query_scale, score_scale;
    alignas(64) float scores[tile_rows * key_block];
    alignas(64) Pair pairs[tile_rows * key_block / 2];
};
#endif

// A block of queries of one head.
template <class Element, class Operand>
void attend(const AttentionForward& a, const Packed<Operand>& packed, int64_t batch, int64_t head, int64_t first_time) {
    const int64_t width = a.head_dim, padded_width = packed.padded_width;
    const int64_t times = a.query_time - first_time < block_rows ? a.query_time - first_time : block_rows;
    const int64_t keys = keys_of(a, batch), group = batch * a.key_heads + head / heads_per_key(a);
    const bool* mask = a.key_mask != nullptr ? a.key_mask + batch * a.key_mask_stride : nullptr;

    Weighing<Operand> weighing(a.scale);
    alignas(64) Operand queries[block_rows * attention_largest_head];
    alignas(64) float mixed[block_rows * attention_largest_head];
    RunningSoftmax softmax[block_rows];
    const int64_t rows = round_up(times, tile_rows);
    for (int64_t row = 0; row < rows; ++row) {
        float query[attention_largest_head + 1] = {};
        if (row < times) read_query<Element>(a, batch, first_time + row, head, weighing.query_scale, query);
        put_in_tile<tile_rows>(query, row, width, queries);
    }
    for (int64_t i = 0; i < rows * padded_width; ++i) mixed[i] = 0.0f;

    const auto seen = [&](int64_t row) { return seen_by(a, first_time + (row < times ? row : times - 1), keys); };
    for (int64_t start = 0; start < seen(rows - 1); start += key_block) {
        for (int64_t first = 0; first < rows; first += tile_rows) {
            const int64_t left = seen(first + tile_rows - 1) - start, count = left < key_block ? left : key_block;
            if (count <= 0) continue;
            const int64_t columns = round_up(count, panel);
            for (int64_t column = 0; column < columns; column += panel) {
                score_panel<tile_rows>(packed.width_steps, queries + first * packed.width_steps,
                                       packed.keys_at(group, start + column), weighing.scores + column, key_block);
            }
            if (mask != nullptr) hide_masked(mask + start, count, weighing.scores);
            float factors[tile_rows];
            for (int row = 0; row < tile_rows; ++row) {
                hide_from(weighing.scores + row * key_block, seen(first + row) - start, columns);
                factors[row] = weighing.weigh_row(row, columns, softmax[first + row]);
            }
            const Operand* values = packed.values_at(group, start);
            float* target = mixed + first * padded_width;
            for (int64_t i = 0; i < padded_width; i += tile_vectors * Float::lanes) {
                if (padded_width - i >= tile_vectors * Float::lanes) {
                    add_values<tile_vectors>(count, weighing.weights(), values + i, padded_width, factors, target + i);
                } else {
                    add_values<1>(count, weighing.weights(), values + i, padded_width, factors, target + i);
                }
            }
        }
    }
    for (int64_t row = 0; row < times; ++row) {
        write_result<Element>(a, batch, first_time + row, head, softmax[row].largest_score, softmax[row].total,
                              mixed + row * padded_width);
    }
}

template <class Element, class Operand>
void forward(const AttentionForward& a, float* scratch) {
    const Packed<Operand> packed(a, scratch);
    const int64_t groups = a.batch * a.key_heads, panels = packed.padded_keys / panel;
    parallel_for(groups * panels, 8.0 * groups * a.key_time * a.head_dim, [&](int64_t task) {
        pack<Element>(a, packed, task / panels, task % panels * panel);
    });
    const int64_t blocks = (a.query_time + block_rows - 1) / block_rows, heads = head_count(a);
    const double work = 4.0 * a.batch * heads * a.query_time * a.key_time * (a.head_dim + 8);
    // Later blocks of a causal pass are longer, and begin first.
    parallel_for_uneven(a.batch * heads * blocks, work, [&](int64_t task) {
        const int64_t block = blocks - 1 - task / (a.batch * heads), row = task % (a.batch * heads);
        attend<Element>(a, packed, row / heads, row % heads, block * block_rows);
    });
}

#if RXT_HAS_BFLOAT16_DOT
using Rounded = Pair;
#else
using Rounded = float;
#endif

}  // namespace
}  // namespace attention

int64_t attention_forward_scratch(const AttentionForward& a) {
    using attention::round_up;
    if (attention_is_short(a)) return attention::short_scratch(a);
    return 2 * a.batch * a.key_heads * round_up(a.key_time, attention::panel) * round_up(a.head_dim, Float::lanes);
}

void attention_forward(const AttentionForward& a, float* scratch) {
    if (attention_is_short(a)) return attention::short_forward(a, scratch);
    if (a.dtype == DType::bfloat16) return attention::forward<BFloat16, attention::Rounded>(a, scratch);
    a.rounded ? attention::forward<float, attention::Rounded>(a, scratch) : attention::forward<float, float>(a, scratch);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
