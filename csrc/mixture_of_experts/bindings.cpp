#include <algorithm>
#include <memory>
#include <vector>

#include "core/scratch.h"
#include "core/tensor.h"
#include "mixture_of_experts/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

// Whether kernels need a copy of the rows in float32.
bool is_narrow(const Tensor& rows) { return rows.dtype() != DType::float32; }

Tensor float_tensor(const py::object& object, const char* name, std::initializer_list<int64_t> shape) {
    auto tensor = Tensor::from_torch(object, name);
    tensor.expect(DType::float32).expect_shape(shape).expect_contiguous();
    return tensor;
}

Activation activation_named(const std::string& name) {
    if (name == "silu" || name == "swish") return Activation::silu;
    if (name == "relu") return Activation::relu;
    if (name == "gelu") return Activation::gelu;
    if (name == "sigmoid") return Activation::sigmoid;
    if (name == "linear") return Activation::linear;
    throw py::value_error("activation is '" + name + "'; accepted are silu, swish, relu, gelu, sigmoid and linear.");
}

// x (tokens, dim) and the router's weight (experts, dim).
struct RouterTensors {
    Tensor x, weight;

    RouterTensors(const py::object& x_object, const py::object& weight_object)
        : x(Tensor::from_torch(x_object, "x")), weight(Tensor::from_torch(weight_object, "router_weight")) {
        x.expect({DType::float32, DType::bfloat16}).expect_dimensions(2).expect_contiguous_rows();
        weight.expect(x.dtype()).expect_shape({-1, x.size(1)}).expect_contiguous();
    }
};

void expect_top_k(int64_t top_k, int64_t experts) {
    if (top_k < 1 || top_k > experts) {
        throw py::value_error("top_k is " + std::to_string(top_k) + "; accepted is from 1 to the number of experts, " +
                              std::to_string(experts) + ".");
    }
}

void bind_route_forward(const py::object& x, const py::object& router_weight, bool rounds, bool by_index,
                        const py::object& logits, const py::object& weights, const py::object& chosen,
                        const py::object& loss) {
    const RouterTensors router(x, router_weight);
    const int64_t tokens = router.x.size(0), dim = router.x.size(1), experts = router.weight.size(0);
    const auto places = Tensor::from_torch(chosen, "chosen");
    places.expect(DType::int64).expect_shape({tokens, -1}).expect_contiguous();
    const int64_t top_k = places.size(1);
    expect_top_k(top_k, experts);
    const auto kept_logits = float_tensor(logits, "logits", {tokens, experts});
    const auto shares = float_tensor(weights, "weights", {tokens, top_k});
    const auto total = float_tensor(loss, "loss", {});
    const bool rounds_inputs = rounds && router.x.dtype() == DType::float32;
    const bool copies = rounds_inputs || is_narrow(router.x);
    Pieces pieces;
    const int64_t inputs = pieces.add(copies ? tokens * dim : 0), probabilities = pieces.add(tokens * experts);
    const int64_t sums = pieces.add(tokens);
    float* scratch = Scratch::floats(pieces.total());
    const RouterForward arguments{
        router.x.dtype(), rounds_inputs, rounds, by_index, tokens, experts, top_k, dim, router.x.data(),
        router.x.stride(0), router.weight.data(), kept_logits.data_as<float>(), shares.data_as<float>(),
        places.data_as<int64_t>(), total.data_as<float>(), copies ? scratch + inputs : nullptr, scratch + probabilities,
        scratch + sums};
    const auto kernel = RXT_KERNEL(route_forward);
    py::gil_scoped_release released;
    kernel(arguments);
}

void expect_experts(const Tensor& chosen, int64_t experts) {
    const auto* numbers = chosen.data_as<int64_t>();
    for (int64_t i = 0; i < chosen.elements(); ++i) {
        if (numbers[i] >= 0 && numbers[i] < experts) continue;
        throw py::value_error("chosen holds " + std::to_string(numbers[i]) + "; accepted is from 0 to " +
                              std::to_string(experts - 1) + ", the number of the last expert.");
    }
}

