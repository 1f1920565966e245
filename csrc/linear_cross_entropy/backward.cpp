// Blocks of logits are computed again and become their gradient, with f the gradient of a row's loss:
//
//     g = (exp(logit - largest - log_sum) - (1 for the target)) f
//     dweight = sum over rows of g^T hidden      dhidden = sum over classes of g weight       dbias = sum over rows of g
//
// A task owns a block of classes where sums run over rows, and a block of rows where they run over classes. Between both stands the
// gradient of a group of classes for a chunk of rows.
#include "linear_cross_entropy/blocks.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace cross_entropy {

namespace {

// Blocks of rows of a chunk; panels of the hidden gradient that a task computes.
constexpr int64_t chunk_blocks = 10, task_panels = 4;

// What is added to: `target` points to the first row and output of the product, with rows `stride` apart.
struct AddTo {
    float* target;
    int64_t stride;

    void operator()(const Tile& tile) const {
        for (int r = 0; r < tile.rows; ++r) {
            float* row = target + (tile.first_row + r) * stride + tile.first_output;
            for (int i = 0; i < tile.outputs; i += Float::lanes) store(row + i, load(row + i) + load(tile.row(r) + i));
        }
    }
};

struct Workspace {
    const LinearCrossEntropyBackward& b;
    const LinearCrossEntropy& a;
    Parts parts;
    int64_t row_blocks, width;  // the latter dim in whole panels
    float* x;                   // (rows, dim)
    float* x_panels;            // (row_blocks, width, block_size): outputs are inputs of the layer, and the sum runs over rows
    float* x_gradient;          // (rows, width)
    GroupWeights weights;
    float* weight_panels;    // (group_blocks, width, block_size): here the sum runs over classes
    float* weight_gradient;  // (group_blocks, block_size, width)
    float* bias_gradient;    // (group_blocks, block_size)
    float* gradient;         // (group_blocks, chunk_blocks, block_size rows, block_size classes)

    Workspace(const LinearCrossEntropyBackward& backward, float* scratch)
        : b(backward), a(backward.of), parts(scratch), row_blocks(block_count(a.rows)), width(whole_panels(a.dim)),
          x(parts.take(a.rows * a.dim)), x_panels(parts.take(row_blocks * block_size * width)),
          x_gradient(parts.take(a.rows * width)), weights(a, parts),
          weight_panels(parts.take(group_blocks * block_size * width)),
          weight_gradient(parts.take(group_blocks * block_size * width)),
          bias_gradient(parts.take(group_blocks * block_size)),
          gradient(parts.take(most_blocks(a.classes, group_blocks) * most_blocks(a.rows, chunk_blocks) * block_size *
                              block_size)) {}

    float* block_gradient(int64_t block, int64_t chunk_block) const {
        return gradient + (block * most_blocks(a.rows, chunk_blocks) + chunk_block) * block_size * block_size;
    }

private:
    static int64_t most_blocks(int64_t count, int64_t most) {
        const int64_t blocks = block_count(count);
        return blocks < most ? blocks : most;
    }
};

template <class Element>
void pack_block(const Workspace& w, const Group& group, int64_t block) {
    const LinearCrossEntropy& a = w.a;
    w.weights.pack_block<Element>(a, group, block);
    const int64_t first = group.block_class(block), count = block_part(first, a.classes), columns = whole_panels(count);
    float* panels = w.weight_panels + block * block_size * w.width;
    pack({a.dtype, DType::float32, a.dim, count, static_cast<const Element*>(a.weight) + first * a.class_stride,
          a.input_stride, a.class_stride, panels, nullptr});
    float* sums = w.weight_gradient + block * block_size * w.width;
    for (int64_t i = 0; i < columns * w.width; i += Float::lanes) store(sums + i, zero());
    float* bias_sums = w.bias_gradient + block * block_size;
    for (int64_t c = 0; c < columns; c += Float::lanes) store(bias_sums + c, zero());
}

// Logits of a block into their gradient, and its sum over the rows of the block onto that of the bias.
void differentiate(const Workspace& w, int64_t first_class, int64_t first_row, int64_t rows, int64_t columns, float* logits,
                   float* bias_sums) {
    const LinearCrossEntropy& a = w.a;
    Float totals[block_size / Float::lanes];
    for (int64_t c = 0; c < columns; c += Float::lanes) totals[c / Float::lanes] = zero();
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = a.places[first_row + r];
        const Float top = broadcast(w.b.softmax_sums[place]), logarithm = broadcast(w.b.softmax_sums[a.all_rows + place]);
        const float factor = w.b.loss_gradients[place];
        float* own = logits + r * block_size;
        for (int64_t c = 0; c < columns; c += Float::lanes)
            store(own + c, exp(load(own + c) - top - logarithm) * broadcast(factor));
        const int64_t wanted = a.target[place] - first_class;
        if (wanted >= 0 && wanted < columns) own[wanted] -= factor;
        for (int64_t c = 0; c < columns; c += Float::lanes)
            totals[c / Float::lanes] = totals[c / Float::lanes] + load(own + c);
    }
    for (int64_t c = 0; c < columns; c += Float::lanes)
        store(bias_sums + c, load(bias_sums + c) + totals[c / Float::lanes]);
}

