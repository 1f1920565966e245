// The forward pass for few queries, see short.cpp.
#pragma once

#include <cstdint>

#include "sparse_query_attention/kernels.h"

namespace rxt::RXT_INSTRUCTION_SET::attention {

int64_t short_scratch(const AttentionForward&);
void short_forward(const AttentionForward&, float* scratch);

}  // namespace rxt::RXT_INSTRUCTION_SET::attention
