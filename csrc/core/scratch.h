// Memory that a call needs only while it runs, kept by the calling thread for its next call: fresh pages cost more than what
// many kernels do with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace rxt {

class Scratch {
public:
    // At least `count` floats at a multiple of 64 bytes, uninitialised, until the next request of this thread.
    static float* floats(int64_t count) {
        thread_local Scratch kept;
        if (count > kept.count_ || (kept.count_ > most_kept && count < kept.count_ / 2)) {
            kept.release();
            kept.memory_ = static_cast<float*>(::operator new(sizeof(float) * static_cast<std::size_t>(count), alignment));
            kept.count_ = count;
        }
        return kept.memory_;
    }

    ~Scratch() { release(); }

private:
    static constexpr std::align_val_t alignment{64};
    static constexpr int64_t most_kept = int64_t{1} << 24;  // more than that is given back as soon as less is needed

    void release() {
        ::operator delete(memory_, alignment);
        memory_ = nullptr;
        count_ = 0;
    }

    float* memory_ = nullptr;
    int64_t count_ = 0;
};

}  // namespace rxt