// For a block of classes: the gradient of its logits for a chunk of rows, and what it adds to that of its weights.
void class_gradients(const Workspace& w, const Group& group, int64_t block, int64_t first_row_block, int64_t end_row_block) {
    const LinearCrossEntropy& a = w.a;
    const int64_t first_class = group.block_class(block), columns = whole_panels(block_part(first_class, a.classes));
    for (int64_t row_block = first_row_block; row_block < end_row_block; ++row_block) {
        const int64_t first_row = row_block * block_size, rows = block_part(first_row, a.rows);
        float* gradient = w.block_gradient(block, row_block - first_row_block);
        block_logits(w.x + first_row * a.dim, rows, w.weights, block, columns, gradient);
        differentiate(w, first_class, first_row, rows, columns, gradient, w.bias_gradient + block * block_size);
        const Panels<float> x{w.x_panels + row_block * block_size * w.width, nullptr, a.dim, rows};
        multiply(rows_at([&](int64_t c) { return gradient + c; }, block_size), 0, columns, x, 0, x.count(),
                 AddTo{w.weight_gradient + block * block_size * w.width, w.width});
    }
}

// For a block of rows and some panels: what a group of classes adds to the gradient of the rows.
void row_gradients(const Workspace& w, const Group& group, int64_t chunk_block, int64_t row_block, int64_t first_panel,
                   int64_t end_panel) {
    const int64_t first_row = row_block * block_size, rows = block_part(first_row, w.a.rows);
    for (int64_t block = 0; block < group.blocks; ++block) {
        const float* gradient = w.block_gradient(block, chunk_block);
        const Panels<float> weights{w.weight_panels + block * block_size * w.width, nullptr, w.a.dim,
                                    block_part(group.block_class(block), w.a.classes)};
        multiply(rows_at([&](int64_t row) { return gradient + row * block_size; }), 0, rows, weights, first_panel,
                 end_panel, AddTo{w.x_gradient + first_row * w.width, w.width});
    }
}

template <class Element>
void write_row(const float* sums, int64_t width, Element* target) {
    for (int64_t i = 0; i < width; i += Float::lanes) store_up_to(target + i, load(sums + i), width - i);
}

template <class Element>
void write_block(const Workspace& w, const Group& group, int64_t block) {
    const int64_t first = group.block_class(block), count = block_part(first, w.a.classes);
    for (int64_t c = 0; c < count; ++c)
        write_row(w.weight_gradient + (block * block_size + c) * w.width, w.a.dim,
                  static_cast<Element*>(w.b.weight_gradient) + (first + c) * w.a.dim);
    if (w.b.bias_gradient != nullptr)
        write_row(w.bias_gradient + block * block_size, count, static_cast<Element*>(w.b.bias_gradient) + first);
}

template <class Element>
void backward(const LinearCrossEntropyBackward& b, float* scratch) {
    const Workspace w(b, scratch);
    const LinearCrossEntropy& a = b.of;
    auto* hidden_gradient = static_cast<Element*>(b.hidden_gradient);
    gather_rows<Element>(a, w.x);
    parallel_for(w.row_blocks, 2.0 * a.rows * a.dim, [&](int64_t row_block) {
        const int64_t first = row_block * block_size, rows = block_part(first, a.rows);
        pack({DType::float32, DType::float32, a.dim, rows, w.x + first * a.dim, 1, a.dim,
              w.x_panels + first * w.width, nullptr});
        float* sums = w.x_gradient + first * w.width;
        for (int64_t i = 0; i < rows * w.width; i += Float::lanes) store(sums + i, zero());
    });
    const int64_t panel_tasks = (panel_count(a.dim) + task_panels - 1) / task_panels;
    for_groups(a.classes, [&](const Group& group) {
        const double group_weights = 1.0 * group.blocks * block_size * a.dim;
        parallel_for(group.blocks, 2.0 * group_weights, [&](int64_t block) { pack_block<Element>(w, group, block); });
        for (int64_t first = 0; first < w.row_blocks; first += chunk_blocks) {
            const int64_t end = w.row_blocks - first < chunk_blocks ? w.row_blocks : first + chunk_blocks;
            const double rows = static_cast<double>(end - first) * block_size;
            parallel_for(group.blocks, 4.0 * rows * group_weights,
                         [&](int64_t block) { class_gradients(w, group, block, first, end); });
            parallel_for((end - first) * panel_tasks, 2.0 * rows * group_weights, [&](int64_t index) {
                const int64_t chunk_block = index / panel_tasks, panel = index % panel_tasks * task_panels;
                const int64_t left = panel_count(a.dim) - panel;
                row_gradients(w, group, chunk_block, first + chunk_block, panel,
                              panel + (left < task_panels ? left : task_panels));
            });
        }
        parallel_for(group.blocks, group_weights, [&](int64_t block) { write_block<Element>(w, group, block); });
    });
    if (a.rows < a.all_rows)
        parallel_for(a.all_rows, 1.0 * a.all_rows * a.dim, [&](int64_t place) {
            Element* target = hidden_gradient + place * a.dim;
            for (int64_t i = 0; i < a.dim; i += Float::lanes) store_up_to(target + i, zero(), a.dim - i);
        });
    parallel_for(a.rows, 1.0 * a.rows * a.dim, [&](int64_t row) {
        write_row(w.x_gradient + row * w.width, a.dim, hidden_gradient + a.places[row] * a.dim);
    });
}

}  // namespace

}  // namespace cross_entropy

int64_t linear_cross_entropy_backward_scratch(const LinearCrossEntropyBackward& b) {
    return cross_entropy::Workspace(b, nullptr).parts.floats();
}

void linear_cross_entropy_backward(const LinearCrossEntropyBackward& b, float* scratch) {
    b.of.dtype == DType::float32 ? cross_entropy::backward<float>(b, scratch)
                                 : cross_entropy::backward<BFloat16>(b, scratch);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
