// Loops made for nothing but reaching a limit of the machine; bindings.cpp takes their time.
#pragma once

#include <cstdint>

#include "core/instruction_set.h"

namespace rxt {

// Every thread reads one stretch of memory in a straight line.
struct Reading {
    const float* data;
    int64_t count;   // values of all stretches together
    int threads;
    float* results;  // (threads,): that something was read must show
};

// Every thread multiplies and adds in as many independent chains as hide the latency, and touches no memory.
struct Arithmetic {
    int64_t rounds;
    int threads;
    float factor, summand;  // known only when it runs, so that nothing can be computed beforehand
    float* results;         // (threads,)
};

// The last two return the operations of one thread, two per multiply-add. Without an instruction for products of bfloat16, these
// are widened once and multiplied as fp32 many times, so that their limit is that of fp32.
RXT_FOR_EVERY_SET(void read_memory(const Reading&); int64_t multiply_and_add(const Arithmetic&);
                  int64_t multiply_bfloat16(const Arithmetic&);)

}  // namespace rxt
