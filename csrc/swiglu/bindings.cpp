#include "core/tensor.h"
#include "swiglu/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

Tensor checked_x(const py::object& object) {
    auto x = Tensor::from_torch(object, "x");
    x.expect({DType::float32, DType::bfloat16}).expect_dimensions(2).expect_contiguous_rows();
    if (x.size(1) % 2 != 0) {
        throw py::value_error("x has shape " + x.describe_shape() + "; accepted is an even last dimension.");
    }
    return x;
}

void forward(const py::object& x, const py::object& out) {
    const auto input = checked_x(x);
    const int64_t rows = input.size(0), width = input.size(1) / 2;
    const auto output = Tensor::from_torch(out, "out");
    output.expect(input.dtype()).expect_shape({rows, width}).expect_contiguous();
    const SwigluForward arguments{input.dtype(), rows, width, input.data(), input.stride(0), output.data()};
    const auto kernel = RXT_KERNEL(swiglu_forward);
    py::gil_scoped_release released;
    kernel(arguments);
}

void backward(const py::object& gradient, const py::object& x, const py::object& x_gradient) {
    const auto input = checked_x(x);
    const int64_t rows = input.size(0), width = input.size(1) / 2;
    const auto incoming = Tensor::from_torch(gradient, "gradient");
    incoming.expect(input.dtype()).expect_shape({rows, width}).expect_contiguous_rows();
    const auto outgoing = Tensor::from_torch(x_gradient, "x_gradient");
    outgoing.expect(input.dtype()).expect_shape({rows, 2 * width}).expect_contiguous();
    const SwigluBackward arguments{input.dtype(), rows, width, incoming.data(), incoming.stride(0),
                                   input.data(), input.stride(0), outgoing.data()};
    const auto kernel = RXT_KERNEL(swiglu_backward);
    py::gil_scoped_release released;
    kernel(arguments);
}

}  // namespace

void bind_swiglu(py::module_& module) {
    module.def("swiglu_forward", &forward, py::arg("x"), py::arg("out"));
    module.def("swiglu_backward", &backward, py::arg("gradient"), py::arg("x"), py::arg("x_gradient"));
}

}  // namespace rxt
