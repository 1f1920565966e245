// The threads of one step: they go through all stages together and wait for each other between them.
#pragma once

#include <omp.h>
#include <sched.h>

#include <cstdint>

namespace rxt::RXT_INSTRUCTION_SET {

// Waiting costs a fraction of a microsecond while every thread has a core. Where it takes long, because another program has the
// core, the thread that waits gives its own away.
class Barrier {
public:
    void wait(int threads) {
        if (threads == 1) return;
        const int generation = __atomic_load_n(&generation_, __ATOMIC_RELAXED);
        if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads) {
            __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation; ++spins) {
            if (spins < spins_before_yielding) {
                pause();
            } else {
                sched_yield();
            }
        }
    }

private:
    static constexpr int spins_before_yielding = 2000;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }

    alignas(64) int arrived_ = 0;
    alignas(64) int generation_ = 0;
};

struct Range {
    int64_t first, last;
};

struct Team {
    int thread, threads;
    Barrier* barrier;

    void wait() const { barrier->wait(threads); }

    // This thread's part of so many equal tasks: neighbours.
    Range share(int64_t tasks) const { return {tasks * thread / threads, tasks * (thread + 1) / threads}; }
};

// Calls work(team) in every thread of one parallel region.
template <class Work>
inline void in_team(int threads, Work&& work) {
    Barrier barrier;
    if (threads == 1 || omp_in_parallel()) {
        work(Team{0, 1, &barrier});
        return;
    }
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
}

}  // namespace rxt::RXT_INSTRUCTION_SET
