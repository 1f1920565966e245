// What forward and backward pass of the experts share: rows as fp32, and tasks of a block of tokens and some columns.
#pragma once

#include "core/parallel.h"
#include "matmul/packed.h"
#include "mixture_of_experts/kernels.h"

namespace rxt::RXT_INSTRUCTION_SET {

// target (rows, width) = source, in fp32.
template <class Element>
inline void widen_rows(const void* source, int64_t stride, int64_t rows, int64_t width, float* target) {
    parallel_for(rows, 1.0 * rows * width, [&](int64_t row) {
        const Element* from = static_cast<const Element*>(source) + row * stride;
        float* to = target + row * width;
        for (int64_t i = 0; i < width; i += Float::lanes) {
            const int64_t left = width - i;
            store_up_to(to + i, load_up_to(from + i, left), left);
        }
    });
}

// Rows of activations in fp32: a copy where there is one, else the tensor itself.
struct WideRows {
    const float* data;
    int64_t stride;

    const float* operator()(int64_t row) const { return data + row * stride; }
};

template <class Element>
inline WideRows wide_rows(const void* source, int64_t stride, int64_t rows, int64_t width, float* copy) {
    if (copy == nullptr) return {static_cast<const float*>(source), stride};
    widen_rows<Element>(source, stride, rows, width, copy);
    return {copy, width};
}

// few(block, first column, columns) or many(...) for every block of a round and every `few_step` or `many_step` columns of `width`.
template <class Few, class Many>
inline void for_blocks(const Round& round, int64_t width, int64_t few_step, int64_t many_step, double work, Few&& few,
                       Many&& many) {
    const int64_t few_parts = (width + few_step - 1) / few_step, many_parts = (width + many_step - 1) / many_step;
    const int64_t many_tasks = round.long_count * many_parts;
    const int64_t few_tasks = (round.block_count - round.long_count) * few_parts;
    parallel_for_uneven(many_tasks + few_tasks, work, [&](int64_t index) {
        const bool is_many = index < many_tasks;
        if (!is_many) index -= many_tasks;
        const int64_t parts = is_many ? many_parts : few_parts, step = is_many ? many_step : few_step;
        const int64_t first = index % parts * step, count = width - first < step ? width - first : step;
        const RowBlock& block = round.blocks[(is_many ? 0 : round.long_count) + index / parts];
        is_many ? many(block, first, count) : few(block, first, count);
    });
}

// finish(place, first, count, sums) for all places of a block and the outputs [first, first + count) of a matrix, some at a time:
// sums[i] is row(place) times output first + i, and may be overwritten.
template <class Element, class RowAddress, class Finish>
inline void products_of_few(const RowBlock& block, const RowAddress& row, const Matrix& weight, int64_t first, int64_t count,
                            Finish&& finish) {
    const float* addresses[enough_rows_to_pack];
    for (int64_t r = 0; r < block.count; ++r) addresses[r] = row(block.first + r);
    const int64_t stride = padded_columns(count);
    alignas(64) float sums[most_sums];
    multiply_unpacked<Element>(addresses, static_cast<int>(block.count), weight, first, count, sums, stride);
    for (int64_t r = 0; r < block.count; ++r) finish(block.first + r, first, count, sums + r * stride);
}

// Pairs of panels in a task with many rows, and their outputs.
constexpr int pairs_of_task = 4;
constexpr int64_t outputs_of_task = 2 * pairs_of_task * panel_width;

// The same for a block of many rows and at most outputs_of_task outputs.
template <class Element, class RowAddress, class Finish>
inline void products_of_many(const RowBlock& block, const RowAddress& row, const Matrix& weight, int64_t first, int64_t count,
                             Finish&& finish) {
    const auto pair_at = [&](int i) {
        const int64_t column = 2 * i * panel_width, left = count - column;
        return PanelPair{{first + column, first + column + panel_width},
                         {detail::at_most(left, panel_width), detail::at_most(left - panel_width, panel_width)},
                         {column, column + panel_width}};
    };
    multiply_pairs<pairs_of_task, Element>([&](int64_t i) { return row(block.first + i); }, block.count, weight,
                                           static_cast<int>((panel_count(count) + 1) / 2), pair_at,
                                           [&](int64_t first_row, int rows, float* sums) {
                                               for (int r = 0; r < rows; ++r)
                                                   finish(block.first + first_row + r, first, count, sums + r * outputs_of_task);
                                           });
}

// finish(block, ...) for all blocks of a round and all outputs of matrix(expert); row(place) is the address of a place's row.
template <class Element, class RowAddress, class MatrixOf, class Finish>
inline void products(const Experts& e, const Round& round, int64_t outputs, int64_t inputs, const RowAddress& row,
                     const MatrixOf& matrix, Finish&& finish) {
    for_blocks(
        round, outputs, columns_beside(e.groups.few_rows, 2 * outputs_of_task), outputs_of_task, 2.0 * round.places * outputs * inputs,
        [&](const RowBlock& block, int64_t first, int64_t count) {
            products_of_few<Element>(block, row, matrix(block.expert), first, count, [&](auto... of) { finish(block, of...); });
        },
        [&](const RowBlock& block, int64_t first, int64_t count) {
            products_of_many<Element>(block, row, matrix(block.expert), first, count, [&](auto... of) { finish(block, of...); });
        });
}

// The sum over neighbouring parts of a row each: out[i] = parts[0][i] + parts[1][i] + ...
template <class Element>
inline void sum_parts(const float* parts, int64_t count, int64_t width, Element* out) {
    for (int64_t i = 0; i < width; i += Float::lanes) {
        const int64_t left = width - i;
        Float total = load_up_to(parts + i, left);
        for (int64_t k = 1; k < count; ++k) total = total + load_up_to(parts + k * width + i, left);
        store_up_to(out + i, total, left);
    }
}

}  // namespace rxt::RXT_INSTRUCTION_SET
