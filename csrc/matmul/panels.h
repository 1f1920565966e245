// How weights are laid out for the matrix product, for decoding (memory read as one straight line) and for many rows alike.
//
// Outputs stand in panels of 16; inside a panel the inputs follow each other:
//
//     float32    [panel][input][16]
//     bfloat16   [panel][input / 2][16][2]    pairs of inputs, as instructions for dot products want them
//     int8       [panel][input / 2][16][2]    with one scale per output: weight = scale * int8
//
// An odd last input is paired with a zero, and the last panel is filled with zeros. The layout does not depend on the instruction set.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace rxt {

constexpr int64_t panel_width = 16;

static inline int64_t panel_count(int64_t outputs) { return (outputs + panel_width - 1) / panel_width; }

// Elements of one panel.
static inline int64_t panel_elements(DType dtype, int64_t inputs) {
    return (dtype == DType::float32 ? inputs : (inputs + 1) / 2 * 2) * panel_width;
}

static inline int64_t packed_elements(DType dtype, int64_t outputs, int64_t inputs) {
    return panel_count(outputs) * panel_elements(dtype, inputs);
}

// A packed matrix (outputs, inputs).
template <class Weight>
struct Panels {
    const Weight* data;
    const float* scales;  // (outputs rounded up to whole panels,), for int8; else null
    int64_t outputs, inputs;

    int64_t count() const { return panel_count(outputs); }
    int64_t elements_of_one() const { return (sizeof(Weight) == 4 ? inputs : (inputs + 1) / 2 * 2) * panel_width; }
    const Weight* panel(int64_t index) const { return data + index * elements_of_one(); }
};

}  // namespace rxt
