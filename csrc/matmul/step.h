// One step of a tile of sums, and where they go, which products of many rows and of few have in common.
#pragma once

#include "matmul/weights.h"

namespace rxt::RXT_INSTRUCTION_SET::detail {

// Where the sums of a tile go: row r of panel p begins at `at` + r * row + p * panel.
struct Target {
    float* at;
    int64_t row, panel;
};

// sum[r][p] += the weights of a step at weights(p) times the inputs a(r, i), for the first `present` of the step's inputs.
//
// What is used most often stays in registers beside the sums: the weights of all panels where there are more rows than panels,
// otherwise the inputs of all rows.
template <int rows, int panels, class Weight, class Inputs, class WeightsOf>
[[gnu::always_inline]] inline void add_step(const Inputs& a, const WeightsOf& weights, int present,
                                            Float (&sum)[rows][panels][vectors_per_panel]) {
    constexpr int width = inputs_per_step<Weight>;
    if constexpr (panels <= rows) {
        RXT_UNROLL
        for (int i = 0; i < width; ++i) {
            if (i >= present) break;
            Float w[panels][vectors_per_panel];
            RXT_UNROLL
            for (int p = 0; p < panels; ++p) load_input(weights(p), i, w[p]);
            RXT_UNROLL
            for (int r = 0; r < rows; ++r) {
                const Float x = broadcast(a(r, i));
                RXT_UNROLL
                for (int p = 0; p < panels; ++p) {
                    RXT_UNROLL
                    for (int v = 0; v < vectors_per_panel; ++v) sum[r][p][v] = multiply_add(x, w[p][v], sum[r][p][v]);
                }
            }
        }
    } else {
        RXT_UNROLL
        for (int p = 0; p < panels; ++p) {
            RXT_UNROLL
            for (int i = 0; i < width; ++i) {
                if (i >= present) break;
                Float w[vectors_per_panel];
                load_input(weights(p), i, w);
                RXT_UNROLL
                for (int r = 0; r < rows; ++r) {
                    const Float x = broadcast(a(r, i));
                    RXT_UNROLL
                    for (int v = 0; v < vectors_per_panel; ++v) sum[r][p][v] = multiply_add(x, w[v], sum[r][p][v]);
                }
            }
        }
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET::detail