void bind_route_backward(const py::object& x, const py::object& router_weight, bool rounds, const py::object& logits,
                         const py::object& chosen, const py::object& weights_gradient, const py::object& loss_gradient,
                         const py::object& x_gradient, const py::object& router_gradient) {
    const RouterTensors router(x, router_weight);
    const DType dtype = router.x.dtype();
    const int64_t tokens = router.x.size(0), dim = router.x.size(1), experts = router.weight.size(0);
    const auto places = Tensor::from_torch(chosen, "chosen");
    places.expect(DType::int64).expect_shape({tokens, -1}).expect_contiguous();
    expect_experts(places, experts);
    const auto kept_logits = float_tensor(logits, "logits", {tokens, experts});
    const auto incoming = float_tensor(weights_gradient, "weights_gradient", {tokens, places.size(1)});
    const auto through_loss = float_tensor(loss_gradient, "loss_gradient", {});
    const auto outgoing = Tensor::from_torch(x_gradient, "x_gradient");
    outgoing.expect(dtype).expect_shape({tokens, dim}).expect_contiguous();
    const auto of_weight = Tensor::from_torch(router_gradient, "router_gradient");
    of_weight.expect(dtype).expect_shape({experts, dim}).expect_contiguous();
    const bool rounds_inputs = rounds && dtype == DType::float32;
    const bool copies = rounds_inputs || is_narrow(router.x);
    Pieces pieces;
    const int64_t inputs = pieces.add(copies ? tokens * dim : 0), logits_gradient = pieces.add(tokens * experts);
    float* scratch = Scratch::floats(pieces.total());
    const RouterBackward arguments{
        dtype, rounds_inputs, tokens, experts, places.size(1), dim, router.x.data(), router.x.stride(0),
        router.weight.data(), kept_logits.data_as<float>(), places.data_as<int64_t>(), incoming.data_as<float>(),
        through_loss.data_as<float>(), outgoing.data(), of_weight.data(), copies ? scratch + inputs : nullptr,
        scratch + logits_gradient};
    const auto kernel = RXT_KERNEL(route_backward);
    py::gil_scoped_release released;
    kernel(arguments);
}

// One matrix or bias per expert, from one stacked tensor or from a list of one each. None stands for an expert that got no
// token, where that is allowed.
class PerExpert {
public:
    PerExpert(const py::object& object, const char* name, DType dtype, int64_t experts, std::vector<int64_t> shape)
        : name_(name), dtype_(dtype), shape_(std::move(shape)) {
        if (py::isinstance<py::list>(object)) {
            const auto items = py::reinterpret_borrow<py::list>(object);
            if (static_cast<int64_t>(items.size()) != experts) {
                throw py::value_error(name_ + " has " + std::to_string(items.size()) + " tensors; accepted is one per expert, " +
                                      std::to_string(experts) + ".");
            }
            for (const auto& item : items) add(item);
        } else {
            const auto stack = Tensor::from_torch(object, name);
            if (shape_.size() == 2) {
                stack.expect(dtype).expect_shape({experts, shape_[1], shape_[0]});
            } else {
                stack.expect(dtype).expect_shape({experts, shape_[0]});
            }
            const int64_t step = stack.stride(0) * (dtype == DType::float32 ? 4 : 2);
            for (int64_t e = 0; e < experts; ++e)
                add_at(static_cast<char*>(stack.data()) + e * step, stack.stride(-1), stack.stride(1));
            owners_.push_back(stack);
        }
    }

    // What stacked and separate matrices have in common: outputs, inputs, and strides of which one is 1.
    const Matrix* matrices() const { return matrices_.data(); }
    void* const* addresses() const { return addresses_.data(); }
    bool has(int64_t expert) const { return addresses_[expert] != nullptr; }

    void expect_contiguous() const {
        for (const auto& owner : owners_) owner.expect_contiguous();
    }

private:
    void add(py::handle item) {
        if (item.is_none()) return add_at(nullptr, 1, 1);
        const auto tensor = Tensor::from_torch(item, name_.c_str());
        if (shape_.size() == 2) {
            tensor.expect(dtype_).expect_shape({shape_[0], shape_[1]});
        } else {
            tensor.expect(dtype_).expect_shape({shape_[0]});
        }
        add_at(tensor.data(), tensor.stride(0), tensor.stride(-1));
        owners_.push_back(tensor);
    }

    void add_at(void* address, int64_t output_stride, int64_t input_stride) {
        addresses_.push_back(address);
        if (shape_.size() != 2) {
            if (output_stride == 1 || shape_[0] <= 1) return;
            throw py::value_error(name_ + " has stride " + std::to_string(output_stride) +
                                  " in its last dimension; accepted is 1: make it so with .contiguous().");
        }
        if (shape_[0] == 1) output_stride = input_stride == 1 ? shape_[1] : 1;
        if (shape_[1] == 1) input_stride = output_stride == 1 ? shape_[0] : 1;
        if (output_stride != 1 && input_stride != 1) {
            throw py::value_error(name_ + " has no dimension of stride 1; make it contiguous with .contiguous().");
        }
        matrices_.push_back({address, shape_[0], shape_[1], output_stride, input_stride});
    }

