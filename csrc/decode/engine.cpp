#include "decode/engine.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace rxt {

namespace {

int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t whole_panels(int64_t count) { return panel_count(count) * panel_width; }

ActivationKind activation_of(const std::string& name) {
    if (name == "silu" || name == "swish") return ActivationKind::silu;
    if (name == "relu") return ActivationKind::relu;
    if (name == "gelu") return ActivationKind::gelu;
    if (name == "sigmoid") return ActivationKind::sigmoid;
    if (name == "linear") return ActivationKind::linear;
    if (name == "tanh") return ActivationKind::tanh;
    throw py::value_error("activation is '" + name + "'; accepted are silu, swish, relu, gelu, sigmoid, linear and tanh.");
}

constexpr int64_t tokens_at_once = 256;  // of a long message: its scratch stays small

}  // namespace

void Buffers::Free::operator()(void* memory) const { std::free(memory); }

// What is read together stands together: at every token, memory is looked up by its pages, and there are few large ones.
void* Buffers::make(int64_t bytes) {
    constexpr int64_t line = 64, page = 2 << 20, block = 2 * page;
    const int64_t size = at_least((bytes + line - 1) / line * line, line);
    if (size > left_) {
        left_ = at_least((size + page - 1) / page * page, block);
        void* memory = std::aligned_alloc(page, left_);
        if (memory == nullptr) throw std::bad_alloc();
        blocks_.emplace_back(memory);
        free_ = static_cast<char*>(memory);
#if defined(__linux__)
        madvise(memory, left_, MADV_HUGEPAGE);
#endif
    }
    void* own = free_;
    free_ += size;
    left_ -= size;
    ++count_;
    return own;
}

void Buffers::clear() {
    blocks_.clear();
    free_ = nullptr;
    left_ = 0;
}

const Tensor& Engine::keep(const py::handle& object, const char* name) {
    kept_.push_back(Tensor::from_torch(object, name));
    return kept_.back();
}

const float* Engine::floats(const py::handle& object, const char* name, int64_t count) {
    if (object.is_none()) return nullptr;
    const Tensor& tensor = keep(object, name);
    tensor.expect(DType::float32).expect_shape({count}).expect_contiguous();
    return tensor.data_as<float>();
}

// (data, scales, outputs, inputs, bias), the bias filled up to whole panels.
PackedMatrix Engine::matrix(const py::handle& object, const char* name, int64_t inputs) {
    const auto parts = py::cast<py::tuple>(object);
    PackedMatrix result;
    result.outputs = parts[2].cast<int64_t>();
    result.inputs = parts[3].cast<int64_t>();
    if (result.inputs != inputs) {
        throw py::value_error(std::string(name) + " takes " + std::to_string(result.inputs) + " values; accepted are " +
                              std::to_string(inputs) + ".");
    }
    const Tensor& data = keep(parts[0], name);
    data.expect({DType::float32, DType::bfloat16, DType::int8}).expect_contiguous();
    data.expect_shape({packed_elements(data.dtype(), result.outputs, result.inputs)});
    result.dtype = data.dtype();
    result.data = data.data();
    if (result.dtype != DType::float32) work_.rounded_width = at_least(work_.rounded_width, whole_panels(inputs));
    result.scales = floats(parts[1], "scales", whole_panels(result.outputs));
    if ((result.scales != nullptr) != (result.dtype == DType::int8)) {
        throw py::value_error(std::string(name) + " has scales where it is int8, and only there.");
    }
    result.bias = floats(parts[4], "bias", whole_panels(result.outputs));
    return result;
}

Norm Engine::norm(const py::handle& object, const char* name) {
    const auto parts = py::cast<py::tuple>(object);
    return {floats(parts[0], name, model_.width), floats(parts[1], name, model_.width)};
}

