// The forward pass for few queries, a decode step above all. Keys and values are read where they lie, once for all queries that
// read them. Keys are cut into parts of a fixed length, so that a long memory keeps all threads busy and the result does not
// depend on how many there are; the parts of a head are then joined in their order.
#include "sparse_query_attention/short.h"

#include "core/parallel.h"
#include "sparse_query_attention/packing.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace attention {
namespace {

constexpr int64_t part_keys = 256;
constexpr int64_t most_rows = 24;  // queries of all heads that read one key/value head
static_assert(part_keys % panel == 0 && most_rows % tile_rows == 0);

int64_t rows_of(const AttentionForward& a) { return heads_per_key(a) * a.query_time; }
int64_t parts_of(const AttentionForward& a) { return a.key_time > part_keys ? (a.key_time + part_keys - 1) / part_keys : 1; }
int64_t part_floats(const AttentionForward& a) { return round_up(rows_of(a) * (a.head_dim + 2), 16); }

// What a part leaves behind: sums of weighted values, and of each row the largest score and the sum of weights.
struct Part {
    float* mixed;  // (rows, head_dim)
    float* largest_score;
    float* total;

    Part(const AttentionForward& a, float* scratch, int64_t index)
        : mixed(scratch + index * part_floats(a)),
          largest_score(mixed + rows_of(a) * a.head_dim),
          total(largest_score + rows_of(a)) {}
};

// With few sums, several keys in turn have their own, since a sum must wait for its last step.
template <int Rows, int Vectors, class Element>
void mix_values(int64_t count, const float* weights, const Element* values, int64_t stride, float* mixed, int64_t width) {
    constexpr int turns = Rows * Vectors >= 8 ? 1 : Rows * Vectors >= 4 ? 2 : 4;
    Tile<Rows, Vectors> tiles[turns];
    for (int turn = 0; turn < turns; ++turn) tiles[turn].clear();
    int64_t key = 0;
    for (; key + turns <= count; key += turns) {
#pragma GCC unroll 4
        for (int turn = 0; turn < turns; ++turn) {
            tiles[turn].template multiply<part_keys, 1>(1, weights + key + turn, values + (key + turn) * stride, stride);
        }
    }
    tiles[0].template multiply<part_keys, 1>(count - key, weights + key, values + key * stride, stride);
    for (int turn = 1; turn < turns; ++turn) {
        for (int row = 0; row < Rows; ++row) {
            for (int v = 0; v < Vectors; ++v) tiles[0].sums[row][v] = tiles[0].sums[row][v] + tiles[turn].sums[row][v];
        }
    }
    tiles[0].write(mixed, width);
}

template <int Rows, class Element>
void attend(const AttentionForward& a, float* scratch, int64_t task) {
    const int64_t parts = parts_of(a), group = task / parts, start = task % parts * part_keys;
    const int64_t batch = group / a.key_heads, key_head = group % a.key_heads;
    const int64_t rows = rows_of(a), padded_rows = round_up(rows, Rows), width = a.head_dim, keys = keys_of(a, batch);
    const Part part(a, scratch, task);

    alignas(64) float queries[most_rows * attention_largest_head];
    alignas(64) float key_panel[panel * attention_largest_head];
    alignas(64) float scores[most_rows * part_keys];
    int64_t seen[most_rows], count = 0;
    for (int64_t row = 0; row < padded_rows; ++row) {
        float query[attention_largest_head] = {};
        seen[row] = 0;
        if (row < rows) {
            const int64_t time = row % a.query_time, left = seen_by(a, time, keys) - start;
            const int64_t head = key_head * heads_per_key(a) + row / a.query_time;
            read_query<Element>(a, batch, time, head, a.scale * log2_of_e, query);
            seen[row] = left < part_keys ? (left > 0 ? left : 0) : part_keys;
            if (seen[row] > count) count = seen[row];
        }
        put_in_tile<Rows>(query, row, width, queries);
    }
    const Element* key = head_at<Element>(a.key, a.key_strides, batch, start, key_head);
    for (int64_t column = 0; column < count; column += panel) {
        pack_panel(key + column * a.key_strides.time, a.key_strides.time, count - column < panel ? count - column : panel, width,
                   key_panel);
        for (int64_t row = 0; row < padded_rows; row += Rows) {
            score_panel<Rows>(width, queries + row * width, key_panel, scores + row * part_keys + column, part_keys);
        }
    }
    const int64_t columns = round_up(count, panel);
    for (int64_t row = 0; row < rows; ++row) {
        hide_from(scores + row * part_keys, seen[row], columns);
        RunningSoftmax of_part;
        weigh(scores + row * part_keys, columns / Float::lanes, of_part);
        part.largest_score[row] = of_part.largest_score, part.total[row] = of_part.total;
    }
    const Element* value = head_at<Element>(a.value, a.value_strides, batch, start, key_head);
    alignas(64) float mixed[tile_rows * attention_largest_head];
    for (int64_t row = 0; row < rows; row += Rows) {
        int64_t i = 0;
        for (; i + tile_vectors * Float::lanes <= width; i += tile_vectors * Float::lanes) {
            mix_values<Rows, tile_vectors>(count, scores + row * part_keys, value + i, a.value_strides.time, mixed + i, width);
        }
        if (i < width) {
            mix_values<Rows, 1>(count, scores + row * part_keys, value + i, a.value_strides.time, mixed + i, width);
        }
        const int64_t own = rows - row < Rows ? rows - row : Rows;
        for (int64_t j = 0; j < own * width; ++j) part.mixed[row * width + j] = mixed[j];
    }
}

template <class Element>
void attend_with_rows(const AttentionForward& a, float* scratch, int64_t task) {
    switch (rows_of(a)) {
        case 1: return attend<1, Element>(a, scratch, task);
        case 2: return attend<2, Element>(a, scratch, task);
        case 3: return attend<3, Element>(a, scratch, task);
        case 4: return attend<4, Element>(a, scratch, task);
        default: return attend<tile_rows, Element>(a, scratch, task);
    }
}

template <class Element>
void join(const AttentionForward& a, float* scratch, int64_t group) {
    const int64_t parts = parts_of(a), width = a.head_dim;
    for (int64_t row = 0; row < rows_of(a); ++row) {
        float largest_score = no_score, total = 0.0f;
        for (int64_t i = 0; i < parts; ++i) {
            const float score = Part(a, scratch, group * parts + i).largest_score[row];
            if (!(score <= largest_score)) largest_score = score;
        }
        alignas(64) float mixed[attention_largest_head] = {};
        for (int64_t i = 0; i < parts; ++i) {
            const Part part(a, scratch, group * parts + i);
            if (part.total[row] == 0.0f) continue;  // it saw no key
            const float factor = exp2_of_negative(part.largest_score[row] - largest_score);
            total += factor * part.total[row];
            for (int64_t j = 0; j < width; ++j) mixed[j] += factor * part.mixed[row * width + j];
        }
        write_result<Element>(a, group / a.key_heads, row % a.query_time,
                              group % a.key_heads * heads_per_key(a) + row / a.query_time, largest_score, total, mixed);
    }
}

}  // namespace