    std::string name_;
    DType dtype_;
    std::vector<int64_t> shape_;
    std::vector<Tensor> owners_;
    std::vector<void*> addresses_;
    std::vector<Matrix> matrices_;
};

// Choices sorted by expert, in rounds of neighbouring experts, and blocks of neighbours in each. `row` is how many floats are computed
// for a place.
class GroupedChoices {
public:
    GroupedChoices(const int64_t* chosen, int64_t choices, int64_t top_k, int64_t experts, int64_t row)
        : order_(choices), tokens_(choices), starts_(experts + 1) {
        std::vector<int64_t> next(experts + 1);
        for (int64_t i = 0; i < choices; ++i) ++starts_[chosen[i] + 1];
        for (int64_t e = 0; e < experts; ++e) next[e + 1] = starts_[e + 1] += starts_[e];
        for (int64_t i = 0; i < choices; ++i) {
            const int64_t place = next[chosen[i]]++;
            order_[place] = i;
            tokens_[place] = i / top_k;
        }
        const int64_t wanted = std::max<int64_t>(1, floats_of_round / std::max<int64_t>(1, row));
        for (int64_t first = 0, last; first < experts; first = last) {
            for (last = first + 1; last < experts && starts_[last + 1] - starts_[first] <= wanted;) ++last;
            add_round(first, last);
        }
        const RowBlock* own = blocks_.data();
        for (Round& round : rounds_) {
            round.blocks = own;
            own += round.block_count;
        }
    }

    Groups view() const {
        return {order_.data(), tokens_.data(), starts_.data(), rounds_.data(), static_cast<int64_t>(rounds_.size()), few_rows_};
    }

    const std::vector<RowBlock>& blocks() const { return blocks_; }

    int64_t most_places() const {
        int64_t most = 0;
        for (const Round& round : rounds_) most = std::max(most, round.places);
        return most;
    }

private:
    // 8 MiB, a part of a last-level cache.
    static constexpr int64_t floats_of_round = int64_t{1} << 21;

    void add_round(int64_t first, int64_t last) {
        const std::size_t before = blocks_.size();
        for (int64_t e = first; e < last; ++e) {
            const int64_t count = starts_[e + 1] - starts_[e];
            if (count < enough_rows_to_pack) continue;
            const int64_t parts = (count + most_block_rows - 1) / most_block_rows;
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
                blocks_.push_back({e, starts_[e] + begin, end - begin});
            }
        }
        const auto long_count = static_cast<int64_t>(blocks_.size() - before);
        for (int64_t e = first; e < last; ++e) {
            const int64_t count = starts_[e + 1] - starts_[e];
            if (count == 0 || count >= enough_rows_to_pack) continue;
            blocks_.push_back({e, starts_[e], count});
            few_rows_ = std::max(few_rows_, count);
        }
        rounds_.push_back({first, last, starts_[first], starts_[last] - starts_[first], nullptr,
                           static_cast<int64_t>(blocks_.size() - before), long_count});
    }

    std::vector<int64_t> order_, tokens_, starts_;
    std::vector<RowBlock> blocks_;
    std::vector<Round> rounds_;
    int64_t few_rows_ = 1;
};

// What both passes take.
struct ExpertTensors {
    Tensor x, weights, chosen;
    int64_t tokens, dim, top_k, experts, width, hidden;
    PerExpert first, second;
    std::unique_ptr<PerExpert> first_bias, second_bias;
    GroupedChoices groups;
    Activation activation;
    bool gated, gate_first;