Attention Engine::attention(const py::dict& of, bool with_keys) {
    Attention result;
    result.norm = norm(of["norm"], "norm");
    result.query_heads = of["query_heads"].cast<int64_t>();
    result.key_value_heads = of["key_value_heads"].cast<int64_t>();
    result.head_dim = of["head_dim"].cast<int64_t>();
    result.gated = of["gated"].cast<bool>();
    const int64_t query = result.query_heads, key = result.key_value_heads;
    if (query < 1 || key < 1 || result.head_dim < 1 || (query % key != 0 && key % query != 0)) {
        throw py::value_error("there are " + std::to_string(query) + " query heads and " + std::to_string(key) +
                              " key/value heads; accepted are counts of which one divides the other.");
    }
    if (model_.inverse_frequencies != nullptr && 2 * model_.rotary_pairs != result.head_dim) {
        throw py::value_error("heads have " + std::to_string(result.head_dim) + " values, and rotary frequencies are for " +
                              std::to_string(2 * model_.rotary_pairs) + ".");
    }
    const int64_t mixed = result.output_heads() * result.head_dim;
    result.input = matrix(of["input"], "input projection", model_.width);
    result.output = matrix(of["output"], "output projection", mixed);
    const int64_t expected = (query + (with_keys ? 2 * key : 0)) * result.head_dim + (result.gated ? mixed : 0);
    if (result.input.outputs != expected || result.output.outputs != model_.width) {
        throw py::value_error("the projections of an attention have " + std::to_string(result.input.outputs) + " and " +
                              std::to_string(result.output.outputs) + " outputs; accepted are " + std::to_string(expected) +
                              " and " + std::to_string(model_.width) + ".");
    }
    work_.attention_width = at_least(work_.attention_width, mixed);
    return result;
}

MemoryRead Engine::memory_read(const py::dict& of) {
    MemoryRead result;
    result.attention = attention(of, false);
    result.slots_norm = norm(of["slots_norm"], "slots_norm");
    result.slots = matrix(of["slots"], "slots projection", model_.width);
    result.layer = of["layer"].cast<int64_t>();
    if (result.slots.outputs != 2 * result.attention.key_value_heads * result.attention.head_dim || result.layer < 0) {
        throw py::value_error("the projection of memory slots does not have a key and a value for every head.");
    }
    return result;
}

// Experts of one width, in one packed matrix for each of both products.
void Engine::add_experts(const py::dict& of, std::vector<Expert>& experts) {
    const auto count = of["count"].cast<int64_t>(), width = of["width"].cast<int64_t>();
    const int64_t first_rows = (of["gated"].cast<bool>() ? 2 : 1) * whole_panels(width);
    const int64_t second_rows = whole_panels(model_.width);
    const PackedMatrix first = matrix(of["first"], "first product of experts", model_.width);
    const PackedMatrix second = matrix(of["second"], "second product of experts", width);
    if (first.outputs != count * first_rows || second.outputs != count * second_rows) {
        throw py::value_error("the packed products of experts do not have whole panels for every expert.");
    }
    const auto part = [](const PackedMatrix& whole, int64_t index, int64_t rows, int64_t outputs) {
        PackedMatrix own = whole;
        const int64_t size = whole.dtype == DType::float32 ? 4 : whole.dtype == DType::bfloat16 ? 2 : 1;
        const int64_t bytes = rows / panel_width * panel_elements(whole.dtype, whole.inputs) * size;
        own.outputs = outputs;
        own.data = static_cast<const char*>(whole.data) + index * bytes;
        if (own.scales != nullptr) own.scales += index * rows;
        if (own.bias != nullptr) own.bias += index * rows;
        return own;
    };
    for (int64_t e = 0; e < count; ++e) {
        experts.push_back({part(first, e, first_rows, first_rows), part(second, e, second_rows, model_.width), width});
    }
    work_.hidden_width = at_least(work_.hidden_width, whole_panels(width));
}

