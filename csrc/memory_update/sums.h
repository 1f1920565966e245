// Sums over rows, for gradients of parameters: in an order that does not depend on the threads, and short ones first, which rounds
// less than one long sum.
#pragma once

#include "core/parallel.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

// target[i] = sum over rows of the vector term(row, i, left), for i in [0, width). Every task owns some columns.
template <class Term>
inline void sum_of_rows(int64_t rows, int64_t width, double work, float* target, Term&& term) {
    constexpr int vectors = 4;
    constexpr int64_t columns = vectors * Float::lanes, short_sum = 64;
    parallel_for((width + columns - 1) / columns, work, [&](int64_t task) {
        Float totals[vectors];
        for (int v = 0; v < vectors; ++v) totals[v] = zero();
        for (int64_t first = 0; first < rows; first += short_sum) {
            const int64_t last = first + short_sum < rows ? first + short_sum : rows;
            Float sums[vectors];
            for (int v = 0; v < vectors; ++v) sums[v] = zero();
            for (int64_t row = first; row < last; ++row) {
                for (int v = 0; v < vectors; ++v) {
                    const int64_t i = task * columns + v * Float::lanes;
                    if (i < width) sums[v] = sums[v] + term(row, i, width - i);
                }
            }
            for (int v = 0; v < vectors; ++v) totals[v] = totals[v] + sums[v];
        }
        for (int v = 0; v < vectors; ++v) {
            const int64_t i = task * columns + v * Float::lanes;
            if (i < width) store_up_to(target + i, totals[v], width - i);
        }
    });
}

// A sum of products in double, lane by lane: terms of both signs may leave little of themselves.
class WideSum {
public:
    void add(Float a, Float b) {
        float x[Float::lanes], y[Float::lanes];
        store(x, a);
        store(y, b);
        for (int lane = 0; lane < Float::lanes; ++lane) lanes_[lane] += static_cast<double>(x[lane]) * y[lane];
    }

    double total() const {
        double sum = 0.0;
        for (int lane = 0; lane < Float::lanes; ++lane) sum += lanes_[lane];
        return sum;
    }

private:
    double lanes_[Float::lanes] = {};
};

// The sum of value(i) for i in [0, count), one after the other in double.
template <class Value>
inline float sum_of_values(int64_t count, Value&& value) {
    double total = 0.0;
    for (int64_t i = 0; i < count; ++i) total += value(i);
    return static_cast<float>(total);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
