// The blocks of rows and classes that both passes go through, and the logits of one block: there are never more of them at a time
// than a group of blocks has.
#pragma once

#include "core/parallel.h"
#include "linear_cross_entropy/kernels.h"
#include "matmul/kernels.h"
#include "matmul/multiply.h"

namespace rxt::RXT_INSTRUCTION_SET::cross_entropy {

// Rows of a block, and classes of one: whole tiles of the product, and little enough for its operands to stay in a cache.
constexpr int64_t block_size = 96;
static_assert(block_size % tile_rows == 0 && block_size % (tile_panels * panel_width) == 0);

// Blocks of classes whose weights are packed at a time.
constexpr int64_t group_blocks = 20;

static inline int64_t block_count(int64_t count) { return (count + block_size - 1) / block_size; }
static inline int64_t block_part(int64_t first, int64_t count) {
    return count - first < block_size ? count - first : block_size;
}
static inline int64_t whole_panels(int64_t count) { return panel_count(count) * panel_width; }

// Hands out parts of scratch memory; without memory it counts what would be needed.
class Parts {
public:
    explicit Parts(float* scratch) : scratch_(scratch) {}

    float* take(int64_t count) {
        float* part = scratch_ != nullptr ? scratch_ + floats_ : nullptr;
        floats_ += (count + 15) / 16 * 16;
        return part;
    }

    int64_t floats() const { return floats_; }

private:
    float* scratch_;
    int64_t floats_ = 0;
};

// The rows that count, one after the other in fp32.
template <class Element>
inline void gather_rows(const LinearCrossEntropy& a, float* x) {
    parallel_for(a.rows, 1.0 * a.rows * a.dim, [&](int64_t row) {
        const Element* from = static_cast<const Element*>(a.hidden) + a.places[row] * a.hidden_stride;
        for (int64_t i = 0; i < a.dim; i += Float::lanes)
            store_up_to(x + row * a.dim + i, load_up_to(from + i, a.dim - i), a.dim - i);
    });
}

// Neighbouring blocks of classes.
struct Group {
    int64_t first_class, blocks;

    int64_t block_class(int64_t block) const { return first_class + block * block_size; }
};

// Calls task(const Group&) for all classes.
template <class Task>
inline void for_groups(int64_t classes, Task&& task) {
    constexpr int64_t step = group_blocks * block_size;
    for (int64_t first = 0; first < classes; first += step) {
        const int64_t left = block_count(classes - first);
        task(Group{first, left < group_blocks ? left : group_blocks});
    }
}

// The weights of a group, packed for its logits, and the biases beside them. Blocks are whole panels wide: the bias of what is no
// class is minus infinity, so that it takes no part in any sum.
struct GroupWeights {
    float* panels;  // (group_blocks, block_size, dim)
    float* bias;    // (group_blocks, block_size)
    int64_t dim;

    GroupWeights(const LinearCrossEntropy& a, Parts& parts)
        : panels(parts.take(group_blocks * block_size * a.dim)), bias(parts.take(group_blocks * block_size)), dim(a.dim) {}

    Panels<float> of_block(int64_t block, int64_t columns) const {
        return {panels + block * block_size * dim, nullptr, columns, dim};
    }

    template <class Element>
    void pack_block(const LinearCrossEntropy& a, const Group& group, int64_t block) const {
        const int64_t first = group.block_class(block), count = block_part(first, a.classes);
        const auto* source = static_cast<const Element*>(a.weight) + first * a.class_stride;
        pack({a.dtype, DType::float32, count, dim, source, a.class_stride, a.input_stride,
              panels + block * block_size * dim, nullptr});
        float* target = bias + block * block_size;
        const auto* own = static_cast<const Element*>(a.bias);
        for (int64_t c = 0; c < block_size; ++c) {
            target[c] = c >= count ? -__builtin_inff() : own == nullptr ? 0.0f : to_float(own[first + c]);
        }
    }
};

// logits[r * block_size + c] for `rows` rows from x on and the classes of a block, in whole panels.
inline void block_logits(const float* x, int64_t rows, const GroupWeights& weights, int64_t block, int64_t columns,
                         float* logits) {
    const float* bias = weights.bias + block * block_size;
    multiply(rows_at([&](int64_t row) { return x + row * weights.dim; }), 0, rows, weights.of_block(block, columns), 0,
             panel_count(columns), [&](const Tile& tile) {
                 for (int r = 0; r < tile.rows; ++r) {
                     float* target = logits + (tile.first_row + r) * block_size + tile.first_output;
                     for (int i = 0; i < tile.outputs; i += Float::lanes)
                         store(target + i, load(tile.row(r) + i) + load(bias + tile.first_output + i));
                 }
             });
}

}  // namespace rxt::RXT_INSTRUCTION_SET::cross_entropy
