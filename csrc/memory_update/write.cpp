// The whole memory write of all layers in one call: norms, projections, attention and gates follow each other without Python in
// between, and what passes from one to the next stays in scratch that the thread keeps.
//
// Everything is computed in fp32, but products of a model in bfloat16 where pairs of that are faster. Layers follow each other, since each is work for every core as it is.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/scratch.h"
#include "core/team.h"
#include "core/tensor.h"
#include "matmul/kernels.h"
#include "memory_update/gate_kinds.h"
#include "memory_update/kernels.h"
#include "rms_norm/kernels.h"
#include "sparse_query_attention/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

// Sizes of a call. A memory of one row serves every row of the batch.
struct Sizes {
    int64_t layers, memories, batch, slots, time, width;

    int64_t memory_rows() const { return memories * slots; }
    int64_t written_rows() const { return batch * slots; }
    int64_t encoded_rows() const { return batch * time; }
};

// Tensors that Python gave, kept as long as the call runs.
class Kept {
public:
    const float* floats(const py::handle& object, const char* name, int64_t count) {
        if (object.is_none()) return nullptr;
        tensors_.push_back(Tensor::from_torch(object, name));
        tensors_.back().expect(DType::float32).expect_shape({count}).expect_contiguous();
        return tensors_.back().data_as<float>();
    }
    const float* required(const py::handle& object, const char* name, int64_t count) {
        if (object.is_none()) throw py::value_error(std::string(name) + " is None; accepted is a tensor.");
        return floats(object, name, count);
    }
    // (outputs, inputs), as torch.nn.Linear has it; x, out and scratch are for the caller.
    Projection weight(const py::handle& object, const char* name, int64_t outputs, int64_t inputs) {
        tensors_.push_back(Tensor::from_torch(object, name));
        const Tensor& own = tensors_.back();
        own.expect({DType::float32, DType::bfloat16}).expect_shape({outputs, inputs}).expect_contiguous_rows();
        Projection result{};
        result.outputs = outputs;
        result.inputs = inputs;
        result.weight_dtype = own.dtype();
        result.weight = own.data();
        result.output_stride = own.stride(0);
        return result;
    }

private:
    std::vector<Tensor> tensors_;
};

// ("rms", weight), or (kind, scale, gate, given_rms, weight, bias, scale_per_slot, gate_per_slot).
struct Norm {
    const float* rms_weight = nullptr;
    MemoryNorm memory{};

    Norm() = default;
    Norm(const py::handle& object, const Sizes& sizes, Kept& kept) {
        const auto parts = py::cast<py::tuple>(object);
        if (parts.size() == 2) {
            rms_weight = kept.required(parts[1], "weight", sizes.width);
            return;
        }
        memory.dtype = DType::float32;
        memory.kind = parts[0].cast<std::string>() == "layer" ? MemoryNormKind::layer : MemoryNormKind::plain;
        memory.slots = sizes.slots;
        memory.width = sizes.width;
        memory.scale_per_slot = parts[6].cast<bool>();
        memory.gate_per_slot = parts[7].cast<bool>();
        memory.scale = kept.required(parts[1], "scale", memory.scale_per_slot ? sizes.slots : sizes.width);
        memory.gate = kept.required(parts[2], "gate", memory.gate_per_slot ? sizes.slots : 1);
        memory.given_rms = kept.floats(parts[3], "given_rms", sizes.slots);
        memory.weight = kept.floats(parts[4], "weight", sizes.width);
        memory.bias = kept.floats(parts[5], "bias", sizes.width);
        const bool layer = memory.kind == MemoryNormKind::layer;
        if (layer != (memory.weight != nullptr) || layer != (memory.bias != nullptr)) {
            throw py::value_error("weight and bias are given for a layer norm only.");
        }
    }
};

// (kind, tanh, per_slot, weight, bias, status_weight, status_bias).
struct Gate {
    ResidualGate gate{};

