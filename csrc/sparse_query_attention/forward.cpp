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

struct Packed {
    int64_t padded_keys, padded_width;
    float* keys;    // (batch, key_heads, padded_keys / panel, head_dim, panel)
    float* values;  // (batch, key_heads, padded_keys, padded_width)

    Packed(const AttentionForward& a, float* scratch)
        : padded_keys(round_up(a.key_time, panel)),
          padded_width(round_up(a.head_dim, Float::lanes)),
          keys(scratch),
          values(scratch + a.batch * a.key_heads * padded_keys * padded_width) {}

    const float* keys_of_head(const AttentionForward& a, int64_t group) const { return keys + group * padded_keys * a.head_dim; }
    const float* values_of_head(int64_t group) const { return values + group * padded_keys * padded_width; }
};

// One panel of keys, rotated, and the values beside them. Hidden ones become 0, so that whatever they are does no harm.
template <class Element>
void pack(const AttentionForward& a, const Packed& packed, int64_t group, int64_t first) {
    const int64_t batch = group / a.key_heads, head = group % a.key_heads, width = a.head_dim;
    const int64_t left = keys_of(a, batch) - first, count = left < panel ? left : panel;
    if (count <= 0) return;
    float* keys = packed.keys + group * packed.padded_keys * width + first * width;
    float* values = packed.values + (group * packed.padded_keys + first) * packed.padded_width;
    const bool* mask = a.key_mask != nullptr ? a.key_mask + batch * a.key_mask_stride + first : nullptr;
    if (a.key_rotary.cosine == nullptr) {
        pack_panel(head_at<Element>(a.key, a.key_strides, batch, first, head), a.key_strides.time, count, width, keys);
    } else {
        alignas(64) float rotated[panel * attention_largest_head];
        for (int64_t i = 0; i < count; ++i) {
            read_head(head_at<Element>(a.key, a.key_strides, batch, first + i, head), width, rotated + i * width);
            rotate(a.key_rotary, batch, first + i, a.split, width, rotated + i * width);
        }
        pack_panel(rotated, width, count, width, keys);
    }
    for (int64_t i = 0; i < panel; ++i) {
        float* row = values + i * packed.padded_width;
        const bool visible = i < count && (mask == nullptr || mask[i]);
        const int64_t read = visible ? width : 0;
        if (visible) read_head(head_at<Element>(a.value, a.value_strides, batch, first + i, head), width, row);
        for (int64_t j = read; j < packed.padded_width; ++j) row[j] = 0.0f;
        if (i < count && !visible) {
            for (int64_t j = 0; j < width; ++j) keys[j * panel + i] = 0.0f;
        }
    }
}

// -infinity where a key of this block is hidden by the mask.
void hide_masked(const bool* mask, int64_t count, float* scores) {
    for (int64_t column = 0; column < count; ++column) {
        if (mask[column]) continue;
        for (int row = 0; row < tile_rows; ++row) scores[row * key_block + column] = no_score;
    }
}

// The sum over this block of keys begins at 0 and is then added to that of the blocks before it: short sums round less.
template <int Vectors>
void add_values(int64_t count, const float* weights, const float* values, int64_t width, const float* factors, float* mixed) {
    Tile<tile_rows, Vectors> tile;
    tile.clear();
    tile.template multiply<key_block, 1>(count, weights, values, width);
    for (int row = 0; row < tile_rows; ++row) {
        const Float factor = broadcast(factors[row]);
        for (int v = 0; v < Vectors; ++v) {
            float* target = mixed + row * width + v * Float::lanes;
            store(target, multiply_add(load(target), factor, tile.sums[row][v]));
        }
    }
}

// A block of queries of one head.
template <class Element>
void attend(const AttentionForward& a, const Packed& packed, int64_t batch, int64_t head, int64_t first_time) {
    const int64_t width = a.head_dim, padded_width = packed.padded_width;
    const int64_t times = a.query_time - first_time < block_rows ? a.query_time - first_time : block_rows;
    const int64_t keys = keys_of(a, batch), group = batch * a.key_heads + head / heads_per_key(a);
    const float* packed_keys = packed.keys_of_head(a, group);
    const float* packed_values = packed.values_of_head(group);
    const bool* mask = a.key_mask != nullptr ? a.key_mask + batch * a.key_mask_stride : nullptr;

    alignas(64) float queries[block_rows * attention_largest_head];
    alignas(64) float mixed[block_rows * attention_largest_head];
    alignas(64) float scores[tile_rows * key_block];
    float largest_score[block_rows], total[block_rows];
    const int64_t rows = round_up(times, tile_rows);
    for (int64_t row = 0; row < rows; ++row) {
        float query[attention_largest_head] = {};
        if (row < times) read_query<Element>(a, batch, first_time + row, head, a.scale * log2_of_e, query);
        put_in_tile<tile_rows>(query, row, width, queries);
    }
    for (int64_t i = 0; i < rows * padded_width; ++i) mixed[i] = 0.0f;
    for (int64_t row = 0; row < rows; ++row) largest_score[row] = no_score, total[row] = 0.0f;

    const auto seen = [&](int64_t row) { return seen_by(a, first_time + (row < times ? row : times - 1), keys); };
    for (int64_t start = 0; start < seen(rows - 1); start += key_block) {
        for (int64_t first = 0; first < rows; first += tile_rows) {
            const int64_t left = seen(first + tile_rows - 1) - start, count = left < key_block ? left : key_block;
            if (count <= 0) continue;
            const int64_t columns = round_up(count, panel);
            for (int64_t column = 0; column < columns; column += panel) {
                score_panel<tile_rows>(width, queries + first * width, packed_keys + (start + column) * width, scores + column,
                                       key_block);
            }
            if (mask != nullptr) hide_masked(mask + start, count, scores);
            float factors[tile_rows];
            for (int row = 0; row < tile_rows; ++row) {
                hide_from(scores + row * key_block, seen(first + row) - start, columns);
                factors[row] = weigh(scores + row * key_block, columns / Float::lanes, largest_score[first + row],
                                     total[first + row]);
            }
            for (int64_t i = 0; i < padded_width; i += tile_vectors * Float::lanes) {
                const float* values = packed_values + start * padded_width + i;
                float* target = mixed + first * padded_width + i;
                if (padded_width - i >= tile_vectors * Float::lanes) {
                    add_values<tile_vectors>(count, scores, values, padded_width, factors, target);
                } else {
                    add_values<1>(count, scores, values, padded_width, factors, target);
                }
            }
        }
    }
    for (int64_t row = 0; row < times; ++row) {
        write_result<Element>(a, batch, first_time + row, head, largest_score[row], total[row], mixed + row * padded_width);
    }
}

template <class Element>
void forward(const AttentionForward& a, float* scratch) {
    const Packed packed(a, scratch);
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

}  // namespace
}  // namespace attention

int64_t attention_forward_scratch(const AttentionForward& a) {
    using attention::round_up;
    if (attention_is_short(a)) return attention::short_scratch(a);
    return 2 * a.batch * a.key_heads * round_up(a.key_time, attention::panel) * round_up(a.head_dim, Float::lanes);
}

void attention_forward(const AttentionForward& a, float* scratch) {
    if (attention_is_short(a)) return attention::short_forward(a, scratch);
    a.dtype == DType::float32 ? attention::forward<float>(a, scratch) : attention::forward<BFloat16>(a, scratch);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
