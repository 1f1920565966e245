// The backward pass. With p = 2^(score - largest), and g the gradient of the output divided by the sum of these,
//
//     dv = sum_queries p g        ds = p (g . v - g . out)        dq = scale sum_keys ds k        dk = scale sum_queries ds q
//
// are computed block by block: nothing of the size of queries times keys is kept. A task owns some keys of one key/value head and
// all queries of the heads that read them, so it finishes dk and dv by itself; its share of dq goes to a place of its own, and the
// shares are added in their order.
#include "core/parallel.h"
#include "sparse_query_attention/kernels.h"
#include "sparse_query_attention/packing.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace attention {
namespace {

constexpr int64_t key_block = tile_rows * Float::lanes;
constexpr int64_t row_block = 4 * tile_rows;
constexpr int64_t enough_tasks = 16;
static_assert(key_block % panel == 0);

// Everything that is laid out anew, for all heads at once.
struct Workspace {
    const AttentionForward& a;
    int64_t heads, width, padded_width, padded_keys, padded_time, chunks, chunk_keys;
    float* keys;            // (batch, key_heads, padded_keys, padded_width): rotated
    float* key_panels;      // (batch, key_heads, padded_keys / panel, head_dim, panel)
    float* value_panels;    // the same
    float* queries;         // (batch, heads, padded_time, padded_width): rotated
    float* query_tiles;     // (batch, heads, padded_time / tile_rows, head_dim, tile_rows): rotated and scaled
    float* gradients;       // of the output, over the sums of weights, as queries
    float* gradient_tiles;  // as query_tiles, not scaled
    float* largest_scores;  // (batch, heads, padded_time); infinity for queries that see nothing, so that all weighs 0
    float* products;        // g . out, as largest_scores
    float* query_shares;    // (chunks, batch, heads, padded_time, padded_width)
    int64_t floats;

