#include "core/scratch.h"
#include "core/tensor.h"
#include "memory_update/gate_kinds.h"
#include "memory_update/kernels.h"

namespace py = pybind11;

namespace rxt {

void memory_write(const py::object& memory, const py::object& encoded, const py::list& layers, const py::object& mean_norm,
                  int64_t groups, double epsilon, const py::object& key_mask, const py::object& cosine, const py::object& sine,
                  bool split, const py::object& out);

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

float* values_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_as<float>() : nullptr; }

// The tensors of a call, kept alive beside the pointers to them.
struct Gate {
    Tensor old, added, status;
    std::optional<Tensor> weight, bias, status_weight, before;
    ResidualGate arguments{};
};

Gate check_gate(const py::object& old, const py::object& added, const std::string& kind_name, bool tanh, bool per_slot,
                const py::object& weight, const py::object& bias, const py::object& status_weight, double status_bias,
                const py::object& status, const py::object& before) {
    const GateKind kind = gate_kind(kind_name);
    auto first = Tensor::from_torch(old, "old");
    first.expect({DType::float32, DType::bfloat16}).expect_dimensions(3).expect_contiguous();
    const int64_t batch = first.size(0), slots = first.size(1), width = first.size(2), outputs = per_slot ? slots : 1;
    Gate gate{first,
              contiguous_like(added, "new", first),
              Tensor::from_torch(status, "status"),
              parameter(weight, "weight", kind == GateKind::linear ? outputs * slots : outputs),
              parameter(bias, "bias", outputs),
              parameter(status_weight, "status_weight", width),
              optional_tensor(before, "before")};
    if ((kind != GateKind::add) != gate.weight.has_value() || (kind == GateKind::linear) != gate.bias.has_value()) {
        throw py::value_error("weight is given for every kind but add, and bias for linear only.");
    }
    gate.status.expect(DType::float32).expect_shape({batch, slots}).expect_contiguous();
    if (gate.before) gate.before->expect(DType::float32).expect_shape({batch, slots}).expect_contiguous();
    gate.arguments = {
        first.dtype(), kind, tanh, per_slot, batch, slots, width, first.data(), gate.added.data(), values_of(gate.weight),
        values_of(gate.bias), values_of(gate.status_weight), static_cast<float>(status_bias), gate.status.data_as<float>(),
        gate.before ? gate.before->data_as<float>() : nullptr, nullptr};
    return gate;
}

void bind_gate(const py::object& old, const py::object& added, const std::string& kind, bool tanh, bool per_slot,
               const py::object& weight, const py::object& bias, const py::object& status_weight, double status_bias,
               const py::object& status, const py::object& before, const py::object& out) {
    Gate gate = check_gate(old, added, kind, tanh, per_slot, weight, bias, status_weight, status_bias, status, before);
    const auto result = contiguous_like(out, "out", gate.old);
    gate.arguments.out = result.data();
    const auto kernel = RXT_KERNEL(residual_gate);
    py::gil_scoped_release released;
    kernel(gate.arguments);
}

void bind_gate_backward(const py::object& old, const py::object& added, const std::string& kind, bool tanh, bool per_slot,
                        const py::object& weight, const py::object& bias, const py::object& status_weight,
                        double status_bias, const py::object& status, const py::object& before,
                        const py::object& out_gradient, const py::object& old_gradient, const py::object& new_gradient,
                        const py::object& weight_gradient, const py::object& bias_gradient,
                        const py::object& status_weight_gradient, const py::object& status_bias_gradient) {
    const Gate gate = check_gate(old, added, kind, tanh, per_slot, weight, bias, status_weight, status_bias, status, before);
    if (!gate.weight || !gate.before) throw py::value_error("weight and before are given for a backward pass.");
    const auto incoming = contiguous_like(out_gradient, "out_gradient", gate.old);
    const auto of_old = contiguous_like(old_gradient, "old_gradient", gate.old);
    const auto of_new = contiguous_like(new_gradient, "new_gradient", gate.old);
    const auto of_weight = parameter(weight_gradient, "weight_gradient", gate.weight->elements());
    const auto of_bias = parameter(bias_gradient, "bias_gradient", per_slot ? gate.old.size(1) : 1);
    const auto of_status_weight = parameter(status_weight_gradient, "status_weight_gradient", gate.old.size(2));
    const auto of_status_bias = parameter(status_bias_gradient, "status_bias_gradient", 1);
    const bool learned = gate.status_weight.has_value();
    if (!of_weight || of_bias.has_value() != gate.bias.has_value() || of_status_weight.has_value() != learned ||
        of_status_bias.has_value() != learned) {
        throw py::value_error("gradients are given for every parameter that there is, and for no other.");
    }
    const int64_t rows = gate.old.size(0) * gate.old.size(1);
    auto* scratch = reinterpret_cast<double*>(Scratch::floats(3 * rows));
    const ResidualGateBackward arguments{
        gate.arguments, incoming.data(), of_old.data(), of_new.data(), scratch, reinterpret_cast<float*>(scratch + rows), values_of(of_weight),
        values_of(of_bias), values_of(of_status_weight), values_of(of_status_bias)};
    const auto kernel = RXT_KERNEL(residual_gate_backward);
    py::gil_scoped_release released;
    kernel(arguments);
}

struct Norm {
    Tensor x;
    std::optional<Tensor> scale, gate, given_rms, weight, bias;
    MemoryNorm arguments{};
};