    Gate() = default;
    Gate(const py::handle& object, const Sizes& sizes, Kept& kept) {
        const auto parts = py::cast<py::tuple>(object);
        const auto kind = parts[0].cast<std::string>();
        gate.dtype = DType::float32;
        gate.kind = kind == "replace" ? GateKind::replace : gate_kind(kind);
        gate.tanh = parts[1].cast<bool>();
        gate.per_slot = parts[2].cast<bool>();
        gate.slots = sizes.slots;
        gate.width = sizes.width;
        const int64_t outputs = gate.per_slot ? sizes.slots : 1;
        const bool has_weight = gate.kind != GateKind::replace && gate.kind != GateKind::add;
        if (has_weight) {
            const int64_t count = gate.kind == GateKind::linear ? outputs * sizes.slots : outputs;
            gate.weight = kept.required(parts[3], "weight", count);
        }
        if (gate.kind == GateKind::linear) gate.bias = kept.required(parts[4], "bias", outputs);
        gate.status_weight = kept.floats(parts[5], "status_weight", sizes.width);
        gate.status_bias = parts[6].cast<float>();
    }
};

// (query, key, value, output, output bias, gate, query heads, key/value heads, head_dim).
struct Attention {
    Projection query{}, key{}, value{}, output{}, gate{};
    int64_t query_heads = 0, key_heads = 0, head_dim = 0;
    bool gated = false;

    int64_t mixed() const { return std::max(query_heads, key_heads) * head_dim; }
    int64_t query_width() const { return query_heads * head_dim; }
    int64_t key_width() const { return key_heads * head_dim; }

    Attention() = default;
    Attention(const py::handle& object, const Sizes& sizes, Kept& kept) {
        const auto parts = py::cast<py::tuple>(object);
        query_heads = parts[6].cast<int64_t>();
        key_heads = parts[7].cast<int64_t>();
        head_dim = parts[8].cast<int64_t>();
        if (query_heads < 1 || key_heads < 1 || (query_heads % key_heads != 0 && key_heads % query_heads != 0) ||
            head_dim < 1 || head_dim > attention_largest_head) {
            throw py::value_error("heads are " + std::to_string(query_heads) + " and " + std::to_string(key_heads) + " of " +
                                  std::to_string(head_dim) + " values; accepted are counts of which one divides the other, and 1 to " +
                                  std::to_string(attention_largest_head) + " values.");
        }
        query = kept.weight(parts[0], "query", query_width(), sizes.width);
        key = kept.weight(parts[1], "key", key_width(), sizes.width);
        value = kept.weight(parts[2], "value", key_width(), sizes.width);
        output = kept.weight(parts[3], "output", sizes.width, mixed());
        output.bias = kept.floats(parts[4], "output_bias", sizes.width);
        gated = !parts[5].is_none();
        if (gated) gate = kept.weight(parts[5], "gate", mixed(), sizes.width);
    }
};

struct Layer {
    Norm memory_norm, context_norm;
    const float* input_norm = nullptr;
    Attention attention, context_attention;
    Gate residual, context, interlayer;
};

// What one attention reads besides its inputs.
struct Keys {
    int64_t batch, time;
    const bool* mask;
    int64_t mask_stride;
    RotaryTable rotary;
    bool split;
};

class MemoryWrite {
public:
    Sizes sizes{};
    std::vector<Layer> layers;
    Norm mean_norm;
    int64_t groups = 0;  // of layers that share a mean; 0: no layer reads one
    bool reads_own = false, blends = false;  // context attention at all; a gate between own memory and the mean
    const float *memory = nullptr, *encoded = nullptr;
    int64_t memory_stride = 0, encoded_stride = 0;
    float* out = nullptr;
    float epsilon = 0.0f;
    Keys interaction{};

    void run() {
        kernels_ = {RXT_KERNEL(rms_norm_forward), RXT_KERNEL(memory_norm), RXT_KERNEL(project), RXT_KERNEL(attention_forward),
                    RXT_KERNEL(attention_forward_scratch), RXT_KERNEL(residual_gate), RXT_KERNEL(mean_of_layers),
                    RXT_KERNEL(gate_heads)};
        reserve();
        const int64_t elements = sizes.memory_rows() * sizes.width;
        const int64_t layers_per_group = groups > 0 ? sizes.layers / groups : 1;
        // Every thread comes by every kernel, whose loops they share; nothing but those loops writes.
        in_team_of_loops(omp_get_max_threads(), [&](const Team& team) {
            for (int64_t group = 0; group < groups; ++group) {
                kernels_.mean({layers_per_group, memory_stride, elements, memory + group * layers_per_group * memory_stride, own_});
                norm(mean_norm, own_, means_ + group * elements);
            }
            for (int64_t index = 0; index < sizes.layers; ++index) write_layer(team, index, elements);
        });
    }

private:
    struct Kernels {
        void (*rms_norm)(const RmsNormForward&);
        void (*memory_norm)(const MemoryNorm&);
        void (*project)(const Projection*, int64_t);
        void (*attention)(const AttentionForward&, float*);
        int64_t (*attention_scratch)(const AttentionForward&);
        void (*gate)(const ResidualGate&);
        void (*mean)(const MeanOfLayers&);
        void (*gate_heads)(const GatedHeads&);
    };

