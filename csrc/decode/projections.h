// Products of activations with the packed matrices of the model, whatever type these are packed in.
#pragma once

#include "decode/norms.h"
#include "matmul/stream_pairs.h"

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

// Rows of activations, and the same rounded, which weights of 8 bits are multiplied with, and those of bfloat16 where there are
// products of bfloat16.
struct Rows {
    const float* values;
    int64_t stride;
    RoundedRows rounded;
};

inline Rows rows_at(const Workspace& work, const Team& team, const float* values, int64_t stride) {
    const int64_t first = team.thread * work.rounded_rows;
    return {values, stride,
            {work.rounded + first * work.rounded_width, work.rounded_scales + first, work.rounded_width}};
}

// Rounds rows [first, last), if products with this matrix need that.
inline void round_for(const PackedMatrix& matrix, const Rows& rows, int64_t first, int64_t last) {
    const auto from = [&](int64_t row) { return rows.values + row * rows.stride; };
    const auto to = [&](int64_t row) { return rows.rounded.values + row * rows.rounded.stride; };
    if (matrix.dtype == DType::int8)
        for (int64_t row = first; row < last; ++row) round_row(from(row), matrix.inputs, to(row), rows.rounded.scales + row);
#if RXT_HAS_BFLOAT16_DOT
    if (matrix.dtype == DType::bfloat16)
        for (int64_t row = first; row < last; ++row)
            round_row_to_bfloat16(from(row), matrix.inputs, reinterpret_cast<BFloat16*>(to(row)));
#endif
}

// The first `count` rows, for products with this matrix and those that have its type and inputs.
inline Rows rows_for(const PackedMatrix& matrix, const Workspace& work, const Team& team, const float* values, int64_t stride,
                     int64_t count) {
    const Rows rows = rows_at(work, team, values, stride);
    round_for(matrix, rows, 0, count);
    return rows;
}

constexpr auto in_order = [](int64_t row) { return row; };

// epilogue(const Sums&) for all tiles of `count` rows times the panels of a range, the bias being added. Row i is number place(i) of
// `rows`.
template <class Place, class Epilogue>
inline void project(const PackedMatrix& matrix, Range panels, int64_t count, const Rows& rows, Place place, Epilogue epilogue) {
    const auto row = [&](int64_t i) { return rows.values + place(i) * rows.stride; };
    const auto finish = [&](const Sums& sums) {
        add_bias(matrix, sums);
        epilogue(sums);
    };
    if (matrix.dtype == DType::float32) {
        stream(count, row, panels_of<float>(matrix), panels.first, panels.last, finish);
    } else if (matrix.dtype == DType::bfloat16) {
#if RXT_HAS_BFLOAT16_DOT
        stream_pairs(count, rows.rounded, place, panels_of<BFloat16>(matrix), panels.first, panels.last, finish);
#else
        stream(count, row, panels_of<BFloat16>(matrix), panels.first, panels.last, finish);
#endif
    } else {
        stream_bytes(count, rows.rounded, place, panels_of<int8_t>(matrix), panels.first, panels.last, finish);
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
    const Rows heads = rows_for(output, work, team, work.heads, work.attention_width, step.count);
    project(output, team.share(output.panels()), step.count, heads, in_order,
            [&](const Sums& sums) {
                add_to_rows(sums, output.outputs, [&](int64_t t) { return work.x + t * step.model->width; },
                            [](int64_t) { return 1.0f; });
            });
}

}  // namespace rxt::RXT_INSTRUCTION_SET
