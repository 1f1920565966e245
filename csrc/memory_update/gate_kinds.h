// Names of residual gates, as Python gives them.
#pragma once

#include "core/python.h"

#include <string>

#include "memory_update/kernels.h"

namespace rxt {

inline GateKind gate_kind(const std::string& kind) {
    if (kind == "add") return GateKind::add;
    if (kind == "static") return GateKind::constant;
    if (kind == "elementwise") return GateKind::elementwise;
    if (kind == "linear") return GateKind::linear;
    throw pybind11::value_error("kind is '" + kind + "'; accepted are add, static, elementwise and linear.");
}

}  // namespace rxt
