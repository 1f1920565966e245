// Work shared among the threads of OpenMP, whose number torch.set_num_threads sets: both use one pool.
//
// What a thread computes must not depend on how many there are: tasks own outputs, and no sum runs across tasks.
#pragma once

#include <omp.h>

#include <cstdint>

#include "core/team.h"

namespace rxt::RXT_INSTRUCTION_SET {

// Too little arithmetic, in operations, is not worth waking threads for.
inline bool is_worth_threads(int64_t count, double work) {
    constexpr double worth_a_thread = 5e4;
    return work >= 2 * worth_a_thread && count >= 2;
}

inline int threads_for(int64_t count, double work) {
    return !is_worth_threads(count, work) || omp_in_parallel() ? 1 : omp_get_max_threads();
}

// A loop inside of a task is the task's own: the rest of the team is elsewhere.
class OutsideOfLoops {
public:
    explicit OutsideOfLoops(Team* team) : team_(team) { set_team_of_loops(nullptr); }
    ~OutsideOfLoops() { set_team_of_loops(team_); }

private:
    Team* team_;
};

// Calls task(i) for i in [0, count), in chunks of neighbours. `work` is the arithmetic of all tasks together.
template <class Task>
inline void parallel_for(int64_t count, double work, Task&& task) {
    if (Team* team = team_of_loops()) {
        const OutsideOfLoops inside_of_a_task(team);
        return team->share_evenly(count, is_worth_threads(count, work), task);
    }
    const int threads = threads_for(count, work);
    if (threads == 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) task(i);
}

// The same where tasks differ in length: each thread takes the next one when it is done.
template <class Task>
inline void parallel_for_uneven(int64_t count, double work, Task&& task) {
    if (Team* team = team_of_loops()) {
        const OutsideOfLoops inside_of_a_task(team);
        return team->share_unevenly(count, task);
    }
    const int threads = threads_for(count, work);
    if (threads == 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
