// Products of activations with the packed matrices of the model, whatever type these are packed in.
#pragma once

#include "decode/norms.h"
#include "matmul/stream.h"

namespace rxt::RXT_INSTRUCTION_SET {

template <class Weight>
inline Panels<Weight> panels_of(const PackedMatrix& matrix) {
    return {static_cast<const Weight*>(matrix.data), matrix.scales, matrix.outputs, matrix.inputs};
}

inline void add_bias(const PackedMatrix& matrix, const Sums& sums) {
    if (matrix.bias == nullptr) return;
    for (int r = 0; r < sums.rows; ++r)
        for (int i = 0; i < sums.panels * panel_width; i += Float::lanes)
            store(sums.row(r) + i, load(sums.row(r) + i) + load(matrix.bias + sums.first_output() + i));
}

// epilogue(const Sums&) for all tiles of rows times the panels of a range, the bias being added.
template <class RowAddress, class Epilogue>
inline void project(const PackedMatrix& matrix, Range panels, int64_t rows, RowAddress row, Epilogue epilogue) {
    const auto finish = [&](const Sums& sums) {
        add_bias(matrix, sums);
        epilogue(sums);
    };
    switch (matrix.dtype) {
        case DType::float32: return stream(rows, row, panels_of<float>(matrix), panels.first, panels.last, finish);
        case DType::bfloat16: return stream(rows, row, panels_of<BFloat16>(matrix), panels.first, panels.last, finish);
        default: return stream(rows, row, panels_of<int8_t>(matrix), panels.first, panels.last, finish);
    }
}

// target row (first_row + r) += scale(first_row + r) * sums, in the columns that the sums have.
template <class Target, class Scale>
inline void add_to_rows(const Sums& sums, int64_t width, Target target, Scale scale) {
    const int64_t first = sums.first_output(), last = first + sums.panels * panel_width;
    const int64_t end = last < width ? last : width;
    for (int r = 0; r < sums.rows; ++r) {
        float* row = target(sums.first_row + r);
        const Float factor = broadcast(scale(sums.first_row + r));
        for (int64_t i = first; i < end; i += Float::lanes) {
            const int64_t left = end - i;
            store_up_to(row + i, multiply_add(load(sums.row(r) + i - first), factor, load_up_to(row + i, left)), left);
        }
    }
}

// The residual stream += heads @ output^T + bias.
inline void add_output(const Step& step, const Team& team, const PackedMatrix& output) {
    const Workspace& work = step.work;
    project(output, team.share(output.panels()), step.count, [&](int64_t t) { return work.heads + t * work.attention_width; },
            [&](const Sums& sums) {
                add_to_rows(sums, output.outputs, [&](int64_t t) { return work.x + t * step.model->width; },
                            [](int64_t) { return 1.0f; });
            });
}

}  // namespace rxt::RXT_INSTRUCTION_SET
