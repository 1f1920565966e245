// Memory that a call needs only while it runs, kept by the calling thread for its next call: fresh pages cost more than what
// many kernels do with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace rxt {

class Scratch {
public:
    // At least `count` floats at a multiple of 64 bytes, uninitialised, until the next request of this thread: for what the whole
    // call needs.
    static float* floats(int64_t count) {
        thread_local Scratch kept;
        return kept.at_least(count);
    }

    // The same for what one task of a call needs, by whichever thread works on it.
    static float* of_task(int64_t count) {
        thread_local Scratch kept;
        return kept.at_least(count);
    }

    ~Scratch() { release(); }

private:
    static constexpr std::align_val_t alignment{64};
    static constexpr int64_t most_kept = int64_t{1} << 24;  // more than that is given back as soon as less is needed

    float* at_least(int64_t count) {
        if (count > count_ || (count_ > most_kept && count < count_ / 2)) {
            release();
            memory_ = static_cast<float*>(::operator new(sizeof(float) * static_cast<std::size_t>(count), alignment));
            count_ = count;
        }
        return memory_;
    }

    void release() {
        ::operator delete(memory_, alignment);
        memory_ = nullptr;
        count_ = 0;
    }

    float* memory_ = nullptr;
    int64_t count_ = 0;
};

// What one request is cut into, in floats: pieces begin at multiples of 64 bytes.
class Pieces {
public:
    // Where the piece begins.
    int64_t add(int64_t count) {
        const int64_t first = total_;
        total_ += (count + 15) / 16 * 16;
        return first;
    }
    int64_t total() const { return total_; }

private:
    int64_t total_ = 0;
};

}  // namespace rxt
