#include "rms_norm/kernels.h"

#include "core/parallel.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

template <class Element>
void forward(const RmsNormForward& a) {
    const auto* weight = static_cast<const Element*>(a.weight);
    parallel_for(a.rows, 4.0 * a.rows * a.width, [&](int64_t row) {
        const Element* x = static_cast<const Element*>(a.x) + row * a.x_stride;
        Element* normed = static_cast<Element*>(a.normed) + row * a.width;
        Float squares = zero();
        if (a.residual != nullptr) {
            const Element* residual = static_cast<const Element*>(a.residual) + row * a.residual_stride;
            Element* total = static_cast<Element*>(a.total) + row * a.width;
            for (int64_t i = 0; i < a.width; i += Float::lanes) {
                const int64_t left = a.width - i;
                store_up_to(total + i, load_up_to(x + i, left) + load_up_to(residual + i, left), left);
                const Float rounded = load_up_to(total + i, left);  // the norm is that of the sum as it is kept
                squares = multiply_add(rounded, rounded, squares);
            }
            x = total;
        } else {
            for (int64_t i = 0; i < a.width; i += Float::lanes) {
                const Float values = load_up_to(x + i, a.width - i);
                squares = multiply_add(values, values, squares);
            }
        }
        const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.width) + a.epsilon);
        if (a.inverse_rms != nullptr) a.inverse_rms[row] = inverse;
        const Float scale = broadcast(inverse);
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            store_up_to(normed + i, load_up_to(x + i, left) * scale * load_up_to(weight + i, left), left);
        }
    });
}

// With r = 1 / rms(x), g the gradient of the output and w the weight:
//     dx = r (g w) - x r^3 mean(g w x),    dw = sum over rows of g x r
template <class Element>
void backward(const RmsNormBackward& a) {
    const auto* weight = static_cast<const Element*>(a.weight);
    const auto row_of = [&](const void* base, int64_t row) { return static_cast<const Element*>(base) + row * a.width; };
    parallel_for(a.rows, 10.0 * a.rows * a.width, [&](int64_t row) {
        const Element* x = row_of(a.x, row);
        const Element* gradient = row_of(a.normed_gradient, row);
        const Element* more = a.total_gradient != nullptr ? row_of(a.total_gradient, row) : nullptr;
        Element* target = static_cast<Element*>(a.x_gradient) + row * a.width;
        Float products = zero();
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float scaled = load_up_to(gradient + i, left) * load_up_to(weight + i, left);
            products = multiply_add(scaled, load_up_to(x + i, left), products);
        }
        const float scale = a.inverse_rms[row];
        const Float outer = broadcast(scale);
        const Float inner = broadcast(-scale * scale * scale * (sum(products) / static_cast<float>(a.width)));
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            Float result = load_up_to(gradient + i, left) * load_up_to(weight + i, left) * outer;
            result = multiply_add(load_up_to(x + i, left), inner, result);
            if (more != nullptr) result = result + load_up_to(more + i, left);
            store_up_to(target + i, result, left);
        }
    });
    // Every task owns some columns and walks down all rows, so the order of the sums is fixed.
    constexpr int64_t columns = 4 * Float::lanes;
    const int64_t blocks = (a.width + columns - 1) / columns;
    parallel_for(blocks, 4.0 * a.rows * a.width, [&](int64_t block) {
        const int64_t first = block * columns;
        Float sums[4] = {zero(), zero(), zero(), zero()};
        for (int64_t row = 0; row < a.rows; ++row) {
            const Element* x = row_of(a.x, row);
            const Element* gradient = row_of(a.normed_gradient, row);
            const Float scale = broadcast(a.inverse_rms[row]);
            for (int part = 0; part < 4; ++part) {
                const int64_t i = first + part * Float::lanes, left = a.width - i;
                if (left <= 0) break;
                sums[part] = multiply_add(load_up_to(gradient + i, left) * scale, load_up_to(x + i, left), sums[part]);
            }
        }
        for (int part = 0; part < 4; ++part) {
            const int64_t i = first + part * Float::lanes, left = a.width - i;
            if (left > 0) store_up_to(a.weight_gradient + i, sums[part], left);
        }
    });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
    a.dtype == DType::float32 ? forward<float>(a) : forward<BFloat16>(a);
}

void rms_norm_backward(const RmsNormBackward& a) {
    a.dtype == DType::float32 ? backward<float>(a) : backward<BFloat16>(a);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
