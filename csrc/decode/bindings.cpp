#include "core/tensor.h"
#include "decode/engine.h"

namespace py = pybind11;

namespace rxt {

void bind_decode(py::module_& module) {
    py::class_<Engine>(module, "DecodeEngine")
        .def(py::init<const py::dict&, int64_t, const std::string&>(), py::arg("decoder"), py::arg("rows"), py::arg("stored"))
        .def("set_memory", &Engine::set_memory, py::arg("memory"), py::arg("threads"))
        .def("step", &Engine::step, py::arg("tokens"), py::arg("rows"), py::arg("positions"), py::arg("logits"),
             py::arg("threads"))
        .def("encode", &Engine::encode, py::arg("tokens"), py::arg("rows"), py::arg("positions"), py::arg("states"),
             py::arg("threads"))
        .def_property_readonly("allocations", &Engine::allocations)
        .def_property_readonly("capacity", &Engine::capacity);
}

}  // namespace rxt