Norm check_norm(const py::object& x, bool layer, const py::object& scale, const py::object& gate,
                const py::object& given_rms, const py::object& weight, const py::object& bias, bool scale_per_slot,
                bool gate_per_slot) {
    auto input = Tensor::from_torch(x, "x");
    input.expect({DType::float32, DType::bfloat16}).expect_dimensions(3).expect_contiguous();
    const int64_t slots = input.size(1), width = input.size(2);
    Norm norm{input,
              parameter(scale, "scale", scale_per_slot ? slots : width),
              parameter(gate, "gate", gate_per_slot ? slots : 1),
              parameter(given_rms, "given_rms", slots),
              parameter(weight, "weight", width),
              parameter(bias, "bias", width)};
    if (!norm.scale || !norm.gate || layer != norm.weight.has_value() || layer != norm.bias.has_value()) {
        throw py::value_error("scale and gate are given always, weight and bias for a layer norm only.");
    }
    norm.arguments = {
        input.dtype(), layer ? MemoryNormKind::layer : MemoryNormKind::plain, input.size(0) * slots, slots, width,
        input.data(), values_of(norm.scale), scale_per_slot, values_of(norm.gate), gate_per_slot,
        values_of(norm.given_rms), values_of(norm.weight), values_of(norm.bias), nullptr};
    return norm;
}

void bind_norm(const py::object& x, bool layer, const py::object& scale, const py::object& gate,
               const py::object& given_rms, const py::object& weight, const py::object& bias, bool scale_per_slot,
               bool gate_per_slot, const py::object& out) {
    Norm norm = check_norm(x, layer, scale, gate, given_rms, weight, bias, scale_per_slot, gate_per_slot);
    const auto result = contiguous_like(out, "out", norm.x);
    norm.arguments.out = result.data();
    const auto kernel = RXT_KERNEL(memory_norm);
    py::gil_scoped_release released;
    kernel(norm.arguments);
}

void bind_norm_backward(const py::object& x, bool layer, const py::object& scale, const py::object& gate,
                        const py::object& given_rms, const py::object& weight, const py::object& bias, bool scale_per_slot,
                        bool gate_per_slot, const py::object& out_gradient, const py::object& x_gradient,
                        const py::object& scale_gradient, const py::object& gate_gradient,
                        const py::object& weight_gradient, const py::object& bias_gradient) {
    const Norm norm = check_norm(x, layer, scale, gate, given_rms, weight, bias, scale_per_slot, gate_per_slot);
    const auto incoming = contiguous_like(out_gradient, "out_gradient", norm.x);
    const auto of_x = contiguous_like(x_gradient, "x_gradient", norm.x);
    const auto of_scale = parameter(scale_gradient, "scale_gradient", norm.scale->elements());
    const auto of_gate = parameter(gate_gradient, "gate_gradient", norm.gate->elements());
    const auto of_weight = parameter(weight_gradient, "weight_gradient", norm.x.size(2));
    const auto of_bias = parameter(bias_gradient, "bias_gradient", norm.x.size(2));
    if (!of_scale || !of_gate || layer != of_weight.has_value() || layer != of_bias.has_value()) {
        throw py::value_error("gradients are given for every parameter that there is, and for no other.");
    }
    auto* scratch = reinterpret_cast<double*>(Scratch::floats(2 * norm.arguments.rows * memory_norm_row_values));
    const MemoryNormBackward arguments{
        norm.arguments, incoming.data(), of_x.data(), scratch,
        values_of(of_scale), values_of(of_gate), values_of(of_weight), values_of(of_bias)};
    const auto kernel = RXT_KERNEL(memory_norm_backward);
    py::gil_scoped_release released;
    kernel(arguments);
}

}  // namespace

void bind_memory_update(py::module_& module) {
    module.def("memory_write", &memory_write, py::arg("memory"), py::arg("encoded"), py::arg("layers"), py::arg("mean_norm"),
               py::arg("groups"), py::arg("epsilon"), py::arg("key_mask"), py::arg("cosine"), py::arg("sine"),
               py::arg("split"), py::arg("out"));
    module.def("residual_gate", &bind_gate, py::arg("old"), py::arg("new"), py::arg("kind"), py::arg("tanh"),
               py::arg("per_slot"), py::arg("weight"), py::arg("bias"), py::arg("status_weight"), py::arg("status_bias"),
               py::arg("status"), py::arg("before"), py::arg("out"));
    module.def("residual_gate_backward", &bind_gate_backward, py::arg("old"), py::arg("new"), py::arg("kind"),
               py::arg("tanh"), py::arg("per_slot"), py::arg("weight"), py::arg("bias"), py::arg("status_weight"),
               py::arg("status_bias"), py::arg("status"), py::arg("before"), py::arg("out_gradient"),
               py::arg("old_gradient"), py::arg("new_gradient"), py::arg("weight_gradient"), py::arg("bias_gradient"),
               py::arg("status_weight_gradient"), py::arg("status_bias_gradient"));
    module.def("memory_norm", &bind_norm, py::arg("x"), py::arg("layer"), py::arg("scale"), py::arg("gate"),
               py::arg("given_rms"), py::arg("weight"), py::arg("bias"), py::arg("scale_per_slot"),
               py::arg("gate_per_slot"), py::arg("out"));
    module.def("memory_norm_backward", &bind_norm_backward, py::arg("x"), py::arg("layer"), py::arg("scale"),
               py::arg("gate"), py::arg("given_rms"), py::arg("weight"), py::arg("bias"), py::arg("scale_per_slot"),
               py::arg("gate_per_slot"), py::arg("out_gradient"), py::arg("x_gradient"), py::arg("scale_gradient"),
               py::arg("gate_gradient"), py::arg("weight_gradient"), py::arg("bias_gradient"));
}

}  // namespace rxt
