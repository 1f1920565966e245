// Projections with weights that are packed on the way: first all weights, then all rows, each shared among all threads.
#include "core/parallel.h"
#include "matmul/kernels.h"
#include "matmul/multiply.h"
#include "matmul/packed.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

constexpr int64_t task_rows = tile_rows * (96 / tile_rows), task_panels = 4;

int64_t row_tasks(const Projection& a) { return (a.rows + task_rows - 1) / task_rows; }
int64_t panel_tasks(const Projection& a) { return (panel_count(a.outputs) + task_panels - 1) / task_panels; }

// task(projection, index) for every index below tasks_of(projection), of all projections.
template <class TasksOf, class Task>
void for_tasks(const Projection* projections, int64_t count, double work, const TasksOf& tasks_of, const Task& task) {
    int64_t total = 0;
    for (int64_t p = 0; p < count; ++p) total += tasks_of(projections[p]);
    parallel_for(total, work, [&](int64_t index) {
        const Projection* own = projections;
        for (; index >= tasks_of(*own); ++own) index -= tasks_of(*own);
        task(*own, index);
    });
}

template <class Element>
void pack_one(const Projection& a, int64_t panel) {
    const int64_t first = panel * panel_width;
    detail::pack_outputs(static_cast<const Element*>(a.weight) + first * a.output_stride, a.output_stride, a.inputs,
                         detail::at_most(a.outputs - first, panel_width), a.packed + first * a.inputs);
}

void multiply_part(const Projection& a, int64_t task) {
    const int64_t first_row = task / panel_tasks(a) * task_rows, first_panel = task % panel_tasks(a) * task_panels;
    const Panels<float> weights{a.packed, nullptr, a.outputs, a.inputs};
    multiply(rows_at([&](int64_t row) { return a.x + row * a.x_stride; }), first_row,
             detail::at_most(a.rows, first_row + task_rows), weights, first_panel,
             detail::at_most(weights.count(), first_panel + task_panels), [&](const Tile& tile) {
                 for (int r = 0; r < tile.rows; ++r) {
                     float* out = a.out + (tile.first_row + r) * a.out_stride + tile.first_output;
                     for (int i = 0; i < tile.outputs; i += Float::lanes) {
                         const int left = tile.outputs - i;
                         Float sum = load(tile.row(r) + i);
                         if (a.bias != nullptr) sum = sum + load_up_to(a.bias + tile.first_output + i, left);
                         store_up_to(out + i, sum, left);
                     }
                 }
             });
}

}  // namespace

void project(const Projection* projections, int64_t count) {
    double weights = 0.0, products = 0.0;
    for (int64_t p = 0; p < count; ++p) {
        weights += 4.0 * projections[p].outputs * projections[p].inputs;
        products += 2.0 * projections[p].rows * projections[p].outputs * projections[p].inputs;
    }
    for_tasks(projections, count, weights, [](const Projection& a) { return panel_count(a.outputs); },
              [](const Projection& a, int64_t panel) {
                  a.weight_dtype == DType::float32 ? pack_one<float>(a, panel) : pack_one<BFloat16>(a, panel);
              });
    for_tasks(projections, count, products, [](const Projection& a) { return row_tasks(a) * panel_tasks(a); }, multiply_part);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
