#include "core/tensor.h"
#include "memory_update/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

Tensor contiguous_like(const py::object& object, const char* name, const Tensor& like) {
    auto tensor = Tensor::from_torch(object, name);
    tensor.expect(like.dtype()).expect_shape({like.size(0), like.size(1), like.size(2)}).expect_contiguous();
    return tensor;
}

// A flat fp32 parameter of so many values, or None.
std::optional<Tensor> parameter(const py::object& object, const char* name, int64_t count) {
    auto tensor = optional_tensor(object, name);
    if (tensor) tensor->expect(DType::float32).expect_shape({count}).expect_contiguous();
    return tensor;
}

const float* values_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_as<float>() : nullptr; }

GateKind gate_kind(const std::string& kind) {
    if (kind == "add") return GateKind::add;
    if (kind == "static") return GateKind::constant;
    if (kind == "elementwise") return GateKind::elementwise;
    if (kind == "linear") return GateKind::linear;
    throw py::value_error("kind is '" + kind + "'; accepted are add, static, elementwise and linear.");
}

void bind_gate(const py::object& old, const py::object& added, const std::string& kind, bool tanh, bool per_slot,
               const py::object& weight, const py::object& bias, const py::object& status_weight, double status_bias,
               const py::object& status, const py::object& out) {
    const auto before = Tensor::from_torch(old, "old");
    before.expect({DType::float32, DType::bfloat16}).expect_dimensions(3).expect_contiguous();
    const int64_t batch = before.size(0), slots = before.size(1), width = before.size(2);
    const auto change = contiguous_like(added, "new", before), result = contiguous_like(out, "out", before);
    const GateKind which = gate_kind(kind);
    const int64_t outputs = per_slot ? slots : 1;
    const auto weights = parameter(weight, "weight", which == GateKind::linear ? outputs * slots : outputs);
    const auto biases = parameter(bias, "bias", outputs);
    const auto projection = parameter(status_weight, "status_weight", width);
    if ((which != GateKind::add) != weights.has_value() || (which == GateKind::linear) != biases.has_value()) {
        throw py::value_error("weight is given for every kind but add, and bias for linear only.");
    }
    const auto scratch = Tensor::from_torch(status, "status");
    scratch.expect(DType::float32).expect_shape({batch, slots}).expect_contiguous();
    const ResidualGate arguments{
        before.dtype(), which, tanh, per_slot, batch, slots, width, before.data(), change.data(), values_of(weights),
        values_of(biases), values_of(projection), static_cast<float>(status_bias), scratch.data_as<float>(), result.data()};
    const auto kernel = RXT_KERNEL(residual_gate);
    py::gil_scoped_release released;
    kernel(arguments);
}

void bind_norm(const py::object& x, bool layer, const py::object& scale, const py::object& gate,
               const py::object& given_rms, const py::object& weight, const py::object& bias, bool scale_per_slot,
               bool gate_per_slot, const py::object& out) {
    const auto input = Tensor::from_torch(x, "x");
    input.expect({DType::float32, DType::bfloat16}).expect_dimensions(3).expect_contiguous();
    const int64_t slots = input.size(1), width = input.size(2);
    const auto result = contiguous_like(out, "out", input);
    const auto scales = parameter(scale, "scale", scale_per_slot ? slots : width);
    const auto gates = parameter(gate, "gate", gate_per_slot ? slots : 1);
    const auto rms = parameter(given_rms, "given_rms", slots);
    const auto weights = parameter(weight, "weight", width), biases = parameter(bias, "bias", width);
    if (!scales || !gates || layer != weights.has_value() || layer != biases.has_value()) {
        throw py::value_error("scale and gate are given always, weight and bias for a layer norm only.");
    }
    const MemoryNorm arguments{
        input.dtype(), layer ? MemoryNormKind::layer : MemoryNormKind::plain, input.size(0) * slots, slots, width,
        input.data(), values_of(scales), scale_per_slot, values_of(gates), gate_per_slot, values_of(rms),
        values_of(weights), values_of(biases), result.data()};
    const auto kernel = RXT_KERNEL(memory_norm);
    py::gil_scoped_release released;
    kernel(arguments);
}

}  // namespace

void bind_memory_update(py::module_& module) {
    module.def("residual_gate", &bind_gate, py::arg("old"), py::arg("new"), py::arg("kind"), py::arg("tanh"),
               py::arg("per_slot"), py::arg("weight"), py::arg("bias"), py::arg("status_weight"), py::arg("status_bias"),
               py::arg("status"), py::arg("out"));
    module.def("memory_norm", &bind_norm, py::arg("x"), py::arg("layer"), py::arg("scale"), py::arg("gate"),
               py::arg("given_rms"), py::arg("weight"), py::arg("bias"), py::arg("scale_per_slot"),
               py::arg("gate_per_slot"), py::arg("out"));
}

}  // namespace rxt