    ExpertTensors(const py::object& x_object, const py::object& weights_object, const py::object& chosen_object,
                  const py::object& w1, const py::object& w2, const py::object& b1, const py::object& b2, int64_t experts,
                  int64_t hidden, const std::string& activation_name, bool gated, bool gate_first)
        : x(checked_x(x_object)), weights(Tensor::from_torch(weights_object, "weights")),
          chosen(Tensor::from_torch(chosen_object, "chosen")), tokens(x.size(0)), dim(x.size(1)), top_k(checked_top_k()),
          experts(experts), width(gated ? 2 * hidden : hidden), hidden(hidden),
          first(w1, "w1", x.dtype(), experts, {width, dim}), second(w2, "w2", x.dtype(), experts, {dim, hidden}),
          groups(checked_choices(), tokens * top_k, top_k, experts, 2 * width + hidden),
          activation(activation_named(activation_name)),
          gated(gated), gate_first(gate_first) {
        if (!b1.is_none()) first_bias.reset(new PerExpert(b1, "b1", x.dtype(), experts, {width}));
        if (!b2.is_none()) second_bias.reset(new PerExpert(b2, "b2", x.dtype(), experts, {dim}));
        for (const auto& block : groups.blocks()) {
            const bool there = first.has(block.expert) && second.has(block.expert) &&
                               (!first_bias || first_bias->has(block.expert)) &&
                               (!second_bias || second_bias->has(block.expert));
            if (!there) throw py::value_error("expert " + std::to_string(block.expert) + " has tokens, but one of its tensors is None.");
        }
    }

    // Floats of scratch that `view` needs.
    int64_t copied() const { return is_narrow(x) ? tokens * dim : 0; }

    Experts view(float* inputs) const {
        return {x.dtype(), activation, gated, gate_first, tokens, top_k, experts, dim, hidden, x.data(), x.stride(0),
                weights.data_as<float>(), groups.view(), first.matrices(), second.matrices(),
                first_bias ? first_bias->addresses() : nullptr, second_bias ? second_bias->addresses() : nullptr,
                copied() > 0 ? inputs : nullptr};
    }

private:
    static Tensor checked_x(const py::object& object) {
        auto tensor = Tensor::from_torch(object, "x");
        tensor.expect({DType::float32, DType::bfloat16}).expect_dimensions(2).expect_contiguous_rows();
        return tensor;
    }

    int64_t checked_top_k() const {
        chosen.expect(DType::int64).expect_shape({x.size(0), -1}).expect_contiguous();
        weights.expect(DType::float32).expect_shape({x.size(0), chosen.size(1)}).expect_contiguous();
        if (chosen.size(1) < 1) throw py::value_error("chosen has no column; accepted is at least one expert per token.");
        return chosen.size(1);
    }

    const int64_t* checked_choices() const {
        expect_experts(chosen, experts);
        return chosen.data_as<int64_t>();
    }
};

void bind_experts_forward(const py::object& x, const py::object& weights, const py::object& chosen, const py::object& w1,
                          const py::object& w2, const py::object& b1, const py::object& b2, int64_t experts, int64_t hidden,
                          const std::string& activation, bool gated, bool gate_first, const py::object& output,
                          const py::object& before) {
    const ExpertTensors tensors(x, weights, chosen, w1, w2, b1, b2, experts, hidden, activation, gated, gate_first);
    const int64_t choices = tensors.tokens * tensors.top_k;
    const auto result = Tensor::from_torch(output, "output");
    result.expect({DType::float32, tensors.x.dtype()}).expect_shape({tensors.tokens, tensors.dim}).expect_contiguous();
    std::optional<Tensor> kept;
    if (!before.is_none()) kept = float_tensor(before, "before", {choices, tensors.width});
    Pieces pieces;
    const int64_t inputs = pieces.add(tensors.copied()), units = pieces.add(tensors.groups.most_places() * hidden);
    const int64_t results = pieces.add(choices * tensors.dim);
    float* scratch = Scratch::floats(pieces.total());
    const ExpertsForward arguments{tensors.view(scratch + inputs), result.dtype(), result.data(),
                                   kept ? kept->data_as<float>() : nullptr, scratch + units, scratch + results};
    const auto kernel = RXT_KERNEL(experts_forward);
    py::gil_scoped_release released;
    kernel(arguments);
}

