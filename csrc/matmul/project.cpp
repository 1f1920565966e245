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

// Products in the type of the weights: pairs of bfloat16 where the processor multiplies those.
template <class Element>
struct Part {
    using Product = detail::PanelProduct<Element>;
    using Packed = typename Product::Packed;

    static void pack(const Projection& a, int64_t panel) {
        const int64_t first = panel * panel_width;
        const Matrix weight{const_cast<void*>(a.weight), a.outputs, a.inputs, a.output_stride, 1};
        Product::pack(weight, first, detail::at_most(a.outputs - first, panel_width), packed(a, panel));
    }

    static void multiply(const Projection& a, int64_t task) {
        const int64_t first_row = task / panel_tasks(a) * task_rows, last_row = detail::at_most(a.rows, first_row + task_rows);
        const int64_t first_panel = task % panel_tasks(a) * task_panels;
        const int64_t last_panel = detail::at_most(panel_count(a.outputs), first_panel + task_panels);
        float* scratch = Scratch::of_task(Product::tile_floats(a.inputs));
        alignas(64) float sums[tile_rows * Tile::stride];
        for (int64_t row = first_row; row < last_row; row += tile_rows) {
            const int rows = static_cast<int>(detail::at_most(last_row - row, tile_rows));
            const float* addresses[tile_rows];
            for (int r = 0; r < rows; ++r) addresses[r] = a.x + (row + r) * a.x_stride;
            Product product;
            product.read(addresses, rows, a.inputs, scratch);
            for (int64_t panel = first_panel; panel < last_panel; panel += tile_panels) {
                const detail::Target target{sums, Tile::stride, panel_width};
                if (last_panel - panel >= tile_panels) {
                    product.template multiply<tile_panels>(rows, packed(a, panel), a.inputs, target);
                } else {
                    product.template multiply<1>(rows, packed(a, panel), a.inputs, target);
                }
                write(a, row, rows, panel * panel_width, sums);
            }
        }
    }

private:
    static Packed* packed(const Projection& a, int64_t panel) {
        return reinterpret_cast<Packed*>(a.packed) + panel * Product::panel_elements(a.inputs);
    }

    static void write(const Projection& a, int64_t first_row, int rows, int64_t first, const float* sums) {
        const int64_t outputs = detail::at_most(a.outputs - first, Tile::stride);
        for (int r = 0; r < rows; ++r) {
            float* out = a.out + (first_row + r) * a.out_stride + first;
            for (int64_t i = 0; i < outputs; i += Float::lanes) {
                Float sum = load(sums + r * Tile::stride + i);
                if (a.bias != nullptr) sum = sum + load_up_to(a.bias + first + i, outputs - i);
                store_up_to(out + i, sum, outputs - i);
            }
        }
    }
};

}  // namespace

void project(const Projection* projections, int64_t count) {
    double weights = 0.0, products = 0.0;
    for (int64_t p = 0; p < count; ++p) {
        weights += 4.0 * projections[p].outputs * projections[p].inputs;
        products += 2.0 * projections[p].rows * projections[p].outputs * projections[p].inputs;
    }
    for_tasks(projections, count, weights, [](const Projection& a) { return panel_count(a.outputs); },
              [](const Projection& a, int64_t panel) {
                  a.weight_dtype == DType::float32 ? Part<float>::pack(a, panel) : Part<BFloat16>::pack(a, panel);
              });
    for_tasks(projections, count, products, [](const Projection& a) { return row_tasks(a) * panel_tasks(a); },
              [](const Projection& a, int64_t task) {
                  a.weight_dtype == DType::float32 ? Part<float>::multiply(a, task) : Part<BFloat16>::multiply(a, task);
              });
}

}  // namespace rxt::RXT_INSTRUCTION_SET
