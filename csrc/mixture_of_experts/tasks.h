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

// task(block, first column, columns) for every block of tokens and every `step` columns of `width`.
template <class Task>
inline void for_blocks(const Groups& groups, int64_t width, int64_t step, double work, Task&& task) {
    const int64_t parts = (width + step - 1) / step;
    parallel_for_uneven(groups.block_count * parts, work, [&](int64_t index) {
        const int64_t first = index % parts * step;
        task(groups.blocks[index / parts], first, width - first < step ? width - first : step);
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
