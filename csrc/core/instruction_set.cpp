#include "core/instruction_set.h"

#include <array>
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rxt {

namespace {

constexpr std::array all_sets{
    InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512, InstructionSet::avx512_bf16};

bool is_built(InstructionSet set) {
    switch (set) {
        RXT_IF_portable(case InstructionSet::portable: return true;)
        RXT_IF_avx2(case InstructionSet::avx2: return true;)
        RXT_IF_avx512(case InstructionSet::avx512: return true;)
        RXT_IF_avx512_bf16(case InstructionSet::avx512_bf16: return true;)
        default: return false;
    }
}

#if defined(__x86_64__)
// The register states that the operating system saves at a task switch.
uint64_t saved_states() {
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
}
#endif

std::atomic<int>& chosen() {
    static std::atomic<int> set{-1};
    return set;
}

}  // namespace

const char* name(InstructionSet set) {
    switch (set) {
        case InstructionSet::portable: return "portable";
        case InstructionSet::avx2: return "avx2";
        case InstructionSet::avx512: return "avx512";
        default: return "avx512_bf16";
    }
}

bool machine_has(InstructionSet set) {
    if (set == InstructionSet::portable) return true;
#if defined(__x86_64__)
    constexpr uint64_t avx_states = 0x6, avx512_states = 0xe6;
    const uint64_t states = saved_states();
    uint32_t eax, ebx, ecx, edx;
    if ((states & avx_states) != avx_states || !__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_FMA)) return false;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_AVX2)) return false;
#ifdef RXT_EMULATE_AVX512
    return true;
#endif
    if (set == InstructionSet::avx2) return true;
    constexpr uint32_t needed = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((states & avx512_states) != avx512_states || (ebx & needed) != needed) return false;
    if (set == InstructionSet::avx512) return true;
    constexpr uint32_t vnni = 1u << 11, bfloat16 = 1u << 5;
    if (!(ecx & vnni) || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
    return (eax & bfloat16) != 0;
#else
    return false;
#endif
}

std::vector<InstructionSet> usable_instruction_sets() {
    std::vector<InstructionSet> usable;
    for (InstructionSet set : all_sets) {
        if (is_built(set) && machine_has(set)) usable.push_back(set);
    }
    return usable;
}

InstructionSet current_instruction_set() {
    int set = chosen().load(std::memory_order_relaxed);
    if (set < 0) {
        const auto usable = usable_instruction_sets();
        if (usable.empty()) throw std::runtime_error("this machine can run none of the instruction sets that were built.");
        set = static_cast<int>(usable.back());
        chosen().store(set, std::memory_order_relaxed);
    }
    return static_cast<InstructionSet>(set);
}

void use_instruction_set(const std::string& wanted) {
    std::string known;
    for (InstructionSet set : all_sets) {
        known += (known.empty() ? "" : ", ") + std::string(name(set));
        if (wanted != name(set)) continue;
        if (!is_built(set)) throw std::invalid_argument("the instruction set '" + wanted + "' was not built.");
        if (!machine_has(set)) {
            throw std::invalid_argument("the instruction set '" + wanted + "' is not supported by this machine.");
        }
        chosen().store(static_cast<int>(set), std::memory_order_relaxed);
        return;
    }
    throw std::invalid_argument("the instruction set '" + wanted + "' is not known; it is one of " + known + ".");
}

}  // namespace rxt