    void write_layer(const Team& team, int64_t index, int64_t elements) const {
        const Layer& layer = layers[index];
        const float* state = memory + index * memory_stride;
        if (reads_own) {
            norm(layer.context_norm, state, own_);
            const float* context = own_;
            if (groups > 0) {
                context = means_ + index * groups / sizes.layers * elements;
                if (blends) {
                    gate(team, layer.interlayer, sizes.memories, own_, context, blended_);
                    context = blended_;
                }
            }
            attend(layer.context_attention, own_, context, {sizes.memories, sizes.slots, nullptr, 0, {}, false});
            gate(team, layer.context, sizes.memories, state, written_, state_);
            state = state_;
        }
        norm(layer.memory_norm, state, own_);
        rms_norm(layer.input_norm, encoded + index * encoded_stride, sizes.encoded_rows(), keys_in_);
        attend(layer.attention, own_, keys_in_, interaction);
        float* result = out + index * sizes.written_rows() * sizes.width;
        if (sizes.memories == sizes.batch) {
            gate(team, layer.residual, sizes.batch, state, written_, result);
        } else {
            const int64_t row = sizes.slots * sizes.width;
            for (int64_t b = 0; b < sizes.batch; ++b) gate(team, layer.residual, 1, state, written_ + b * row, result + b * row);
        }
    }

    void rms_norm(const float* weight, const float* x, int64_t rows, float* normed) const {
        kernels_.rms_norm({DType::float32, rows, sizes.width, epsilon, x, sizes.width, nullptr, 0, weight, normed, nullptr, nullptr});
    }

    void norm(const Norm& own, const float* x, float* normed) const {
        if (own.rms_weight != nullptr) return rms_norm(own.rms_weight, x, sizes.memory_rows(), normed);
        MemoryNorm call = own.memory;
        call.rows = sizes.memory_rows();
        call.x = x;
        call.out = normed;
        kernels_.memory_norm(call);
    }

    void gate(const Team& team, const Gate& own, int64_t batch, const float* old, const float* added, float* result) const {
        if (own.gate.kind == GateKind::replace) {
            return team.alone([&] { std::memcpy(result, added, sizeof(float) * batch * sizes.slots * sizes.width); });
        }
        ResidualGate call = own.gate;
        call.batch = batch;
        call.old = old;
        call.new_values = added;
        call.status = status_;
        call.out = result;
        kernels_.gate(call);
    }

    // written_ = attention of the slots over keys.batch rows of other states.
    void attend(const Attention& own, const float* query_input, const float* key_input, const Keys& keys) const {
        std::vector<Projection> products;
        float* packed = packed_;
        const auto add = [&](Projection product, const float* x, int64_t rows, float* target) {
            product.rows = rows;
            product.x = x;
            product.x_stride = product.inputs;
            product.out = target;
            product.out_stride = product.outputs;
            product.packed = packed;
            packed += packed_elements(DType::float32, product.outputs, product.inputs);
            products.push_back(product);
        };
        add(own.query, query_input, sizes.memory_rows(), query_);
        add(own.key, key_input, keys.batch * keys.time, key_);
        add(own.value, key_input, keys.batch * keys.time, value_);
        if (own.gated) add(own.gate, query_input, sizes.memory_rows(), opened_);
        kernels_.project(products.data(), static_cast<int64_t>(products.size()));
        AttentionForward call = attention_call(own, keys);
        call.query = query_;
        call.key = key_;
        call.value = value_;
        call.out = mixed_;
        kernels_.attention(call, attention_scratch_);
        const int64_t rows = keys.batch * sizes.slots;
        if (own.gated) kernels_.gate_heads({rows, sizes.memory_rows(), own.mixed(), opened_, mixed_});
        products.clear();
        packed = packed_;
        add(own.output, mixed_, rows, written_);
        kernels_.project(products.data(), 1);
    }

