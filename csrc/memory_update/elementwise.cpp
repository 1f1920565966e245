// What is left of the memory write between norms, products, attention and gates.
#include "core/parallel.h"
#include "memory_update/kernels.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

void mean_of_layers(const MeanOfLayers& a) {
    constexpr int64_t chunk = 4096;
    const Float inverse = broadcast(1.0f / static_cast<float>(a.layers));
    parallel_for((a.elements + chunk - 1) / chunk, 1.0 * a.layers * a.elements, [&](int64_t task) {
        const int64_t last = (task + 1) * chunk < a.elements ? (task + 1) * chunk : a.elements;
        for (int64_t i = task * chunk; i < last; i += Float::lanes) {
            Float total = zero();
            for (int64_t layer = 0; layer < a.layers; ++layer)
                total = total + load_up_to(a.memory + layer * a.layer_stride + i, last - i);
            store_up_to(a.out + i, total * inverse, last - i);
        }
    });
}

void gate_heads(const GatedHeads& a) {
    parallel_for(a.rows, 20.0 * a.rows * a.width, [&](int64_t row) {
        float* heads = a.heads + row * a.width;
        const float* gate = a.gate + row % a.gate_rows * a.width;
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            store_up_to(heads + i, load_up_to(heads + i, left) * sigmoid(load_up_to(gate + i, left)), left);
        }
    });
}

}  // namespace rxt::RXT_INSTRUCTION_SET