    Workspace(const AttentionForward& arguments, float* scratch) : a(arguments), heads(head_count(a)), width(a.head_dim) {
        padded_width = round_up(width, Float::lanes);
        padded_time = round_up(a.query_time, row_block);
        // How keys are shared out depends on the shape alone, so results do not depend on the number of threads.
        const int64_t blocks = (a.key_time + key_block - 1) / key_block, groups = a.batch * a.key_heads;
        const int64_t wanted = groups > 0 ? (enough_tasks + groups - 1) / groups : 1;
        const int64_t chunk_blocks = blocks > wanted ? (blocks + wanted - 1) / wanted : 1;
        chunk_keys = chunk_blocks * key_block;
        chunks = blocks > 0 ? (blocks + chunk_blocks - 1) / chunk_blocks : 1;
        padded_keys = chunks * chunk_keys;
        floats = 0;
        const int64_t key_rows = groups * padded_keys, query_rows = a.batch * heads * padded_time;
        const auto take = [&](int64_t count) {
            float* place = scratch != nullptr ? scratch + floats : nullptr;
            floats += round_up(count, 16);
            return place;
        };
        keys = take(key_rows * padded_width);
        key_panels = take(key_rows * width);
        value_panels = take(key_rows * width);
        queries = take(query_rows * padded_width);
        query_tiles = take(query_rows * width);
        gradients = take(query_rows * padded_width);
        gradient_tiles = take(query_rows * width);
        largest_scores = take(query_rows);
        products = take(query_rows);
        query_shares = take(chunks * query_rows * padded_width);
    }
};

// A panel of keys and values. Hidden ones become 0, so that whatever they are does no harm.
template <class Element>
void pack_keys(const Workspace& w, int64_t group, int64_t first) {
    const AttentionForward& a = w.a;
    const int64_t batch = group / a.key_heads, head = group % a.key_heads;
    const int64_t left = keys_of(a, batch) - first, count = left < panel ? left : panel;
    if (count <= 0) return;
    const bool* mask = a.key_mask != nullptr ? a.key_mask + batch * a.key_mask_stride + first : nullptr;
    float* keys = w.keys + (group * w.padded_keys + first) * w.padded_width;
    alignas(64) float values[panel * attention_largest_head];
    for (int64_t i = 0; i < panel; ++i) {
        float* key = keys + i * w.padded_width;
        float* value = values + i * w.padded_width;
        for (int64_t j = 0; j < w.padded_width; ++j) key[j] = value[j] = 0.0f;
        if (i >= count || (mask != nullptr && !mask[i])) continue;
        read_head(head_at<Element>(a.key, a.key_strides, batch, first + i, head), w.width, key);
        read_head(head_at<Element>(a.value, a.value_strides, batch, first + i, head), w.width, value);
        if (a.key_rotary.cosine != nullptr) rotate(a.key_rotary, batch, first + i, a.split, w.width, key);
        if (rounds_heads(a)) round_head(w.width, key);
    }
    const int64_t place = (group * w.padded_keys + first) * w.width;
    pack_panel(keys, w.padded_width, panel, w.width, w.key_panels + place);
    pack_panel(values, w.padded_width, panel, w.width, w.value_panels + place);
}

// A tile of queries and of the gradients of their outputs; `row` counts (batch, heads).
template <class Element>
void pack_rows(const AttentionBackward& b, const Workspace& w, int64_t row, int64_t first) {
    const AttentionForward& a = w.a;
    const int64_t batch = row / w.heads, head = row % w.heads;
    for (int64_t time = first; time < first + tile_rows; ++time) {
        const int64_t place = row * w.padded_time + time;
        float* query = w.queries + place * w.padded_width;
        float* gradient = w.gradients + place * w.padded_width;
        for (int64_t j = 0; j < w.padded_width; ++j) query[j] = gradient[j] = 0.0f;
        float product = 0.0f, largest_score = __builtin_inff(), scaled[attention_largest_head] = {};
        const float* sums = a.softmax_sums + row * a.query_time + time;
        const float total = time < a.query_time ? sums[a.batch * w.heads * a.query_time] : 0.0f;
        if (time < a.query_time && total != 0.0f) {
            read_query<Element>(a, batch, time, head, 1.0f, query);
            if (rounds_heads(a)) round_head(w.width, query);
            for (int64_t j = 0; j < w.width; ++j) scaled[j] = query[j] * (a.scale * log2_of_e);
            float out[attention_largest_head];
            read_head(head_at<Element>(b.out_gradient, b.out_gradient_strides, batch, time, head), w.width, gradient);
            for (int64_t j = 0; j < w.width; ++j) gradient[j] *= 1.0f / total;
            read_head(head_at<Element>(a.out, a.out_strides, batch, time, head), w.width, out);
            product = dot(w.width, gradient, out);
            largest_score = sums[0];
        }
        const int64_t tiles = row * w.padded_time * w.width;
        put_in_tile<tile_rows>(scaled, time, w.width, w.query_tiles + tiles);
        put_in_tile<tile_rows>(gradient, time, w.width, w.gradient_tiles + tiles);
        w.largest_scores[place] = largest_score;
        w.products[place] = product;
    }
}

// target (rows, width) += left x right for all columns, by tiles of `tile_rows` rows.
template <int RowStride, int StepStride>
void add_product(int64_t steps, const float* left, const float* right, int64_t width, float* target) {
    int64_t i = 0;
    for (; i + tile_vectors * Float::lanes <= width; i += tile_vectors * Float::lanes) {
        Tile<tile_rows, tile_vectors> tile;
        tile.clear();
        tile.template multiply<RowStride, StepStride>(steps, left, right + i, width);
        tile.add_to(target + i, width);
    }
    if (i < width) {
        Tile<tile_rows, 1> tile;
        tile.clear();
        tile.template multiply<RowStride, StepStride>(steps, left, right + i, width);
        tile.add_to(target + i, width);
    }
}

// Weights and gradients of scores of one block of queries and keys.
struct Block {
    alignas(64) float weights[row_block * key_block];
    alignas(64) float gradients[row_block * key_block];
};

// Columns of a block that are read where `count` keys of it are seen: they go in by panels and come out by tiles.
inline int64_t columns_read(int64_t count) {
    const int64_t columns = round_up(round_up(count, tile_rows), panel);
    return columns < key_block ? columns : key_block;
}

// The tile of rows from `row` on of a block of keys from `start` on, of which `read` columns are read afterwards. `tile` counts
// (batch, heads, padded_time).
template <class Seen>
void fill_tile(const Workspace& w, int64_t tile, int64_t keys_place, int64_t start, int64_t read, const bool* mask,
               const Seen& seen, float* weights, float* gradients) {
    const int64_t count = seen(tile_rows - 1) - start;
    for (int64_t column = 0; column < read; column += panel) {
        if (column >= count) {
            for (int row = 0; row < tile_rows; ++row) {
                for (int v = 0; v < tile_vectors; ++v) {
                    store(weights + row * key_block + column + v * Float::lanes, zero());
                    store(gradients + row * key_block + column + v * Float::lanes, zero());
                }
            }
            continue;
        }
        const int64_t place = (keys_place + start + column) * w.width;
        score_panel<tile_rows>(w.width, w.query_tiles + tile * w.width, w.key_panels + place, weights + column, key_block);
        score_panel<tile_rows>(w.width, w.gradient_tiles + tile * w.width, w.value_panels + place, gradients + column, key_block);
    }
    const int64_t columns = count < key_block ? round_up(count, panel) : key_block;
    if (mask != nullptr) {
        for (int64_t column = 0; column < columns && column < count; ++column) {
            if (mask[start + column]) continue;
            for (int row = 0; row < tile_rows; ++row) weights[row * key_block + column] = no_score;
        }
    }
    for (int row = 0; row < tile_rows; ++row) {
        float* scores = weights + row * key_block;
        float* changes = gradients + row * key_block;
        hide_from(scores, seen(row) - start, columns);
        const Float offset = broadcast(w.largest_scores[tile + row]), product = broadcast(w.products[tile + row]);
        for (int64_t column = 0; column < columns; column += Float::lanes) {
            const Float weight = exp2_of_negative(load(scores + column) - offset);
            store(scores + column, weight);
            store(changes + column, weight * (load(changes + column) - product));
        }
    }
}

template <class Element>
void write_key_gradients(const AttentionBackward& b, const Workspace& w, int64_t group, int64_t start, float* keys, float* values) {
    const AttentionForward& a = w.a;
    const int64_t batch = group / a.key_heads, head = group % a.key_heads;
    for (int64_t i = 0; i < key_block && start + i < a.key_time; ++i) {
        float* key = keys + i * w.padded_width;
        for (int64_t j = 0; j < w.width; ++j) key[j] *= a.scale;
        if (a.key_rotary.cosine != nullptr) unrotate(a.key_rotary, batch, start + i, a.split, w.width, key);
        const int64_t place = ((batch * a.key_time + start + i) * a.key_heads + head) * w.width;
        write_head(static_cast<Element*>(b.key_gradient) + place, w.width, key);
        write_head(static_cast<Element*>(b.value_gradient) + place, w.width, values + i * w.padded_width);
    }
}

// One chunk of keys of one key/value head.
template <class Element>
void differentiate(const AttentionBackward& b, const Workspace& w, int64_t task) {
    const AttentionForward& a = w.a;
    const int64_t group = task / w.chunks, chunk = task % w.chunks, batch = group / a.key_heads;
    const int64_t keys = keys_of(a, batch), keys_place = group * w.padded_keys;
    const int64_t first_head = batch * w.heads + group % a.key_heads * heads_per_key(a);
    const bool* mask = a.key_mask != nullptr ? a.key_mask + batch * a.key_mask_stride : nullptr;
    float* shares = w.query_shares + chunk * a.batch * w.heads * w.padded_time * w.padded_width;
    float* own_shares = shares + first_head * w.padded_time * w.padded_width;
    for (int64_t i = 0; i < heads_per_key(a) * w.padded_time * w.padded_width; ++i) own_shares[i] = 0.0f;

    Block block;
    alignas(64) float key_gradients[key_block * attention_largest_head];
    alignas(64) float value_gradients[key_block * attention_largest_head];
    for (int64_t start = chunk * w.chunk_keys; start < (chunk + 1) * w.chunk_keys && start < a.key_time; start += key_block) {
        for (int64_t i = 0; i < key_block * w.padded_width; ++i) key_gradients[i] = value_gradients[i] = 0.0f;
        for (int64_t row = first_head; row < first_head + heads_per_key(a); ++row) {
            for (int64_t time = 0; time < a.query_time && start < keys; time += row_block) {
                const auto seen = [&](int64_t i) {
                    return seen_by(a, time + i < a.query_time ? time + i : a.query_time - 1, keys);
                };
                // What the last query of the block sees; keys after that get no gradient from it.
                const int64_t visible = seen(row_block - 1) - start, read = columns_read(visible);
                if (visible <= 0) continue;
                const int64_t place = row * w.padded_time + time;
                for (int64_t first = 0; first < row_block; first += tile_rows) {
                    const auto tile_seen = [&](int64_t i) { return seen(first + i); };
                    float* changes = block.gradients + first * key_block;
                    fill_tile(w, place + first, keys_place, start, read, mask, tile_seen, block.weights + first * key_block,
                              changes);
                    const int64_t left = tile_seen(tile_rows - 1) - start, count = left < key_block ? left : key_block;
                    if (count <= 0) continue;
                    add_product<key_block, 1>(count, changes, w.keys + (keys_place + start) * w.padded_width, w.padded_width,
                                              shares + (place + first) * w.padded_width);
                }
                for (int64_t key = 0; key < key_block && key < visible; key += tile_rows) {
                    int64_t first = 0;  // earlier queries see none of these keys
                    while (first < row_block && seen(first + tile_rows - 1) <= start + key) first += tile_rows;
                    const int64_t rows = row_block - first, cell = first * key_block + key;
                    const int64_t values = (place + first) * w.padded_width;
                    add_product<1, key_block>(rows, block.weights + cell, w.gradients + values, w.padded_width,
                                              value_gradients + key * w.padded_width);
                    add_product<1, key_block>(rows, block.gradients + cell, w.queries + values, w.padded_width,
                                              key_gradients + key * w.padded_width);
                }
            }
        }
        write_key_gradients<Element>(b, w, group, start, key_gradients, value_gradients);
    }
}

// The gradient of one query: all shares, of all output heads that it serves.
template <class Element>
void join_query(const AttentionBackward& b, const Workspace& w, int64_t batch, int64_t time, int64_t head) {
    const AttentionForward& a = w.a;
    float sum[attention_largest_head] = {};
    for (int64_t copy = head; copy < w.heads; copy += a.query_heads) {
        for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
            const int64_t row = (chunk * a.batch + batch) * w.heads + copy;
            const float* share = w.query_shares + (row * w.padded_time + time) * w.padded_width;
            for (int64_t i = 0; i < w.width; ++i) sum[i] += share[i];
        }
    }
    for (int64_t i = 0; i < w.width; ++i) sum[i] *= a.scale;
    if (a.query_rotary.cosine != nullptr) unrotate(a.query_rotary, batch, time, a.split, w.width, sum);
    const int64_t place = ((batch * a.query_time + time) * a.query_heads + head) * w.width;
    write_head(static_cast<Element*>(b.query_gradient) + place, w.width, sum);
}