    // Everything but where its tensors are; how much scratch it takes depends on all of it.
    AttentionForward attention_call(const Attention& own, const Keys& keys) const {
        const auto strides = [&](int64_t time, int64_t width) { return HeadStrides{time * width, width, own.head_dim}; };
        AttentionForward call{};
        call.dtype = DType::float32;
        call.batch = keys.batch;
        call.query_time = sizes.slots;
        call.key_time = keys.time;
        call.query_heads = own.query_heads;
        call.key_heads = own.key_heads;
        call.head_dim = own.head_dim;
        call.scale = 1.0f / std::sqrt(static_cast<float>(own.head_dim));
        call.split = keys.split;
        call.query_strides = strides(sizes.slots, own.query_width());
        if (sizes.memories == 1) call.query_strides.batch = 0;
        call.key_strides = call.value_strides = strides(keys.time, own.key_width());
        call.key_mask = keys.mask;
        call.key_mask_stride = keys.mask_stride;
        call.key_rotary = keys.rotary;
        call.out_strides = strides(sizes.slots, own.mixed());
        call.rounded = own.query.weight_dtype == DType::bfloat16;
        return call;
    }

    void reserve() {
        int64_t query = 0, key = 0, mixed = 0, packed = 0, attention = 0;
        bool gated = false;
        const auto include = [&](const Attention& own, const Keys& keys) {
            query = std::max(query, sizes.memory_rows() * own.query_width());
            key = std::max(key, keys.batch * keys.time * own.key_width());
            mixed = std::max(mixed, std::max(keys.batch, sizes.memories) * sizes.slots * own.mixed());
            const auto elements = [](const Projection& p) { return packed_elements(DType::float32, p.outputs, p.inputs); };
            packed = std::max({packed, elements(own.query) + elements(own.key) + elements(own.value) +
                                           (own.gated ? elements(own.gate) : 0), elements(own.output)});
            attention = std::max(attention, kernels_.attention_scratch(attention_call(own, keys)));
            gated = gated || own.gated;
        };
        for (const Layer& layer : layers) {
            include(layer.attention, interaction);
            if (reads_own) include(layer.context_attention, {sizes.memories, sizes.slots, nullptr, 0, {}, false});
        }
        // Memories that read themselves may be more than those that are written: a batch can be empty.
        const int64_t state = sizes.memory_rows() * sizes.width;
        const int64_t states = std::max(sizes.memory_rows(), sizes.written_rows());
        Pieces pieces;
        const int64_t means = pieces.add(groups * state), own = pieces.add(state), blended = pieces.add(blends ? state : 0),
                      after = pieces.add(reads_own ? state : 0), keys_in = pieces.add(sizes.encoded_rows() * sizes.width),
                      queries = pieces.add(query), keys = pieces.add(key), values = pieces.add(key),
                      opened = pieces.add(gated ? mixed : 0), heads = pieces.add(mixed),
                      written = pieces.add(states * sizes.width), status = pieces.add(states),
                      weights = pieces.add(packed), inner = pieces.add(attention);
        float* scratch = Scratch::floats(pieces.total());
        means_ = scratch + means;
        own_ = scratch + own;
        blended_ = scratch + blended;
        state_ = scratch + after;
        keys_in_ = scratch + keys_in;
        query_ = scratch + queries;
        key_ = scratch + keys;
        value_ = scratch + values;
        opened_ = scratch + opened;
        mixed_ = scratch + heads;
        written_ = scratch + written;
        status_ = scratch + status;
        packed_ = scratch + weights;
        attention_scratch_ = scratch + inner;
    }

    Kernels kernels_{};
    float *means_ = nullptr, *own_ = nullptr, *blended_ = nullptr, *state_ = nullptr, *keys_in_ = nullptr, *query_ = nullptr,
          *key_ = nullptr, *value_ = nullptr, *opened_ = nullptr, *mixed_ = nullptr, *written_ = nullptr, *status_ = nullptr,
          *packed_ = nullptr, *attention_scratch_ = nullptr;
};

}  // namespace

