#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "machine_limits/kernels.h"

namespace py = pybind11;

namespace rxt {

namespace {

constexpr int passes = 3;  // of which the fastest counts: a limit is what can be done at best
constexpr int64_t rounds = 1 << 20;
constexpr int most_threads = 1024;

void check_threads(int threads) {
    if (threads < 1 || threads > most_threads) {
        throw py::value_error("threads is " + std::to_string(threads) + "; accepted is 1 to " + std::to_string(most_threads) + ".");
    }
}

template <class Work>
double fastest(Work&& work) {
    double best = 1e300;
    for (int pass = 0; pass < passes; ++pass) {
        const auto start = std::chrono::steady_clock::now();
        work();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

// On pages as large as the system gives, so that looking up addresses is not what is measured.
std::unique_ptr<float, decltype(&std::free)> allocate(int64_t bytes) {
    constexpr int64_t page = int64_t{2} << 20;
    const int64_t whole = (bytes + page - 1) / page * page;
    std::unique_ptr<float, decltype(&std::free)> memory(static_cast<float*>(std::aligned_alloc(page, whole)), &std::free);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory.get(), whole, MADV_HUGEPAGE);
#endif
    return memory;
}

// Bytes per second.
double read_bandwidth(int64_t bytes, int threads) {
    check_threads(threads);
    if (bytes < 4 || bytes % 4 != 0) {
        throw py::value_error("bytes is " + std::to_string(bytes) + "; accepted is a positive multiple of 4.");
    }
    const auto kernel = RXT_KERNEL(read_memory);
    const auto memory = allocate(bytes);
    std::vector<float> results(threads);
    py::gil_scoped_release released;
    std::fill_n(memory.get(), bytes / 4, 1.0f);
    return static_cast<double>(bytes) / fastest([&] { kernel({memory.get(), bytes / 4, threads, results.data()}); });
}

// Operations per second of all threads together.
template <class Kernel>
double rate(Kernel kernel, int threads) {
    check_threads(threads);
    std::vector<float> results(threads);
    py::gil_scoped_release released;
    int64_t operations = 0;
    const double seconds = fastest([&] { operations = kernel({rounds, threads, 0.5f, 1.0f, results.data()}); });
    return static_cast<double>(operations) * threads / seconds;
}

}  // namespace

void bind_machine_limits(py::module_& module) {
    module.def("measure_read_bandwidth", &read_bandwidth, py::arg("bytes"), py::arg("threads"));
    module.def("measure_fma_rate", [](int threads) { return rate(RXT_KERNEL(multiply_and_add), threads); }, py::arg("threads"));
    module.def("measure_bfloat16_rate", [](int threads) { return rate(RXT_KERNEL(multiply_bfloat16), threads); },
               py::arg("threads"));
}

}  // namespace rxt