int64_t short_scratch(const AttentionForward& a) { return attention_part_count(a) * part_floats(a); }

void short_forward(const AttentionForward& a, float* scratch) {
    const int64_t tasks = attention_part_count(a), groups = a.batch * a.key_heads;
    const double work = 4.0 * tasks * rows_of(a) * part_keys * (a.head_dim + 8);
    parallel_for(tasks, work, [&](int64_t task) { attention_parts(a, scratch, task, task + 1); });
    parallel_for(groups, 4.0 * tasks * rows_of(a) * a.head_dim, [&](int64_t group) {
        attention_join(a, scratch, group, group + 1);
    });
}

}  // namespace attention

bool attention_is_short(const AttentionForward& a) {
    return a.key_mask == nullptr && a.key_rotary.cosine == nullptr && a.head_dim % Float::lanes == 0 &&
           attention::rows_of(a) <= attention::most_rows;
}

int64_t attention_part_count(const AttentionForward& a) { return a.batch * a.key_heads * attention::parts_of(a); }

void attention_parts(const AttentionForward& a, float* scratch, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
        a.dtype == DType::float32 ? attention::attend_with_rows<float>(a, scratch, task)
                                  : attention::attend_with_rows<BFloat16>(a, scratch, task);
    }
}

void attention_join(const AttentionForward& a, float* scratch, int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
        a.dtype == DType::float32 ? attention::join<float>(a, scratch, group) : attention::join<BFloat16>(a, scratch, group);
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
