#include "core/tensor.h"
#include "rotary/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

void bind_turn(const py::object& x, const py::object& cosine, const py::object& sine, bool split, bool inverse,
               const py::object& out) {
    const auto input = Tensor::from_torch(x, "x");
    input.expect({DType::float32, DType::bfloat16}).expect_dimensions(4).expect_contiguous_rows();
    if (input.size(3) % 2 != 0) {
        throw py::value_error("x has shape " + input.describe_shape() + "; accepted is an even last dimension.");
    }
    const int64_t batch = input.size(0), time = input.size(1), heads = input.size(2), half = input.size(3) / 2;
    const auto cosines = Tensor::from_torch(cosine, "cosine"), sines = Tensor::from_torch(sine, "sine");
    const bool per_row = cosines.dimensions() == 3;
    for (const Tensor* table : {&cosines, &sines}) {
        table->expect(DType::float32).expect_contiguous();
        per_row ? table->expect_shape({batch, time, half}) : table->expect_shape({time, half});
    }
    const auto output = Tensor::from_torch(out, "out");
    output.expect(input.dtype()).expect_shape({batch, time, heads, 2 * half}).expect_contiguous();
    const Rotary arguments{
        input.dtype(), batch, time, heads, half, input.data(), input.stride(0), input.stride(1), input.stride(2),
        cosines.data_as<float>(), sines.data_as<float>(), per_row ? time * half : 0, split, inverse, output.data()};
    const auto kernel = RXT_KERNEL(rotary);
    py::gil_scoped_release released;
    kernel(arguments);
}

}  // namespace

void bind_rotary(py::module_& module) {
    module.def("rotary", &bind_turn, py::arg("x"), py::arg("cosine"), py::arg("sine"), py::arg("split"),
               py::arg("inverse"), py::arg("out"));
}

}  // namespace rxt
