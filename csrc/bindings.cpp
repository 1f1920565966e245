// The extension module rxt_kernels._native: every room binds its own functions.

#include "core/python.h"

#include "core/instruction_set.h"

namespace py = pybind11;

namespace rxt {

void bind_decode(py::module_&);
void bind_linear_cross_entropy(py::module_&);
void bind_machine_limits(py::module_&);
void bind_matmul(py::module_&);
void bind_memory_update(py::module_&);
void bind_mixture_of_experts(py::module_&);
void bind_rms_norm(py::module_&);
void bind_rotary(py::module_&);
void bind_sparse_query_attention(py::module_&);
void bind_swiglu(py::module_&);

}  // namespace rxt

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU kernels of rxt_kernels; use them through the public operations, which check and dispatch.";
    module.attr("sources") = RXT_SOURCES;  // the fingerprint of csrc, to tell whether Python and kernels fit together
    module.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (auto set : rxt::usable_instruction_sets()) names.emplace_back(rxt::name(set));
        return names;
    });
    module.def("instruction_set", [] { return rxt::name(rxt::current_instruction_set()); });
    module.def("use_instruction_set", &rxt::use_instruction_set, py::arg("name"));
    rxt::bind_decode(module);
    rxt::bind_linear_cross_entropy(module);
    rxt::bind_machine_limits(module);
    rxt::bind_matmul(module);
    rxt::bind_memory_update(module);
    rxt::bind_mixture_of_experts(module);
    rxt::bind_rms_norm(module);
    rxt::bind_rotary(module);
    rxt::bind_sparse_query_attention(module);
    rxt::bind_swiglu(module);
}