// Layers are tuples (memory_norm, input_norm, attention, residual_gate, context_norm, context_attention, context_gate,
// interlayer_gate); the last four are None where the variant does not read them.
void memory_write(const py::object& memory, const py::object& encoded, const py::list& layers, const py::object& mean_norm,
                  int64_t groups, double epsilon, const py::object& key_mask, const py::object& cosine, const py::object& sine,
                  bool split, const py::object& out) {
    const auto old = Tensor::from_torch(memory, "memory"), heard = Tensor::from_torch(encoded, "encoded");
    const auto result = Tensor::from_torch(out, "out");
    old.expect(DType::float32).expect_dimensions(4).expect_contiguous();
    heard.expect(DType::float32).expect_shape({old.size(0), -1, -1, old.size(3)}).expect_contiguous();
    MemoryWrite write;
    write.sizes = {old.size(0), old.size(1), heard.size(1), old.size(2), heard.size(2), old.size(3)};
    const Sizes& sizes = write.sizes;
    result.expect(DType::float32).expect_shape({sizes.layers, sizes.batch, sizes.slots, sizes.width}).expect_contiguous();
    if (sizes.memories != 1 && sizes.memories != sizes.batch) throw py::value_error("memory has another batch than encoded.");
    if (static_cast<int64_t>(layers.size()) != sizes.layers) throw py::value_error("layers are not as many as memory has.");
    if (groups < 0 || (groups > 0 && (sizes.layers % groups != 0 || mean_norm.is_none()))) {
        throw py::value_error("groups is " + std::to_string(groups) + "; it divides the layers, and has a norm of the mean.");
    }
    Kept kept;
    write.groups = groups;
    if (groups > 0) write.mean_norm = Norm(mean_norm, sizes, kept);
    for (const auto& item : layers) {
        const auto parts = py::cast<py::tuple>(item);
        Layer layer;
        layer.memory_norm = Norm(parts[0], sizes, kept);
        layer.input_norm = kept.required(parts[1], "input_norm", sizes.width);
        layer.attention = Attention(parts[2], sizes, kept);
        layer.residual = Gate(parts[3], sizes, kept);
        const bool reads_own = !parts[4].is_none(), blends = !parts[7].is_none();
        if (write.layers.empty()) write.reads_own = reads_own, write.blends = blends;
        if (reads_own != write.reads_own || blends != write.blends || (groups > 0 && !reads_own) || (blends && groups == 0)) {
            throw py::value_error("layers differ in what they read, or read a mean that there is not.");
        }
        if (reads_own) {
            layer.context_norm = Norm(parts[4], sizes, kept);
            layer.context_attention = Attention(parts[5], sizes, kept);
            layer.context = Gate(parts[6], sizes, kept);
            if (blends) layer.interlayer = Gate(parts[7], sizes, kept);
        }
        write.layers.push_back(layer);
    }
    const auto mask = optional_tensor(key_mask, "key_mask");
    if (mask) mask->expect(DType::boolean).expect_shape({sizes.batch, sizes.time}).expect_contiguous();
    const auto cosines = optional_tensor(cosine, "cosine"), sines = optional_tensor(sine, "sine");
    write.interaction = {sizes.batch, sizes.time, mask ? mask->data_as<bool>() : nullptr, sizes.time, {}, split};
    if (cosines) {
        // (time, pairs), or one such table per row.
        const int64_t pairs = cosines->size(-1);
        for (const Tensor& table : {*cosines, *sines}) {
            table.expect(DType::float32).expect_contiguous();
            const bool per_row = table.dimensions() == 3;
            per_row ? table.expect_shape({sizes.batch, sizes.time, pairs}) : table.expect_shape({sizes.time, pairs});
        }
        for (const Layer& layer : write.layers) {
            if (2 * pairs != layer.attention.head_dim) throw py::value_error("tables of angles do not fit the heads.");
        }
        write.interaction.rotary = {cosines->data_as<float>(), sines->data_as<float>(),
                                    cosines->dimensions() == 3 ? sizes.time * pairs : 0, pairs};
    }
    write.memory = old.data_as<float>();
    write.encoded = heard.data_as<float>();
    write.memory_stride = sizes.memory_rows() * sizes.width;
    write.encoded_stride = sizes.encoded_rows() * sizes.width;
    write.out = result.data_as<float>();
    write.epsilon = static_cast<float>(epsilon);
    py::gil_scoped_release released;
    write.run();
}

}  // namespace rxt
