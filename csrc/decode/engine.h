// A decoder with everything that its steps need: weights, keys and values, scratch. Kernels see plain pointers into it.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "core/tensor.h"
#include "decode/kernels.h"

namespace rxt {

// Memory on lines of the cache, in large pages where the system has them; counts how often it was asked for.
class Buffers {
public:
    void* make(int64_t bytes);
    int64_t count() const { return count_; }
    void clear();

private:
    struct Free {
        void operator()(void* memory) const;
    };
    std::vector<std::unique_ptr<void, Free>> blocks_;
    char* free_ = nullptr;
    int64_t left_ = 0, count_ = 0;
};

class Engine {
public:
    Engine(const pybind11::dict& decoder, int64_t rows, const std::string& stored);

    // (L, 1 or rows, S, D): projected into keys and values.
    void set_memory(const pybind11::object& memory, int threads);

    // Tokens of some rows, each row's together and in rising position; logits (rows, V) of those rows.
    void step(const pybind11::object& tokens, const pybind11::object& rows, const pybind11::object& positions,
              const pybind11::object& logits, int threads);

    // What an encoder makes of tokens that begin at position 0 of their rows: states (L, rows, T, D) after every layer. Only positions
    // of tokens are written.
    void encode(const pybind11::object& tokens, const pybind11::object& rows, const pybind11::object& positions,
                const pybind11::object& states, int threads);

    int64_t allocations() const { return caches_.count() + memories_.count() + scratch_.count(); }
    int64_t capacity() const { return cache_.empty() ? 0 : cache_[0].capacity; }

private:
    const Tensor& keep(const pybind11::handle& object, const char* name);
    const float* floats(const pybind11::handle& object, const char* name, int64_t count);
    PackedMatrix matrix(const pybind11::handle& object, const char* name, int64_t inputs);
    Norm norm(const pybind11::handle& object, const char* name);
    Attention attention(const pybind11::dict& of, bool with_keys);
    MemoryRead memory_read(const pybind11::dict& of);
    FeedForward feed_forward(const pybind11::dict& of);
    void add_experts(const pybind11::dict& of, std::vector<Expert>& experts);

    // Tokens of a call: checked, with the largest position + 1.
    struct Tokens {
        Tensor ids, rows, positions;
        int64_t count, longest;
        const int64_t* id() const { return ids.data_as<int64_t>(); }
        const int64_t* row() const { return rows.data_as<int64_t>(); }
        const int64_t* place() const { return positions.data_as<int64_t>(); }
    };
    Tokens checked(const pybind11::object& tokens, const pybind11::object& rows, const pybind11::object& positions, int threads) const;
    void make_room(const Tokens& given, int64_t at_once, int threads);
    // Tokens [first, last) of a call as a step; fills segments_.
    Step part(const Tokens& given, int64_t first, int64_t last, int threads);

    KeyValue key_value(Buffers& buffers, const Attention& like, int64_t rows, int64_t tokens);
    void reserve_tokens(int64_t needed);
    void reserve_scratch(int64_t tokens, int64_t keys, int threads);

    int64_t rows_;
    DType stored_;
    Model model_;
    std::vector<Layer> layers_;
    std::deque<std::vector<Expert>> experts_;
    std::deque<Tensor> kept_;
    Buffers caches_, memories_, scratch_;
    std::vector<KeyValue> cache_, memory_;
    int64_t memory_rows_ = 0, slots_ = 0;
    Workspace work_;
    std::vector<int64_t> segments_;
    std::mutex busy_;
};

}  // namespace rxt
