#include "machine_limits/kernels.h"

#include <omp.h>

#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

// Two units of four or more cycles need eight chains; sixteen registers hold twelve. Portable vectors may take two registers each.
constexpr int chains = RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable ? 6 : 12;

float read_stretch(const float* data, int64_t count) {
    constexpr int streams = 8, step = streams * Float::lanes;
    Float sums[streams];
    for (int s = 0; s < streams; ++s) sums[s] = zero();
    int64_t i = 0;
    for (; i + step <= count; i += step) {
        for (int s = 0; s < streams; ++s) sums[s] = sums[s] + load(data + i + s * Float::lanes);
    }
    for (int s = 1; s < streams; ++s) sums[0] = sums[0] + sums[s];
    float total = sum(sums[0]);
    for (; i < count; ++i) total += data[i];
    return total;
}

float multiply_chains(const Arithmetic& a) {
    const Float factor = broadcast(a.factor), summand = broadcast(a.summand);
    Float values[chains];
    for (int c = 0; c < chains; ++c) values[c] = broadcast(a.summand * static_cast<float>(c));
    for (int64_t round = 0; round < a.rounds; ++round) {
        for (int c = 0; c < chains; ++c) values[c] = multiply_add(values[c], factor, summand);
    }
    for (int c = 1; c < chains; ++c) values[0] = values[0] + values[c];
    return sum(values[0]);
}

#if RXT_HAS_BFLOAT16_DOT
float multiply_bfloat16_chains(const Arithmetic& a) {
    const auto pairs = [](float x) {
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(to_bfloat16(x).bits * 0x10001u)));
    };
    const __m512bh left = pairs(a.factor), right = pairs(a.summand);
    __m512 values[chains];
    for (int c = 0; c < chains; ++c) values[c] = _mm512_set1_ps(static_cast<float>(c));
    for (int64_t round = 0; round < a.rounds; ++round) {
        for (int c = 0; c < chains; ++c) values[c] = _mm512_dpbf16_ps(values[c], left, right);
    }
    for (int c = 1; c < chains; ++c) values[0] = _mm512_add_ps(values[0], values[c]);
    return _mm512_reduce_add_ps(values[0]);
}
#endif

}  // namespace

void read_memory(const Reading& a) {
#pragma omp parallel num_threads(a.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t first = a.count * thread / threads, last = a.count * (thread + 1) / threads;
        a.results[thread] = read_stretch(a.data + first, last - first);
    }
}

int64_t multiply_and_add(const Arithmetic& a) {
#pragma omp parallel num_threads(a.threads)
    a.results[omp_get_thread_num()] = multiply_chains(a);
    return a.rounds * chains * Float::lanes * 2;
}

int64_t multiply_bfloat16(const Arithmetic& a) {
#if RXT_HAS_BFLOAT16_DOT
#pragma omp parallel num_threads(a.threads)
    a.results[omp_get_thread_num()] = multiply_bfloat16_chains(a);
    return a.rounds * chains * 32 * 2;
#else
    return multiply_and_add(a);
#endif
}

}  // namespace rxt::RXT_INSTRUCTION_SET