FeedForward Engine::feed_forward(const py::dict& of) {
    FeedForward result;
    result.norm = norm(of["norm"], "norm");
    result.gated = of["gated"].cast<bool>();
    result.activation = activation_of(of["activation"].cast<std::string>());
    result.routed_scale = of["routed_scale"].cast<float>();
    result.shared_scale = of["shared_scale"].cast<float>();
    result.output_bias = floats(of["output_bias"], "output_bias", model_.width);
    experts_.emplace_back();
    auto& experts = experts_.back();
    if (!of["routed"].is_none()) add_experts(py::cast<py::dict>(of["routed"]), experts);
    result.routed = static_cast<int64_t>(experts.size());
    if (!of["shared"].is_none()) add_experts(py::cast<py::dict>(of["shared"]), experts);
    result.shared = static_cast<int64_t>(experts.size()) - result.routed;
    result.experts = experts.data();
    if (result.routed > 0) {
        result.router = matrix(of["router"], "router", model_.width);
        result.top_k = of["top_k"].cast<int64_t>();
        if (result.router.outputs != result.routed || result.top_k < 1 || result.top_k > result.routed) {
            throw py::value_error("the router has " + std::to_string(result.router.outputs) + " outputs and top_k is " +
                                  std::to_string(result.top_k) + "; there are " + std::to_string(result.routed) + " experts.");
        }
    }
    if (result.shared > 1) {
        result.shared_gate = matrix(of["shared_gate"], "gate of shared experts", model_.width);
        if (result.shared_gate.outputs != result.shared) throw py::value_error("the gate does not fit the shared experts.");
    }
    work_.router_width =
        at_least(work_.router_width, (result.router.panels() + result.shared_gate.panels()) * panel_width);
    return result;
}

Engine::Engine(const py::dict& decoder, int64_t rows, const std::string& stored)
    : rows_(rows), stored_(stored == "float32" ? DType::float32 : DType::bfloat16) {
    if (rows < 1) throw py::value_error("rows is " + std::to_string(rows) + "; accepted is at least 1.");
    if (stored != "float32" && stored != "bfloat16") {
        throw py::value_error("stored is '" + stored + "'; keys and values are kept in float32 or bfloat16.");
    }
    const Tensor& embedding = keep(decoder["embedding"], "embedding");
    embedding.expect({DType::float32, DType::bfloat16}).expect_dimensions(2).expect_contiguous_rows();
    model_.embedding = embedding.data();
    model_.embedding_dtype = embedding.dtype();
    model_.embedding_stride = embedding.stride(0);
    model_.vocabulary = embedding.size(0);
    model_.width = embedding.size(1);
    if (!decoder["inverse_frequencies"].is_none()) {
        const Tensor& frequencies = keep(decoder["inverse_frequencies"], "inverse_frequencies");
        frequencies.expect(DType::float32).expect_dimensions(1).expect_contiguous();
        model_.inverse_frequencies = frequencies.data_as<float>();
        model_.rotary_pairs = frequencies.size(0);
    }
    model_.splits_pairs = decoder["splits_pairs"].cast<bool>();
    model_.rounds_angles = decoder["rounds_angles"].cast<bool>();
    model_.gate_activation = activation_of(decoder["gate_activation"].cast<std::string>());
    for (const auto& item : decoder["layers"]) {
        const auto of = py::cast<py::dict>(item);
        Layer layer;
        layer.attention = attention(py::cast<py::dict>(of["attention"]), true);
        layer.reads_memory = !of["memory_read"].is_none();
        if (layer.reads_memory) layer.memory = memory_read(py::cast<py::dict>(of["memory_read"]));
        layer.feed_forward = feed_forward(py::cast<py::dict>(of["feed_forward"]));
        layers_.push_back(layer);
    }
    model_.layers = layers_.data();
    model_.layer_count = static_cast<int64_t>(layers_.size());
    model_.causal = !decoder["head"].is_none();
    if (model_.causal) {
        model_.has_head_norm = !decoder["head_norm"].is_none();
        if (model_.has_head_norm) model_.head_norm = norm(decoder["head_norm"], "head_norm");
        model_.head = matrix(decoder["head"], "head", model_.width);
        if (model_.head.outputs != model_.vocabulary) throw py::value_error("the head and the embedding differ in vocabulary.");
    }
    segments_.resize(rows + 1);
    reserve_tokens(decoder["capacity"].cast<int64_t>());
}

