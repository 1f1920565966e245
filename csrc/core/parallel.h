// Work shared among the threads of OpenMP, whose number torch.set_num_threads sets: both use one pool.
//
// What a thread computes must not depend on how many there are: tasks own outputs, and no sum runs across tasks.
#pragma once

#include <omp.h>

#include <cstdint>

namespace rxt::RXT_INSTRUCTION_SET {

// Calls task(i) for i in [0, count), in chunks of neighbours. `work` is the arithmetic of all tasks together, in operations: too
// little of it is not worth waking threads for.
template <class Task>
inline void parallel_for(int64_t count, double work, Task&& task) {
    constexpr double worth_a_thread = 5e4;
    const int threads = work < 2 * worth_a_thread || count < 2 || omp_in_parallel() ? 1 : omp_get_max_threads();
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
    constexpr double worth_a_thread = 5e4;
    const int threads = work < 2 * worth_a_thread || count < 2 || omp_in_parallel() ? 1 : omp_get_max_threads();
    if (threads == 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace rxt::RXT_INSTRUCTION_SET
