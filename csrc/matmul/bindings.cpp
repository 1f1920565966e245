#include "core/tensor.h"
#include "matmul/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

int64_t scale_count(int64_t outputs) { return panel_count(outputs) * panel_width; }

void bind_pack(const py::object& source, const py::object& target, const py::object& scales) {
    const auto from = Tensor::from_torch(source, "source");
    from.expect({DType::float32, DType::bfloat16}).expect_dimensions(2);
    const int64_t outputs = from.size(0), inputs = from.size(1);
    const auto to = Tensor::from_torch(target, "target");
    to.expect({DType::float32, DType::bfloat16, DType::int8});
    to.expect_shape({packed_elements(to.dtype(), outputs, inputs)}).expect_contiguous();
    const auto factors = optional_tensor(scales, "scales");
    if (factors.has_value() != (to.dtype() == DType::int8)) {
        throw py::value_error("scales are given where target is int8, and None elsewhere.");
    }
    if (factors) factors->expect(DType::float32).expect_shape({scale_count(outputs)}).expect_contiguous();
    const Pack arguments{from.dtype(), to.dtype(), outputs, inputs, from.data(), from.stride(0), from.stride(1),
                         to.data(), factors ? factors->data_as<float>() : nullptr};
    const auto kernel = RXT_KERNEL(pack);
    py::gil_scoped_release released;
    kernel(arguments);
}

void bind_product(const py::object& a, const py::object& weights, const py::object& scales, const py::object& bias,
                  const py::object& out) {
    const auto rows = Tensor::from_torch(a, "a");
    rows.expect(DType::float32).expect_dimensions(2).expect_contiguous_rows();
    const auto result = Tensor::from_torch(out, "out");
    result.expect(DType::float32).expect_shape({rows.size(0), -1}).expect_contiguous_rows();
    const int64_t outputs = result.size(1), inputs = rows.size(1);
    const auto packed = Tensor::from_torch(weights, "weights");
    packed.expect({DType::float32, DType::bfloat16, DType::int8});
    packed.expect_shape({packed_elements(packed.dtype(), outputs, inputs)}).expect_contiguous();
    const auto factors = optional_tensor(scales, "scales");
    if (factors.has_value() != (packed.dtype() == DType::int8)) {
        throw py::value_error("scales are given where weights are int8, and None elsewhere.");
    }
    if (factors) factors->expect(DType::float32).expect_shape({scale_count(outputs)}).expect_contiguous();
    const auto added = optional_tensor(bias, "bias");
    if (added) added->expect(DType::float32).expect_shape({outputs}).expect_contiguous();
    const PackedProduct arguments{
        packed.dtype(), rows.size(0), outputs, inputs, rows.data_as<float>(), rows.stride(0), packed.data(),
        factors ? factors->data_as<float>() : nullptr, added ? added->data_as<float>() : nullptr,
        result.data_as<float>(), result.stride(0)};
    const auto kernel = RXT_KERNEL(packed_product);
    py::gil_scoped_release released;
    kernel(arguments);
}

}  // namespace

void bind_matmul(py::module_& module) {
    module.def("packed_elements", [](const std::string& dtype, int64_t outputs, int64_t inputs) {
        for (DType known : {DType::float32, DType::bfloat16, DType::int8}) {
            if (dtype == dtype_name(known)) return packed_elements(known, outputs, inputs);
        }
        throw py::value_error("dtype is '" + dtype + "'; accepted are float32, bfloat16 and int8.");
    });
    module.def("packed_scales", &scale_count, py::arg("outputs"));
    module.def("pack", &bind_pack, py::arg("source"), py::arg("target"), py::arg("scales"));
    module.def("packed_product", &bind_product, py::arg("a"), py::arg("weights"), py::arg("scales"), py::arg("bias"),
               py::arg("out"));
}

}  // namespace rxt
