#include "core/tensor.h"
#include "rms_norm/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

// Any leading dimensions, seen as rows at a constant distance.
void forward(const py::object& x, const py::object& residual, const py::object& weight, double epsilon,
             const py::object& normed, const py::object& total, const py::object& inverse_rms) {
    const auto input = Tensor::from_torch(x, "x");
    input.expect({DType::float32, DType::bfloat16}).expect_dimensions(2).expect_contiguous_rows();
    const DType dtype = input.dtype();
    const int64_t rows = input.size(0), width = input.size(1);
    const auto scale = Tensor::from_torch(weight, "weight");
    scale.expect(dtype).expect_shape({width}).expect_contiguous();
    const auto output = Tensor::from_torch(normed, "normed");
    output.expect(dtype).expect_shape({rows, width}).expect_contiguous();
    const auto added = optional_tensor(residual, "residual");
    const auto sum = optional_tensor(total, "total");
    if (added.has_value() != sum.has_value()) throw py::value_error("residual and total are given both or neither.");
    if (added) {
        added->expect(dtype).expect_shape({rows, width}).expect_contiguous_rows();
        sum->expect(dtype).expect_shape({rows, width}).expect_contiguous();
    }
    const auto kept = optional_tensor(inverse_rms, "inverse_rms");
    if (kept) kept->expect(DType::float32).expect_shape({rows}).expect_contiguous();
    const RmsNormForward arguments{
        dtype, rows, width, static_cast<float>(epsilon), input.data(), input.stride(0),
        added ? added->data() : nullptr, added ? added->stride(0) : 0, scale.data(), output.data(),
        sum ? sum->data() : nullptr, kept ? kept->data_as<float>() : nullptr};
    const auto kernel = RXT_KERNEL(rms_norm_forward);
    py::gil_scoped_release released;
    kernel(arguments);
}

void backward(const py::object& x, const py::object& weight, const py::object& inverse_rms,
              const py::object& normed_gradient, const py::object& total_gradient, const py::object& x_gradient,
              const py::object& weight_gradient) {
    const auto input = Tensor::from_torch(x, "x");
    input.expect({DType::float32, DType::bfloat16}).expect_dimensions(2).expect_contiguous();
    const DType dtype = input.dtype();
    const int64_t rows = input.size(0), width = input.size(1);
    const auto like_input = [&](const py::object& object, const char* name) {
        auto tensor = Tensor::from_torch(object, name);
        tensor.expect(dtype).expect_shape({rows, width}).expect_contiguous();
        return tensor;
    };
    const auto scale = Tensor::from_torch(weight, "weight");
    scale.expect(dtype).expect_shape({width}).expect_contiguous();
    const auto inverse = Tensor::from_torch(inverse_rms, "inverse_rms");
    inverse.expect(DType::float32).expect_shape({rows}).expect_contiguous();
    const auto incoming = like_input(normed_gradient, "normed_gradient");
    std::optional<Tensor> direct;
    if (!total_gradient.is_none()) direct = like_input(total_gradient, "total_gradient");
    const auto outgoing = like_input(x_gradient, "x_gradient");
    const auto sums = Tensor::from_torch(weight_gradient, "weight_gradient");
    sums.expect(DType::float32).expect_shape({width}).expect_contiguous();
    const RmsNormBackward arguments{
        dtype, rows, width, input.data(), scale.data(), inverse.data_as<float>(), incoming.data(),
        direct ? direct->data() : nullptr, outgoing.data(), sums.data_as<float>()};
    const auto kernel = RXT_KERNEL(rms_norm_backward);
    py::gil_scoped_release released;
    kernel(arguments);
}

}  // namespace

void bind_rms_norm(py::module_& module) {
    module.def("rms_norm_forward", &forward, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("epsilon"),
               py::arg("normed"), py::arg("total"), py::arg("inverse_rms"));
    module.def("rms_norm_backward", &backward, py::arg("x"), py::arg("weight"), py::arg("inverse_rms"),
               py::arg("normed_gradient"), py::arg("total_gradient"), py::arg("x_gradient"), py::arg("weight_gradient"));
}

}  // namespace rxt