KeyValue Engine::key_value(Buffers& buffers, const Attention& like, int64_t rows, int64_t tokens) {
    KeyValue result;
    result.heads = like.key_value_heads;
    result.head_dim = like.head_dim;
    result.capacity = whole_panels(tokens);
    const int64_t size = stored_ == DType::float32 ? 4 : 2;
    result.keys = buffers.make(rows * result.heads * result.key_elements(stored_) * size);
    result.values = buffers.make(rows * result.heads * result.value_elements(stored_) * size);
    return result;
}

// Room for so many tokens per row; what is stored moves along, panel by panel.
void Engine::reserve_tokens(int64_t needed) {
    if (!cache_.empty() && needed <= cache_[0].capacity) return;
    const int64_t size = stored_ == DType::float32 ? 4 : 2;
    Buffers buffers;
    std::vector<KeyValue> grown;
    for (size_t l = 0; l < layers_.size(); ++l) {
        grown.push_back(key_value(buffers, layers_[l].attention, rows_, needed));
        if (cache_.empty()) continue;
        const KeyValue &to = grown.back(), &from = cache_[l];
        const int64_t panel = panel_elements(stored_, from.capacity) * size, wider = panel_elements(stored_, to.capacity) * size;
        for (int64_t head = 0; head < rows_ * from.heads; ++head) {
            std::memcpy(static_cast<char*>(to.keys) + head * to.key_elements(stored_) * size,
                        static_cast<const char*>(from.keys) + head * from.key_elements(stored_) * size,
                        from.key_elements(stored_) * size);
            for (int64_t p = 0; p < panel_count(from.head_dim); ++p)
                std::memcpy(static_cast<char*>(to.values) + head * to.value_elements(stored_) * size + p * wider,
                            static_cast<const char*>(from.values) + head * from.value_elements(stored_) * size + p * panel,
                            panel);
        }
    }
    caches_ = std::move(buffers);
    cache_ = std::move(grown);
}

void Engine::reserve_scratch(int64_t tokens, int64_t keys, int threads) {
    int64_t experts = 1, routing = 0, few_routing = 0;
    for (const Layer& layer : layers_) {
        experts = at_least(experts, layer.feed_forward.experts_per_token());
        routing = at_least(routing, routing_elements(tokens, layer.feed_forward));
        few_routing = at_least(few_routing, routing_elements(few_tokens, layer.feed_forward));
    }
    const int64_t scores = most_attention_rows * whole_panels(keys);
    if (tokens <= work_.tokens && threads <= work_.threads && scores <= work_.score_size) return;
    tokens = at_least(tokens, work_.tokens);
    threads = static_cast<int>(at_least(threads, work_.threads));
    routing = 0;
    for (const Layer& layer : layers_) routing = at_least(routing, routing_elements(tokens, layer.feed_forward));
    scratch_.clear();
    const auto floats = [&](int64_t count) { return static_cast<float*>(scratch_.make(count * int64_t{sizeof(float)})); };
    const int64_t width = model_.width;
    work_.tokens = tokens;
    work_.threads = threads;
    work_.x = floats(tokens * width);
    work_.normed = floats(at_least(tokens, rows_) * width);
    work_.cosines = floats(tokens * model_.rotary_pairs);
    work_.sines = floats(tokens * model_.rotary_pairs);
    work_.queries = floats(tokens * work_.attention_width);
    work_.gates = floats(tokens * work_.attention_width);
    work_.heads = floats(tokens * work_.attention_width);
    work_.router_logits = floats(tokens * work_.router_width);
    work_.hidden = floats(tokens * experts * work_.hidden_width);
    work_.routing = floats(routing);
    work_.score_size = at_least(scores, work_.score_size);
    const int64_t own = at_least(few_tokens * width + few_routing, memory_block * width);
    work_.thread_size = whole_panels(at_least(work_.score_size, own));
    work_.thread = floats(threads * work_.thread_size);
    if (work_.rounded_width > 0) {
        work_.rounded_rows = at_least(at_least(tokens * experts, rows_), memory_block);
        const int64_t count = threads * work_.rounded_rows;
        work_.rounded = static_cast<int16_t*>(scratch_.make(count * work_.rounded_width * int64_t{sizeof(int16_t)}));
        work_.rounded_scales = floats(count);
    }
}

