// The elementwise parts of the memory write: residual gates and memory norms (rxt_kernels/memory_update/reference.py has the
// formulas). Tensors are (batch, slots, width), contiguous.
#pragma once

#include <cstdint>

#include "core/instruction_set.h"
#include "core/types.h"

namespace rxt {

enum class GateKind { add, replace, constant, elementwise, linear };  // `constant` is "static", a keyword here

struct ResidualGate {
    DType dtype;  // of old, new_values and out; parameters are fp32
    GateKind kind;
    bool tanh;  // else sigmoid
    bool per_slot;
    int64_t batch, slots, width;
    const void* old;
    const void* new_values;
    const float* weight;         // constant, elementwise: (slots,) or (1,); linear: (slots, slots) or (1, slots); else null
    const float* bias;           // linear: (slots,) or (1,); else null
    const float* status_weight;  // (width,): the status of a slot is a linear function of it instead of its mean; or null
    float status_bias;
    float* status;  // (batch, slots), scratch, or kept for the backward pass
    float* before;  // (batch, slots): what the activation is applied to, kept for the backward pass; or null
    void* out;
};

// Of the kinds that have a weight; gradients of parameters are fp32.
struct ResidualGateBackward {
    ResidualGate forward;  // as it was called, with status and before
    const void* out_gradient;
    void* old_gradient;
    void* new_gradient;
    double* before_gradient;        // scratch, (batch, slots), as the next
    float* status_gradient;
    float* weight_gradient;         // like the weight
    float* bias_gradient;           // like the bias; or null, as the next two
    float* status_weight_gradient;  // (width,)
    float* status_bias_gradient;    // one value
};

enum class MemoryNormKind { plain, layer };

// out = mix * normed + (1 - mix) * x, mix = sigmoid(gate), with
//     plain    normed = x / sqrt(r + 1e-6) * scale,  r = sqrt(mean of x^2), or what is given
//     layer    normed = (standardised x * weight + bias) * scale
struct MemoryNorm {
    DType dtype;
    MemoryNormKind kind;
    int64_t rows, slots, width;
    const void* x;
    const float* scale;  // (width,) or, per slot, (slots,)
    bool scale_per_slot;
    const float* gate;  // one value or (slots,)
    bool gate_per_slot;
    const float* given_rms;  // one per slot, instead of the row's own; or null
    const float* weight;     // layer: (width,), else null
    const float* bias;       // layer: (width,), else null
    void* out;
};

// Gradients of parameters are fp32.
struct MemoryNormBackward {
    MemoryNorm forward;  // as it was called
    const void* out_gradient;
    void* x_gradient;
    double* row_values;      // scratch, (rows, memory_norm_row_values)
    float* scale_gradient;   // like the scale
    float* gate_gradient;    // like the gate
    float* weight_gradient;  // layer: (width,), else null
    float* bias_gradient;    // layer: (width,), else null
};

constexpr int64_t memory_norm_row_values = 5;

// out[i] = mean over `layers` layers, `layer_stride` apart, of `elements` values each.
struct MeanOfLayers {
    int64_t layers, layer_stride, elements;
    const float* memory;
    float* out;
};

// heads (rows, width) *= sigmoid(gate), where the gate has gate_rows rows that repeat.
struct GatedHeads {
    int64_t rows, gate_rows, width;
    const float* gate;
    float* heads;
};

RXT_FOR_EVERY_SET(void residual_gate(const ResidualGate&); void residual_gate_backward(const ResidualGateBackward&);
                  void memory_norm(const MemoryNorm&); void memory_norm_backward(const MemoryNormBackward&);
                  void mean_of_layers(const MeanOfLayers&); void gate_heads(const GatedHeads&);)

}  // namespace rxt
