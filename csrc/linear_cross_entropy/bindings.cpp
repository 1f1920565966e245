#include "core/tensor.h"

#include "core/scratch.h"
#include "linear_cross_entropy/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

// What both passes take, and which rows count.
struct Inputs {
    Tensor hidden, weight, target;
    std::optional<Tensor> bias;
    std::vector<int64_t> places;

    Inputs(const py::object& hidden_object, const py::object& weight_object, const py::object& target_object,
           const py::object& bias_object, int64_t ignored)
        : hidden(Tensor::from_torch(hidden_object, "hidden")), weight(Tensor::from_torch(weight_object, "weight")),
          target(Tensor::from_torch(target_object, "target")), bias(optional_tensor(bias_object, "bias")) {
        hidden.expect({DType::float32, DType::bfloat16}).expect_dimensions(2).expect_contiguous_rows();
        weight.expect(hidden.dtype()).expect_shape({-1, hidden.size(1)});
        target.expect(DType::int64).expect_shape({hidden.size(0)}).expect_contiguous();
        if (bias) bias->expect(hidden.dtype()).expect_shape({weight.size(0)}).expect_contiguous();
        const auto* classes = target.data_as<int64_t>();
        for (int64_t row = 0; row < hidden.size(0); ++row) {
            if (classes[row] == ignored) continue;
            if (classes[row] < 0 || classes[row] >= weight.size(0)) {
                throw py::value_error("target is " + std::to_string(classes[row]) + "; accepted are class numbers from 0 to " +
                                      std::to_string(weight.size(0) - 1) + ", or ignore_index " + std::to_string(ignored) + ".");
            }
            places.push_back(row);
        }
    }

    LinearCrossEntropy view() const {
        return {hidden.dtype(), hidden.size(0), static_cast<int64_t>(places.size()), weight.size(0), hidden.size(1),
                hidden.data(), hidden.stride(0), weight.data(), weight.stride(0), weight.stride(1),
                bias ? bias->data() : nullptr, target.data_as<int64_t>(), places.data()};
    }
};

void forward(const py::object& hidden, const py::object& weight, const py::object& target, const py::object& bias,
             int64_t ignored, bool mean, const py::object& losses, const py::object& total, const py::object& softmax_sums) {
    const Inputs inputs(hidden, weight, target, bias, ignored);
    const int64_t rows = inputs.hidden.size(0);
    const auto of_rows = Tensor::from_torch(losses, "losses");
    of_rows.expect(DType::float32).expect_shape({rows}).expect_contiguous();
    const auto of_all = optional_tensor(total, "total");
    if (of_all) of_all->expect(DType::float32).expect_shape({});
    const auto kept = optional_tensor(softmax_sums, "softmax_sums");
    if (kept) kept->expect(DType::float32).expect_shape({2, rows}).expect_contiguous();
    const LinearCrossEntropyForward arguments{
        inputs.view(), mean, of_rows.data_as<float>(), of_all ? of_all->data_as<float>() : nullptr,
        kept ? kept->data_as<float>() : nullptr};
    const auto kernel = RXT_KERNEL(linear_cross_entropy_forward);
    const auto scratch_size = RXT_KERNEL(linear_cross_entropy_forward_scratch);
    py::gil_scoped_release released;
    kernel(arguments, Scratch::floats(scratch_size(arguments)));
}

void backward(const py::object& loss_gradients, const py::object& softmax_sums, const py::object& hidden,
              const py::object& weight, const py::object& target, const py::object& bias, int64_t ignored,
              const py::object& hidden_gradient, const py::object& weight_gradient, const py::object& bias_gradient) {
    const Inputs inputs(hidden, weight, target, bias, ignored);
    const DType dtype = inputs.hidden.dtype();
    const int64_t rows = inputs.hidden.size(0), classes = inputs.weight.size(0), dim = inputs.hidden.size(1);
    const auto incoming = Tensor::from_torch(loss_gradients, "loss_gradients");
    incoming.expect(DType::float32).expect_shape({rows}).expect_contiguous();
    const auto kept = Tensor::from_torch(softmax_sums, "softmax_sums");
    kept.expect(DType::float32).expect_shape({2, rows}).expect_contiguous();
    const auto of_hidden = Tensor::from_torch(hidden_gradient, "hidden_gradient");
    of_hidden.expect(dtype).expect_shape({rows, dim}).expect_contiguous();
    const auto of_weight = Tensor::from_torch(weight_gradient, "weight_gradient");
    of_weight.expect(dtype).expect_shape({classes, dim}).expect_contiguous();
    const auto of_bias = optional_tensor(bias_gradient, "bias_gradient");
    if (of_bias.has_value() != inputs.bias.has_value()) {
        throw py::value_error("bias and bias_gradient are given both or neither.");
    }
    if (of_bias) of_bias->expect(dtype).expect_shape({classes}).expect_contiguous();
    const LinearCrossEntropyBackward arguments{
        inputs.view(), kept.data_as<float>(), incoming.data_as<float>(), of_hidden.data(), of_weight.data(),
        of_bias ? of_bias->data() : nullptr};
    const auto kernel = RXT_KERNEL(linear_cross_entropy_backward);
    const auto scratch_size = RXT_KERNEL(linear_cross_entropy_backward_scratch);
    py::gil_scoped_release released;
    kernel(arguments, Scratch::floats(scratch_size(arguments)));
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
    module.def("linear_cross_entropy_forward", &forward, py::arg("hidden"), py::arg("weight"), py::arg("target"),
               py::arg("bias"), py::arg("ignored"), py::arg("mean"), py::arg("losses"), py::arg("total"),
               py::arg("softmax_sums"));
    module.def("linear_cross_entropy_backward", &backward, py::arg("loss_gradients"), py::arg("softmax_sums"),
               py::arg("hidden"), py::arg("weight"), py::arg("target"), py::arg("bias"), py::arg("ignored"),
               py::arg("hidden_gradient"), py::arg("weight_gradient"), py::arg("bias_gradient"));
}

}  // namespace rxt