void Engine::set_memory(const py::object& memory, int threads) {
    const Tensor source = Tensor::from_torch(memory, "memory");
    source.expect({DType::float32, DType::bfloat16}).expect_dimensions(4).expect_contiguous_rows();
    int64_t layers = 0;
    for (const Layer& layer : layers_)
        if (layer.reads_memory) layers = at_least(layers, layer.memory.layer + 1);
    if (source.size(0) < layers || (source.size(1) != 1 && source.size(1) != rows_) || source.size(2) < 1 ||
        source.size(3) != model_.width) {
        throw py::value_error("memory has shape " + source.describe_shape() + "; accepted is (at least " +
                              std::to_string(layers) + ", 1 or " + std::to_string(rows_) + ", S, " +
                              std::to_string(model_.width) + ").");
    }
    if (threads < 1) throw py::value_error("threads is below 1.");
    const auto kernel = RXT_KERNEL(store_memory);
    // First the interpreter is let go, then the engine is taken: the other way round, two threads could wait for each other.
    py::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(busy_);
    if (source.size(1) != memory_rows_ || source.size(2) != slots_) {
        memory_.clear();
        memories_.clear();
        memory_rows_ = source.size(1);
        slots_ = source.size(2);
        for (const Layer& layer : layers_)
            if (layer.reads_memory) memory_.push_back(key_value(memories_, layer.memory.attention, memory_rows_, slots_));
    }
    reserve_scratch(1, at_least(slots_, capacity()), threads);
    const StoreMemory arguments{&model_, stored_, memory_.data(), work_, threads, source.dtype(), source.data(),
                                source.stride(0), source.stride(1), source.stride(2), memory_rows_, slots_};
    kernel(arguments);
}

Engine::Tokens Engine::checked(const py::object& tokens, const py::object& rows, const py::object& positions, int threads) const {
    Tokens given{Tensor::from_torch(tokens, "tokens"), Tensor::from_torch(rows, "rows"), Tensor::from_torch(positions, "positions"), 0, 0};
    given.ids.expect(DType::int64).expect_dimensions(1).expect_contiguous();
    given.count = given.ids.size(0);
    given.rows.expect(DType::int64).expect_shape({given.count}).expect_contiguous();
    given.positions.expect(DType::int64).expect_shape({given.count}).expect_contiguous();
    if (given.count < 1) throw py::value_error("tokens are none; accepted is at least one.");
    if (threads < 1) throw py::value_error("threads is below 1.");
    const int64_t *id = given.id(), *row = given.row(), *place = given.place();
    for (int64_t t = 0; t < given.count; ++t) {
        if (id[t] < 0 || id[t] >= model_.vocabulary) {
            throw py::value_error("tokens has " + std::to_string(id[t]) + "; accepted are 0 to " +
                                  std::to_string(model_.vocabulary - 1) + ".");
        }
        const bool follows = t > 0 && row[t] == row[t - 1] && place[t] == place[t - 1] + 1;
        const bool begins = row[t] < rows_ && (t == 0 ? row[t] >= 0 : row[t] > row[t - 1]);
        if (place[t] < 0 || (!follows && !begins) || (!model_.causal && !follows && place[t] != 0)) {
            throw py::value_error("rows and positions: the tokens of a row stand together, in rising position, and rows rise "
                                  "from 0 to " + std::to_string(rows_ - 1) + "; those of an encoder begin at position 0.");
        }
        given.longest = at_least(given.longest, place[t] + 1);
    }
    if (!layers_.empty() && memory_.empty()) {
        for (const Layer& layer : layers_)
            if (layer.reads_memory) throw py::value_error("this engine was given no memory; call set_memory first.");
    }
    return given;
}

