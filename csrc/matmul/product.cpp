#include "core/parallel.h"
#include "matmul/kernels.h"
#include "matmul/multiply.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

template <class Weight>
void product(const PackedProduct& a) {
    const Panels<Weight> weights{static_cast<const Weight*>(a.weights), a.scales, a.outputs, a.inputs};
    const auto rows = rows_at([&](int64_t row) { return a.a + row * a.a_stride; });
    // Tasks of at most 96 rows and 4 panels: enough of them for every thread, each large enough to be worth one.
    constexpr int64_t task_rows = tile_rows * (96 / tile_rows), task_panels = 4;
    const int64_t row_tasks = (a.rows + task_rows - 1) / task_rows;
    const int64_t panel_tasks = (weights.count() + task_panels - 1) / task_panels;
    parallel_for(row_tasks * panel_tasks, 2.0 * a.rows * a.outputs * a.inputs, [&](int64_t task) {
        const int64_t first_row = task / panel_tasks * task_rows, first_panel = task % panel_tasks * task_panels;
        const int64_t last_row = first_row + task_rows < a.rows ? first_row + task_rows : a.rows;
        const int64_t last_panel = first_panel + task_panels < weights.count() ? first_panel + task_panels : weights.count();
        multiply(rows, first_row, last_row, weights, first_panel, last_panel, [&](const Tile& tile) {
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
    });
}

}  // namespace

void packed_product(const PackedProduct& a) {
    switch (a.weight_dtype) {
        case DType::float32: return product<float>(a);
        case DType::bfloat16: return product<BFloat16>(a);
        default: return product<int8_t>(a);
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
