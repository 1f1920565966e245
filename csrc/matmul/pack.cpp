#include "core/parallel.h"
#include "matmul/kernels.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

template <class Source>
void pack_panel(const Pack& a, int64_t panel, float* target) {
    const int64_t first = panel * panel_width;
    const int64_t present = a.outputs - first < panel_width ? a.outputs - first : panel_width;
    const auto* source = static_cast<const Source*>(a.source) + first * a.output_stride;
    for (int64_t k = 0; k < a.inputs; ++k) {
        for (int64_t j = 0; j < present; ++j) {
            target[k * panel_width + j] = to_float(source[j * a.output_stride + k * a.input_stride]);
        }
        for (int64_t j = present; j < panel_width; ++j) target[k * panel_width + j] = 0.0f;
    }
}

template <class Source>
void pack_pairs(const Pack& a, int64_t panel, BFloat16* target) {
    const int64_t first = panel * panel_width;
    const int64_t present = a.outputs - first < panel_width ? a.outputs - first : panel_width;
    const auto* source = static_cast<const Source*>(a.source) + first * a.output_stride;
    for (int64_t k = 0; k < (a.inputs + 1) / 2 * 2; ++k) {
        BFloat16* pairs = target + k / 2 * 2 * panel_width + k % 2;
        for (int64_t j = 0; j < panel_width; ++j) {
            const bool inside = j < present && k < a.inputs;
            pairs[2 * j] = inside ? to_bfloat16(to_float(source[j * a.output_stride + k * a.input_stride])) : BFloat16{0};
        }
    }
}

// Symmetric, one scale per output: the largest weight becomes 127.
template <class Source>
void pack_bytes(const Pack& a, int64_t panel, int8_t* target) {
    const int64_t first = panel * panel_width;
    const auto* source = static_cast<const Source*>(a.source) + first * a.output_stride;
    for (int64_t j = 0; j < panel_width; ++j) {
        const bool inside = first + j < a.outputs;
        float largest = 0.0f;
        for (int64_t k = 0; inside && k < a.inputs; ++k) {
            const float value = __builtin_fabsf(to_float(source[j * a.output_stride + k * a.input_stride]));
            largest = value > largest ? value : largest;
        }
        a.scales[first + j] = largest / 127.0f;
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        for (int64_t k = 0; k < (a.inputs + 1) / 2 * 2; ++k) {
            const bool present = inside && k < a.inputs;
            const float value = present ? to_float(source[j * a.output_stride + k * a.input_stride]) * inverse : 0.0f;
            target[(k / 2 * panel_width + j) * 2 + k % 2] = static_cast<int8_t>(__builtin_rintf(value));
        }
    }
}

template <class Source>
void pack_from(const Pack& a) {
    const int64_t size = panel_elements(a.target_dtype, a.inputs);
    parallel_for(panel_count(a.outputs), 2.0 * a.outputs * a.inputs, [&](int64_t panel) {
        if (a.target_dtype == DType::float32) {
            pack_panel<Source>(a, panel, static_cast<float*>(a.target) + panel * size);
        } else if (a.target_dtype == DType::bfloat16) {
            pack_pairs<Source>(a, panel, static_cast<BFloat16*>(a.target) + panel * size);
        } else {
            pack_bytes<Source>(a, panel, static_cast<int8_t*>(a.target) + panel * size);
        }
    });
}

}  // namespace

void pack(const Pack& a) { a.source_dtype == DType::float32 ? pack_from<float>(a) : pack_from<BFloat16>(a); }

}  // namespace rxt::RXT_INSTRUCTION_SET