void Engine::make_room(const Tokens& given, int64_t at_once, int threads) {
    if (given.longest > capacity()) {
        int64_t room = at_least(capacity(), panel_width);
        while (room < given.longest) room *= 2;
        reserve_tokens(room);
    }
    reserve_scratch(given.count < at_once ? at_least(given.count, rows_) : at_once, at_least(slots_, capacity()), threads);
}

Step Engine::part(const Tokens& given, int64_t first, int64_t last, int threads) {
    const int64_t* row = given.row();
    int64_t segments = 0;
    for (int64_t t = first; t < last; ++t)
        if (t == first || row[t] != row[t - 1]) segments_[segments++] = t - first;
    segments_[segments] = last - first;
    return {&model_, stored_, cache_.data(), memory_.data(), memory_rows_, slots_, work_, threads, last - first,
            given.id() + first, row + first, given.place() + first, segments, segments_.data(), 0, nullptr, 0, nullptr, 0, 0};
}

void Engine::step(const py::object& tokens, const py::object& rows, const py::object& positions, const py::object& logits,
                  int threads) {
    const Tokens given = checked(tokens, rows, positions, threads);
    const Tensor out = Tensor::from_torch(logits, "logits");
    out.expect(DType::float32).expect_shape({rows_, model_.vocabulary}).expect_contiguous_rows();
    if (!model_.causal) throw py::value_error("this is an encoder, which has no next token; call encode.");
    const auto kernel = RXT_KERNEL(decode_step);
    py::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(busy_);
    make_room(given, tokens_at_once, threads);
    // A long message goes in parts; one may end in the middle of a row, whose logits come with a later part.
    for (int64_t first = 0; first < given.count;) {
        const int64_t last = given.count - first < work_.tokens ? given.count : first + work_.tokens;
        Step arguments = part(given, first, last, threads);
        const bool goes_on = last < given.count && given.row()[last] == given.row()[last - 1];
        arguments.finished_segments = arguments.segment_count - (goes_on ? 1 : 0);
        arguments.logits = out.data_as<float>();
        arguments.logits_stride = out.stride(0);
        kernel(arguments);
        first = last;
    }
}

void Engine::encode(const py::object& tokens, const py::object& rows, const py::object& positions, const py::object& states,
                    int threads) {
    const Tokens given = checked(tokens, rows, positions, threads);
    const Tensor out = Tensor::from_torch(states, "states");
    out.expect(DType::float32).expect_shape({model_.layer_count, rows_, -1, model_.width}).expect_contiguous();
    if (out.size(2) < given.longest) throw py::value_error("states has less room than there are tokens in a row.");
    if (model_.causal) throw py::value_error("this is a decoder; call step.");
    const auto kernel = RXT_KERNEL(decode_step);
    py::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(busy_);
    make_room(given, at_least(tokens_at_once, given.longest), threads);
    // Whole rows at a time, since every token sees all of its row.
    const int64_t* row = given.row();
    for (int64_t first = 0; first < given.count;) {
        int64_t last = first;
        for (int64_t t = first; t < given.count && t - first < work_.tokens; ++t)
            if (t + 1 == given.count || row[t + 1] != row[t]) last = t + 1;
        Step arguments = part(given, first, last, threads);
        arguments.states = out.data_as<float>();
        arguments.state_layer_stride = out.stride(0);
        arguments.state_row_stride = out.stride(1);
        kernel(arguments);
        first = last;
    }
}

}  // namespace rxt
