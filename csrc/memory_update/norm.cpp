#include "core/parallel.h"
#include "memory_update/kernels.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

constexpr float norm_epsilon = 1e-6f, layer_norm_epsilon = 1e-5f;

template <class Element>
void norm(const MemoryNorm& a) {
    parallel_for(a.rows, 8.0 * a.rows * a.width, [&](int64_t row) {
        const Element* x = static_cast<const Element*>(a.x) + row * a.width;
        Element* out = static_cast<Element*>(a.out) + row * a.width;
        const int64_t slot = row % a.slots;
        const auto width = static_cast<float>(a.width);
        Float total = zero(), squares = zero();
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const Float values = load_up_to(x + i, a.width - i);
            total = total + values;
            squares = multiply_add(values, values, squares);
        }
        float mean = 0.0f, inverse;
        if (a.kind == MemoryNormKind::layer) {
            mean = sum(total) / width;
            Float deviations = zero();
            for (int64_t i = 0; i < a.width; i += Float::lanes) {
                const int64_t left = a.width - i;
                Float deviation = load_up_to(x + i, left) - broadcast(mean);
                if (left < Float::lanes) {  // lanes behind the end hold -mean
                    float lanes[Float::lanes];
                    store(lanes, deviation);
                    deviation = load_part(lanes, static_cast<int>(left));
                }
                deviations = multiply_add(deviation, deviation, deviations);
            }
            inverse = 1.0f / __builtin_sqrtf(sum(deviations) / width + layer_norm_epsilon);
        } else {
            const float rms = a.given_rms != nullptr ? a.given_rms[slot] : __builtin_sqrtf(sum(squares) / width);
            inverse = 1.0f / __builtin_sqrtf(rms + norm_epsilon);
        }
        const float mix = 1.0f / (1.0f + __builtin_expf(-a.gate[a.gate_per_slot ? slot : 0]));
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float values = load_up_to(x + i, left);
            Float normed = (values - broadcast(mean)) * broadcast(inverse);
            if (a.weight != nullptr) normed = multiply_add(normed, load_up_to(a.weight + i, left), load_up_to(a.bias + i, left));
            normed = normed * (a.scale_per_slot ? broadcast(a.scale[slot]) : load_up_to(a.scale + i, left));
            store_up_to(out + i, multiply_add(broadcast(mix), normed, broadcast(1.0f - mix) * values), left);
        }
    });
}

}  // namespace

void memory_norm(const MemoryNorm& a) { a.dtype == DType::float32 ? norm<float>(a) : norm<BFloat16>(a); }

}  // namespace rxt::RXT_INSTRUCTION_SET
