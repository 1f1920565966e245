// Every block of logits leaves the largest one of a row and the sum of exponentials below it; these are merged group by group,
// always in the order of the classes:
//
//     loss = (largest - logit of the target) + log(sum over classes of exp(logit - largest))
#include "linear_cross_entropy/blocks.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace cross_entropy {

namespace {

constexpr float infinity = __builtin_inff();

struct Workspace {
    const LinearCrossEntropy& a;
    Parts parts;
    int64_t row_blocks, padded_rows;
    float* x;  // (rows, dim)
    GroupWeights weights;
    float* block_largest;  // (group_blocks, padded_rows)
    float* block_sums;
    float* largest;  // (padded_rows,), over all classes that were seen
    float* sums;
    float* picked;  // the logit of the target

    Workspace(const LinearCrossEntropyForward& forward, float* scratch)
        : a(forward.of), parts(scratch), row_blocks(block_count(a.rows)), padded_rows(row_blocks * block_size),
          x(parts.take(a.rows * a.dim)), weights(a, parts), block_largest(parts.take(group_blocks * padded_rows)),
          block_sums(parts.take(group_blocks * padded_rows)), largest(parts.take(padded_rows)),
          sums(parts.take(padded_rows)), picked(parts.take(padded_rows)) {}
};

void reduce_block(const Workspace& w, const Group& group, int64_t block, int64_t row_block) {
    const int64_t first_class = group.block_class(block), first_row = row_block * block_size;
    const int64_t count = block_part(first_class, w.a.classes), columns = whole_panels(count);
    const int64_t rows = block_part(first_row, w.a.rows);
    alignas(64) float logits[block_size * block_size];
    block_logits(w.x + first_row * w.a.dim, rows, w.weights, block, columns, logits);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first_row + r;
        const float* own = logits + r * block_size;
        Float highest = load(own);
        for (int64_t c = Float::lanes; c < columns; c += Float::lanes) highest = maximum(highest, load(own + c));
        const float top = largest(highest);
        const Float base = broadcast(top == -infinity ? 0.0f : top);
        Float total = zero();
        for (int64_t c = 0; c < columns; c += Float::lanes) total = total + exp(load(own + c) - base);
        w.block_largest[block * w.padded_rows + row] = top;
        w.block_sums[block * w.padded_rows + row] = sum(total);
        const int64_t wanted = w.a.target[w.a.places[row]] - first_class;
        if (wanted >= 0 && wanted < count) w.picked[row] = own[wanted];
    }
}

// Adds a group to what is known of some rows, which lie along the lanes.
void merge(const Workspace& w, int64_t blocks, int64_t row_block) {
    for (int64_t row = row_block * block_size; row < (row_block + 1) * block_size; row += Float::lanes) {
        const Float before = load(w.largest + row);
        Float top = before;
        for (int64_t block = 0; block < blocks; ++block)
            top = maximum(top, load(w.block_largest + block * w.padded_rows + row));
        const Float base = where_less(broadcast(-infinity), top, top, zero());
        Float total = load(w.sums + row) * exp(before - base);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t at = block * w.padded_rows + row;
            total = multiply_add(load(w.block_sums + at), exp(load(w.block_largest + at) - base), total);
        }
        store(w.largest + row, top);
        store(w.sums + row, total);
    }
}

template <class Element>
void forward(const LinearCrossEntropyForward& f, float* scratch) {
    const Workspace w(f, scratch);
    const LinearCrossEntropy& a = f.of;
    gather_rows<Element>(a, w.x);
    for (int64_t row = 0; row < w.padded_rows; ++row) {
        w.largest[row] = -infinity;
        w.sums[row] = 0.0f;
    }
    for_groups(a.classes, [&](const Group& group) {
        const double logits = 1.0 * a.rows * group.blocks * block_size;
        parallel_for(group.blocks, 1.0 * group.blocks * block_size * a.dim,
                     [&](int64_t block) { w.weights.pack_block<Element>(a, group, block); });
        parallel_for(group.blocks * w.row_blocks, 2.0 * logits * a.dim, [&](int64_t index) {
            reduce_block(w, group, index / w.row_blocks, index % w.row_blocks);
        });
        parallel_for(w.row_blocks, logits, [&](int64_t row_block) { merge(w, group.blocks, row_block); });
    });
    for (int64_t place = 0; place < a.all_rows; ++place) f.losses[place] = 0.0f;
    for (int64_t i = 0; f.softmax_sums != nullptr && i < 2 * a.all_rows; ++i) f.softmax_sums[i] = 0.0f;
    double total = 0.0;
    for (int64_t row = 0; row < a.rows; ++row) {
        const int64_t place = a.places[row];
        const float top = w.largest[row], logarithm = __builtin_logf(w.sums[row]);
        f.losses[place] = (top - w.picked[row]) + logarithm;
        total += f.losses[place];
        if (f.softmax_sums == nullptr) continue;
        f.softmax_sums[place] = top;
        f.softmax_sums[a.all_rows + place] = logarithm;
    }
    if (f.total != nullptr) *f.total = static_cast<float>(f.mean && a.rows > 0 ? total / a.rows : total);
}

}  // namespace

}  // namespace cross_entropy

int64_t linear_cross_entropy_forward_scratch(const LinearCrossEntropyForward& f) {
    return cross_entropy::Workspace(f, nullptr).parts.floats();
}

void linear_cross_entropy_forward(const LinearCrossEntropyForward& f, float* scratch) {
    f.of.dtype == DType::float32 ? cross_entropy::forward<float>(f, scratch)
                                 : cross_entropy::forward<BFloat16>(f, scratch);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
