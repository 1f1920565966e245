#include "swiglu/kernels.h"

#include "core/parallel.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

template <class Element>
void forward(const SwigluForward& a) {
    parallel_for(a.rows, 30.0 * a.rows * a.width, [&](int64_t row) {
        const Element* linear = static_cast<const Element*>(a.x) + row * a.x_stride;
        const Element* gate = linear + a.width;
        Element* out = static_cast<Element*>(a.out) + row * a.width;
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float g = load_up_to(gate + i, left);
            store_up_to(out + i, load_up_to(linear + i, left) * (g * sigmoid(g)), left);
        }
    });
}

// With l the linear part, g the gate, s = sigmoid(g) and dy the gradient of the result:
//     dl = dy g s    dg = dy l s (1 + g (1 - s))
template <class Element>
void backward(const SwigluBackward& a) {
    parallel_for(a.rows, 40.0 * a.rows * a.width, [&](int64_t row) {
        const Element* linear = static_cast<const Element*>(a.x) + row * a.x_stride;
        const Element* gate = linear + a.width;
        const Element* gradient = static_cast<const Element*>(a.gradient) + row * a.gradient_stride;
        Element* linear_gradient = static_cast<Element*>(a.x_gradient) + row * 2 * a.width;
        Element* gate_gradient = linear_gradient + a.width;
        const Float one = broadcast(1.0f);
        for (int64_t i = 0; i < a.width; i += Float::lanes) {
            const int64_t left = a.width - i;
            const Float g = load_up_to(gate + i, left), s = sigmoid(g), dy = load_up_to(gradient + i, left);
            store_up_to(linear_gradient + i, dy * (g * s), left);
            const Float slope = s * multiply_add(g, one - s, one);
            store_up_to(gate_gradient + i, dy * load_up_to(linear + i, left) * slope, left);
        }
    });
}

}  // namespace

void swiglu_forward(const SwigluForward& a) { a.dtype == DType::float32 ? forward<float>(a) : forward<BFloat16>(a); }

void swiglu_backward(const SwigluBackward& a) { a.dtype == DType::float32 ? backward<float>(a) : backward<BFloat16>(a); }

}  // namespace rxt::RXT_INSTRUCTION_SET
