#include <algorithm>

#include "core/scratch.h"
#include "core/tensor.h"
#include "sparse_query_attention/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

// The tensors of a call, kept alive beside the pointers to them.
struct Inputs {
    Tensor query, key, value, out;
    std::optional<Tensor> key_lengths, key_mask, query_cosine, query_sine, key_cosine, key_sine, softmax_sums;
    AttentionForward arguments{};
};

HeadStrides strides_of(const Tensor& heads) { return {heads.stride(0), heads.stride(1), heads.stride(2)}; }

RotaryTable rotary_table(const std::optional<Tensor>& cosine, const std::optional<Tensor>& sine, int64_t batch, int64_t time,
                         int64_t head_dim) {
    if (cosine.has_value() != sine.has_value()) throw py::value_error("cosines and sines are given both or neither.");
    if (!cosine) return {nullptr, nullptr, 0, 0};
    if (head_dim % 2 != 0) {
        throw py::value_error("query has heads of " + std::to_string(head_dim) + " values; rotated are an even number of them.");
    }
    for (const Tensor* table : {&*cosine, &*sine}) {
        table->expect(DType::float32).expect_contiguous();
        if (table->dimensions() == 3) {
            table->expect_shape({batch, time, head_dim / 2});
        } else {
            table->expect_shape({time, head_dim / 2});
        }
    }
    if (cosine->dimensions() != sine->dimensions()) {
        throw py::value_error(sine->name() + " has shape " + sine->describe_shape() + "; accepted is that of the cosines, " +
                              cosine->describe_shape() + ".");
    }
    const int64_t half = head_dim / 2;
    return {cosine->data_as<float>(), sine->data_as<float>(), cosine->dimensions() == 3 ? time * half : 0, half};
}

Inputs check(const py::object& query, const py::object& key, const py::object& value, bool causal, const py::object& key_mask,
             const py::object& key_lengths, const py::object& query_cosine, const py::object& query_sine,
             const py::object& key_cosine, const py::object& key_sine, bool split, double scale, const py::object& out,
             const py::object& softmax_sums) {
    Inputs inputs{Tensor::from_torch(query, "query"),
                  Tensor::from_torch(key, "key"),
                  Tensor::from_torch(value, "value"),
                  Tensor::from_torch(out, "out"),
                  optional_tensor(key_lengths, "key_lengths"),
                  optional_tensor(key_mask, "key_mask"),
                  optional_tensor(query_cosine, "query_cosine"),
                  optional_tensor(query_sine, "query_sine"),
                  optional_tensor(key_cosine, "key_cosine"),
                  optional_tensor(key_sine, "key_sine"),
                  optional_tensor(softmax_sums, "softmax_sums")};
    const auto& q = inputs.query.expect({DType::float32, DType::bfloat16}).expect_dimensions(4).expect_contiguous_rows();
    const int64_t batch = q.size(0), query_time = q.size(1), query_heads = q.size(2), head_dim = q.size(3);
    const auto& k = inputs.key.expect(q.dtype()).expect_shape({batch, -1, -1, head_dim}).expect_contiguous_rows();
    const int64_t key_time = k.size(1), key_heads = k.size(2), heads = std::max(query_heads, key_heads);
    inputs.value.expect(q.dtype()).expect_shape({batch, key_time, key_heads, head_dim}).expect_contiguous_rows();
    inputs.out.expect(q.dtype()).expect_shape({batch, query_time, heads, head_dim}).expect_contiguous_rows();
    if (head_dim < 1 || head_dim > attention_largest_head) {
        throw py::value_error("query has heads of " + std::to_string(head_dim) + " values; accepted are 1 to " +
                              std::to_string(attention_largest_head) + ".");
    }
    if (query_heads < 1 || key_heads < 1 || heads % query_heads != 0 || heads % key_heads != 0) {
        throw py::value_error("query has " + std::to_string(query_heads) + " heads and key has " + std::to_string(key_heads) +
                              "; accepted are head counts of which one divides the other.");
    }
    if (inputs.key_lengths) inputs.key_lengths->expect(DType::int64).expect_shape({batch}).expect_contiguous();
    if (inputs.key_mask) inputs.key_mask->expect(DType::boolean).expect_shape({batch, key_time}).expect_contiguous_rows();
    if (inputs.softmax_sums) inputs.softmax_sums->expect(DType::float32).expect_shape({2, batch, heads, query_time}).expect_contiguous();
    inputs.arguments = {
        q.dtype(), batch, query_time, key_time, query_heads, key_heads, head_dim, static_cast<float>(scale), causal, split,
        q.data(), strides_of(q), k.data(), strides_of(k), inputs.value.data(), strides_of(inputs.value),
        inputs.key_lengths ? inputs.key_lengths->data_as<int64_t>() : nullptr,
        inputs.key_mask ? inputs.key_mask->data_as<bool>() : nullptr,
        inputs.key_mask ? inputs.key_mask->stride(0) : 0,
        rotary_table(inputs.query_cosine, inputs.query_sine, batch, query_time, head_dim),
        rotary_table(inputs.key_cosine, inputs.key_sine, batch, key_time, head_dim),
        inputs.out.data(), strides_of(inputs.out),
        inputs.softmax_sums ? inputs.softmax_sums->data_as<float>() : nullptr};
    return inputs;
}

