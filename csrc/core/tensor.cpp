#include "core/tensor.h"

#include <pybind11/gil_safe_call_once.h>

#include "core/dlpack.h"

namespace py = pybind11;

namespace rxt {

namespace {

[[noreturn]] void refuse_type(const std::string& message) { throw py::type_error(message); }
[[noreturn]] void refuse_value(const std::string& message) { throw py::value_error(message); }

const py::object& to_dlpack() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> storage;
    return storage
        .call_once_and_store_result([]() { return py::module_::import("torch.utils.dlpack").attr("to_dlpack"); })
        .get_stored();
}

std::string shape_text(const int64_t* sizes, int count) {
    std::string text = "(";
    for (int i = 0; i < count; ++i) {
        text += (i ? ", " : "") + (sizes[i] < 0 ? std::string("any") : std::to_string(sizes[i]));
    }
    return text + (count == 1 ? ",)" : ")");
}

DType dtype_of(const DLDataType& type, const std::string& name) {
    if (type.lanes == 1) {
        if (type.code == kDLFloat && type.bits == 32) return DType::float32;
        if (type.code == kDLBfloat && type.bits == 16) return DType::bfloat16;
        if (type.code == kDLInt && type.bits == 8) return DType::int8;
        if (type.code == kDLInt && type.bits == 64) return DType::int64;
        if (type.code == kDLBool && type.bits == 8) return DType::boolean;
    }
    refuse_type(name + " has a dtype that native kernels do not take; accepted are float32, bfloat16, int8, int64 and bool.");
}

}  // namespace

const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::float32: return "float32";
        case DType::bfloat16: return "bfloat16";
        case DType::int8: return "int8";
        case DType::int64: return "int64";
        default: return "bool";
    }
}

Tensor Tensor::from_torch(py::handle object, const char* name) {
    Tensor tensor;
    tensor.name_ = name;
    py::object capsule;
    try {
        capsule = to_dlpack()(object);
    } catch (py::error_already_set& error) {
        refuse_type(std::string(name) + " must be a dense torch.Tensor; " + py::str(error.value()).cast<std::string>());
    }
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");  // from here on the memory is ours to give back
    tensor.owner_ = std::shared_ptr<DLManagedTensor>(managed, [](DLManagedTensor* owned) {
        if (owned->deleter != nullptr) owned->deleter(owned);
    });
    const DLTensor& view = managed->dl_tensor;
    if (view.device.device_type != kDLCPU) {
        refuse_value(tensor.name_ + " is not in CPU memory, which is where native kernels work; move it with .cpu().");
    }
    if (view.ndim > max_dimensions) {
        refuse_value(tensor.name_ + " has " + std::to_string(view.ndim) + " dimensions; accepted are at most 8.");
    }
    tensor.dtype_ = dtype_of(view.dtype, tensor.name_);
    tensor.dimensions_ = view.ndim;
    int64_t running = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
        tensor.size_[i] = view.shape[i];
        tensor.stride_[i] = view.strides != nullptr ? view.strides[i] : running;
        running *= view.shape[i];
    }
    tensor.data_ = static_cast<char*>(view.data) + view.byte_offset;
    const auto address = reinterpret_cast<uintptr_t>(tensor.data_);
    if (address % ((view.dtype.bits + 7) / 8) != 0) {
        refuse_value(tensor.name_ + " begins at an address that is no multiple of its element size; make a copy with .clone().");
    }
    return tensor;
}

int64_t Tensor::elements() const {
    int64_t count = 1;
    for (int i = 0; i < dimensions_; ++i) count *= size_[i];
    return count;
}

bool Tensor::is_contiguous() const {
    if (elements() == 0) return true;
    int64_t expected = 1;
    for (int i = dimensions_ - 1; i >= 0; --i) {
        if (size_[i] != 1 && stride_[i] != expected) return false;
        expected *= size_[i];
    }
    return true;
}

std::string Tensor::describe_shape() const { return shape_text(size_.data(), dimensions_); }

const Tensor& Tensor::expect(DType dtype) const { return expect({dtype}); }

const Tensor& Tensor::expect(std::initializer_list<DType> dtypes) const {
    std::string accepted;
    for (DType dtype : dtypes) {
        if (dtype == dtype_) return *this;
        accepted += (accepted.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    }
    refuse_type(name_ + " is " + dtype_name(dtype_) + "; accepted is " + accepted + ".");
}

const Tensor& Tensor::expect_dimensions(int count) const {
    if (dimensions_ == count) return *this;
    refuse_value(name_ + " has shape " + describe_shape() + "; accepted are " + std::to_string(count) + " dimensions.");
}

const Tensor& Tensor::expect_shape(std::initializer_list<int64_t> shape) const {
    bool fits = dimensions_ == static_cast<int>(shape.size());
    for (int i = 0; fits && i < dimensions_; ++i) {
        const int64_t wanted = shape.begin()[i];
        fits = wanted < 0 || wanted == size_[i];
    }
    if (fits) return *this;
    refuse_value(name_ + " has shape " + describe_shape() + "; accepted is " +
                 shape_text(shape.begin(), static_cast<int>(shape.size())) + ".");
}

const Tensor& Tensor::expect_contiguous() const {
    if (is_contiguous()) return *this;
    refuse_value(name_ + " of shape " + describe_shape() + " is not contiguous; make it so with .contiguous().");
}

const Tensor& Tensor::expect_contiguous_rows() const {
    if (dimensions_ == 0 || size(-1) <= 1 || stride(-1) == 1) return *this;
    refuse_value(name_ + " has stride " + std::to_string(stride(-1)) +
                 " in its last dimension; accepted is 1: make it so with .contiguous().");
}

std::optional<Tensor> optional_tensor(py::handle object, const char* name) {
    if (object.is_none()) return std::nullopt;
    return Tensor::from_torch(object, name);
}

}  // namespace rxt