template <class Element>
void backward(const AttentionBackward& b, float* scratch) {
    const AttentionForward& a = b.forward;
    const Workspace w(a, scratch);
    const int64_t groups = a.batch * a.key_heads, panels = w.padded_keys / panel;
    const int64_t rows = a.batch * w.heads, tiles = w.padded_time / tile_rows;
    parallel_for(groups * panels, 8.0 * groups * a.key_time * w.width, [&](int64_t task) {
        pack_keys<Element>(w, task / panels, task % panels * panel);
    });
    parallel_for(rows * tiles, 16.0 * rows * a.query_time * w.width, [&](int64_t task) {
        pack_rows<Element>(b, w, task / tiles, task % tiles * tile_rows);
    });
    parallel_for_uneven(groups * w.chunks, 10.0 * rows * a.query_time * a.key_time * (w.width + 4), [&](int64_t task) {
        differentiate<Element>(b, w, task);
    });
    const int64_t queries = a.batch * a.query_time;
    parallel_for(queries, 2.0 * w.chunks * rows * a.query_time * w.width, [&](int64_t query) {
        for (int64_t head = 0; head < a.query_heads; ++head) {
            join_query<Element>(b, w, query / a.query_time, query % a.query_time, head);
        }
    });
}

}  // namespace
}  // namespace attention

int64_t attention_backward_scratch(const AttentionBackward& b) { return attention::Workspace(b.forward, nullptr).floats; }

void attention_backward(const AttentionBackward& b, float* scratch) {
    b.forward.dtype == DType::float32 ? attention::backward<float>(b, scratch) : attention::backward<BFloat16>(b, scratch);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
