// Which instruction set the kernels of this process use, and how one is chosen.
#pragma once

#include <string>
#include <vector>

namespace rxt {

// In rising order: a machine that has one has those before it.
enum class InstructionSet { portable, avx2, avx512, avx512_bf16 };

const char* name(InstructionSet set);

// Whether processor and operating system support it; the latter must save its registers.
bool machine_has(InstructionSet set);

// Those that this build has kernels for and this machine can run, in rising order.
std::vector<InstructionSet> usable_instruction_sets();

// What the kernels use: the highest usable one, unless another was chosen.
InstructionSet current_instruction_set();

// Throws std::invalid_argument for a name that is unknown, not built, or not supported by the machine.
void use_instruction_set(const std::string& name);

}  // namespace rxt

// Declares a kernel in the namespace of every instruction set that is built.
#ifdef RXT_BUILD_portable
#define RXT_IF_portable(...) __VA_ARGS__
#else
#define RXT_IF_portable(...)
#endif
#ifdef RXT_BUILD_avx2
#define RXT_IF_avx2(...) __VA_ARGS__
#else
#define RXT_IF_avx2(...)
#endif
#ifdef RXT_BUILD_avx512
#define RXT_IF_avx512(...) __VA_ARGS__
#else
#define RXT_IF_avx512(...)
#endif
#ifdef RXT_BUILD_avx512_bf16
#define RXT_IF_avx512_bf16(...) __VA_ARGS__
#else
#define RXT_IF_avx512_bf16(...)
#endif

#define RXT_FOR_EVERY_SET(...)                                            \
    RXT_IF_portable(namespace portable { __VA_ARGS__ })                   \
    RXT_IF_avx2(namespace avx2 { __VA_ARGS__ })                           \
    RXT_IF_avx512(namespace avx512 { __VA_ARGS__ })                       \
    RXT_IF_avx512_bf16(namespace avx512_bf16 { __VA_ARGS__ })

// The kernel `function` of the current instruction set.
#define RXT_KERNEL(function)                                                                            \
    ([]() -> decltype(&RXT_FIRST_SET::function) {                                                       \
        switch (::rxt::current_instruction_set()) {                                                     \
            RXT_IF_portable(case ::rxt::InstructionSet::portable: return &::rxt::portable::function;)   \
            RXT_IF_avx2(case ::rxt::InstructionSet::avx2: return &::rxt::avx2::function;)               \
            RXT_IF_avx512(case ::rxt::InstructionSet::avx512: return &::rxt::avx512::function;)         \
            RXT_IF_avx512_bf16(                                                                         \
                case ::rxt::InstructionSet::avx512_bf16: return &::rxt::avx512_bf16::function;)         \
            default: return nullptr;                                                                    \
        }                                                                                               \
    }())

#ifdef RXT_BUILD_portable
#define RXT_FIRST_SET ::rxt::portable
#elif defined(RXT_BUILD_avx2)
#define RXT_FIRST_SET ::rxt::avx2
#elif defined(RXT_BUILD_avx512)
#define RXT_FIRST_SET ::rxt::avx512
#else
#define RXT_FIRST_SET ::rxt::avx512_bf16
#endif