void forward(const py::object& query, const py::object& key, const py::object& value, bool causal, const py::object& key_mask,
             const py::object& key_lengths, const py::object& query_cosine, const py::object& query_sine,
             const py::object& key_cosine, const py::object& key_sine, bool split, double scale, const py::object& out,
             const py::object& softmax_sums) {
    const Inputs inputs = check(query, key, value, causal, key_mask, key_lengths, query_cosine, query_sine, key_cosine, key_sine,
                                split, scale, out, softmax_sums);
    const auto scratch_size = RXT_KERNEL(attention_forward_scratch);
    const auto kernel = RXT_KERNEL(attention_forward);
    py::gil_scoped_release released;
    kernel(inputs.arguments, Scratch::floats(scratch_size(inputs.arguments)));
}

void backward(const py::object& query, const py::object& key, const py::object& value, bool causal, const py::object& key_mask,
              const py::object& key_lengths, const py::object& query_cosine, const py::object& query_sine,
              const py::object& key_cosine, const py::object& key_sine, bool split, double scale, const py::object& out,
              const py::object& softmax_sums, const py::object& out_gradient, const py::object& query_gradient,
              const py::object& key_gradient, const py::object& value_gradient) {
    const Inputs inputs = check(query, key, value, causal, key_mask, key_lengths, query_cosine, query_sine, key_cosine, key_sine,
                                split, scale, out, softmax_sums);
    const AttentionForward& a = inputs.arguments;
    if (a.softmax_sums == nullptr) throw py::value_error("softmax_sums is None; accepted is what the forward pass wrote.");
    const auto incoming = Tensor::from_torch(out_gradient, "out_gradient");
    incoming.expect(a.dtype).expect_shape({a.batch, a.query_time, inputs.out.size(2), a.head_dim}).expect_contiguous_rows();
    const auto like = [&](const py::object& object, const char* name, int64_t time, int64_t heads) {
        auto tensor = Tensor::from_torch(object, name);
        tensor.expect(a.dtype).expect_shape({a.batch, time, heads, a.head_dim}).expect_contiguous();
        return tensor;
    };
    const auto to_query = like(query_gradient, "query_gradient", a.query_time, a.query_heads);
    const auto to_key = like(key_gradient, "key_gradient", a.key_time, a.key_heads);
    const auto to_value = like(value_gradient, "value_gradient", a.key_time, a.key_heads);
    const AttentionBackward arguments{a, incoming.data(), strides_of(incoming), to_query.data(), to_key.data(), to_value.data()};
    const auto scratch_size = RXT_KERNEL(attention_backward_scratch);
    const auto kernel = RXT_KERNEL(attention_backward);
    py::gil_scoped_release released;
    kernel(arguments, Scratch::floats(scratch_size(arguments)));
}

}  // namespace

void bind_sparse_query_attention(py::module_& module) {
    module.def("attention_forward", &forward, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("causal"),
               py::arg("key_mask"), py::arg("key_lengths"), py::arg("query_cosine"), py::arg("query_sine"),
               py::arg("key_cosine"), py::arg("key_sine"), py::arg("split"), py::arg("scale"), py::arg("out"),
               py::arg("softmax_sums"));
    module.def("attention_backward", &backward, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("causal"),
               py::arg("key_mask"), py::arg("key_lengths"), py::arg("query_cosine"), py::arg("query_sine"),
               py::arg("key_cosine"), py::arg("key_sine"), py::arg("split"), py::arg("scale"), py::arg("out"),
               py::arg("softmax_sums"), py::arg("out_gradient"), py::arg("query_gradient"), py::arg("key_gradient"),
               py::arg("value_gradient"));
}

}  // namespace rxt