void bind_experts_backward(const py::object& gradient, const py::object& before, const py::object& x,
                           const py::object& weights, const py::object& chosen, const py::object& w1, const py::object& w2,
                           const py::object& b1, const py::object& b2, int64_t experts, int64_t hidden,
                           const std::string& activation, bool gated, bool gate_first, const py::object& x_gradient,
                           const py::object& weights_gradient, const py::object& w1_gradient, const py::object& w2_gradient,
                           const py::object& b1_gradient, const py::object& b2_gradient) {
    const ExpertTensors tensors(x, weights, chosen, w1, w2, b1, b2, experts, hidden, activation, gated, gate_first);
    const DType dtype = tensors.x.dtype();
    const int64_t tokens = tensors.tokens, dim = tensors.dim, width = tensors.width, choices = tokens * tensors.top_k;
    const auto incoming = Tensor::from_torch(gradient, "gradient");
    incoming.expect({DType::float32, dtype}).expect_shape({tokens, dim}).expect_contiguous();
    const auto kept = float_tensor(before, "before", {choices, width});
    const auto of_x = Tensor::from_torch(x_gradient, "x_gradient");
    of_x.expect(dtype).expect_shape({tokens, dim}).expect_contiguous();
    const auto of_weights = float_tensor(weights_gradient, "weights_gradient", {tokens, tensors.top_k});
    const auto gradients_like = [&](const py::object& object, const char* name, std::vector<int64_t> shape) {
        auto found = std::make_unique<PerExpert>(object, name, dtype, experts, std::move(shape));
        found->expect_contiguous();
        for (int64_t e = 0; e < experts; ++e) {
            if (!found->has(e)) throw py::value_error(std::string(name) + " has None for an expert; accepted is a tensor for each.");
        }
        return found;
    };
    const auto of_first = gradients_like(w1_gradient, "w1_gradient", {width, dim});
    const auto of_second = gradients_like(w2_gradient, "w2_gradient", {dim, hidden});
    if (b1_gradient.is_none() != b1.is_none() || b2_gradient.is_none() != b2.is_none()) {
        throw py::value_error("a bias and its gradient are given both or neither.");
    }
    std::unique_ptr<PerExpert> of_first_bias, of_second_bias;
    if (!b1.is_none()) of_first_bias = gradients_like(b1_gradient, "b1_gradient", {width});
    if (!b2.is_none()) of_second_bias = gradients_like(b2_gradient, "b2_gradient", {dim});
    const int64_t hidden_parts = (hidden + hidden_part - 1) / hidden_part;
    const bool copies = is_narrow(incoming);
    Pieces pieces;
    const int64_t inputs = pieces.add(tensors.copied()), gradients = pieces.add(copies ? tokens * dim : 0);
    const int64_t places = tensors.groups.most_places();
    const int64_t units = pieces.add(places * hidden), before_gradient = pieces.add(places * width);
    const int64_t x_parts = pieces.add(choices * dim), products = pieces.add(places * hidden_parts);
    float* scratch = Scratch::floats(pieces.total());
    const ExpertsBackward arguments{
        tensors.view(scratch + inputs), kept.data_as<float>(), incoming.dtype(), incoming.data(), of_x.data(), of_weights.data_as<float>(),
        of_first->matrices(), of_second->matrices(), of_first_bias ? of_first_bias->addresses() : nullptr,
        of_second_bias ? of_second_bias->addresses() : nullptr, copies ? scratch + gradients : nullptr,
        scratch + units, scratch + before_gradient, scratch + x_parts, scratch + products, hidden_parts};
    const auto kernel = RXT_KERNEL(experts_backward);
    py::gil_scoped_release released;
    kernel(arguments);
}

}  // namespace

void bind_mixture_of_experts(py::module_& module) {
    module.def("route_forward", &bind_route_forward, py::arg("x"), py::arg("router_weight"), py::arg("rounds"),
               py::arg("by_index"), py::arg("logits"), py::arg("weights"), py::arg("chosen"),
               py::arg("loss"));
    module.def("route_backward", &bind_route_backward, py::arg("x"), py::arg("router_weight"), py::arg("rounds"),
               py::arg("logits"), py::arg("chosen"), py::arg("weights_gradient"), py::arg("loss_gradient"),
               py::arg("x_gradient"), py::arg("router_gradient"));
    module.def("experts_forward", &bind_experts_forward, py::arg("x"), py::arg("weights"), py::arg("chosen"), py::arg("w1"),
               py::arg("w2"), py::arg("b1"), py::arg("b2"), py::arg("experts"), py::arg("hidden"), py::arg("activation"),
               py::arg("gated"), py::arg("gate_first"), py::arg("output"), py::arg("before"));
    module.def("experts_backward", &bind_experts_backward, py::arg("gradient"), py::arg("before"), py::arg("x"),
               py::arg("weights"), py::arg("chosen"), py::arg("w1"), py::arg("w2"), py::arg("b1"), py::arg("b2"),
               py::arg("experts"), py::arg("hidden"), py::arg("activation"), py::arg("gated"),
               py::arg("gate_first"), py::arg("x_gradient"),
               py::arg("weights_gradient"), py::arg("w1_gradient"), py::arg("w2_gradient"), py::arg("b1_gradient"),
               py::arg("b2_gradient"));
}

}  // namespace rxt
