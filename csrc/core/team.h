// The threads of one parallel region, which go through all of a call together and wait for each other between its parts.
//
// A region of OpenMP costs little while every thread has a core. Where another program has one of them, the threads of OpenMP wait for
// each other for milliseconds at the end of every region, and again before the next; those of a team give their core away instead.
#pragma once

#include <omp.h>

#include <cstdint>

namespace rxt {

struct Range {
    int64_t first, last;
};

// What the threads of a team share. All functions are in team.cpp: one copy, for every instruction set.
class Meeting {
public:
    void wait(int threads);

    // Tasks that are handed out one by one. `loop` counts the loops of a team; the other of both counters is for the next one.
    int64_t next_task(int64_t loop);
    void prepare(int64_t loop);

private:
    alignas(64) int arrived_ = 0;
    alignas(64) int generation_ = 0;
    alignas(64) int64_t next_[2] = {0, 0};
};

struct Team {
    int thread, threads;
    Meeting* meeting;
    int64_t loops = 0;

    void wait() const;

    // This thread's part of so many equal tasks: neighbours.
    Range share(int64_t tasks) const;

    // Calls task(i) for every i below `tasks`, in whichever thread is free, and waits for all.
    template <class Task>
    void share_unevenly(int64_t tasks, const Task& task) {
        const int64_t loop = loops++;
        if (thread == 0) meeting->prepare(loop + 1);
        for (int64_t i = meeting->next_task(loop); i < tasks; i = meeting->next_task(loop)) task(i);
        wait();
    }

    // The same in equal parts of neighbours; a thread alone has all of them where `divided` is false.
    template <class Task>
    void share_evenly(int64_t tasks, bool divided, const Task& task) const {
        const Range own = divided ? share(tasks) : Range{0, thread == 0 ? tasks : 0};
        for (int64_t i = own.first; i < own.last; ++i) task(i);
        wait();
    }

    // Calls work() in one thread, for which the others wait.
    template <class Work>
    void alone(const Work& work) const {
        if (thread == 0) work();
        wait();
    }
};

// The team whose members share the loops of parallel_for (core/parallel.h) on this thread, or null.
Team* team_of_loops();
void set_team_of_loops(Team* team);

// Calls work(team) in every thread of one parallel region.
template <class Work>
inline void in_team(int threads, Work&& work) {
    Meeting meeting;
    if (threads == 1 || omp_in_parallel()) {
        Team team{0, 1, &meeting};
        work(team);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads(), &meeting};
        work(team);
    }
}

// The same, and the loops of parallel_for in `work` are shared by its threads, instead of beginning a region each. All of them come by
// the same loops, and what stands between the loops writes nothing that they share.
template <class Work>
inline void in_team_of_loops(int threads, Work&& work) {
    in_team(threads, [&](Team& team) {
        set_team_of_loops(&team);
        work(team);
        set_team_of_loops(nullptr);
    });
}

}  // namespace rxt
