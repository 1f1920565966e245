#include "core/team.h"

#include <sched.h>

namespace rxt {

namespace {

constexpr int spins_before_yielding = 2000;  // some tens of microseconds

thread_local Team* own_team = nullptr;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

}  // namespace

// Waiting costs a fraction of a microsecond while every thread has a core. Where it takes long, because another program has the
// core, the thread that waits gives its own away.
void Meeting::wait(int threads) {
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

int64_t Meeting::next_task(int64_t loop) { return __atomic_fetch_add(&next_[loop % 2], 1, __ATOMIC_RELAXED); }

// Nobody uses that counter any more: every thread has left the loop before.
void Meeting::prepare(int64_t loop) { __atomic_store_n(&next_[loop % 2], int64_t{0}, __ATOMIC_RELAXED); }

void Team::wait() const { meeting->wait(threads); }

Range Team::share(int64_t tasks) const { return {tasks * thread / threads, tasks * (thread + 1) / threads}; }

Team* team_of_loops() { return own_team; }
void set_team_of_loops(Team* team) { own_team = team; }

}  // namespace rxt
