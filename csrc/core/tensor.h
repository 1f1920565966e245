// A torch tensor as kernels see it, taken from Python through DLPack: so nothing is linked against torch, one build serves
// every version of it, and no address ever passes through Python.
#pragma once

#include "core/python.h"

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>

#include "core/types.h"

struct DLManagedTensor;

namespace rxt {

constexpr int max_dimensions = 8;

// Keeps the memory alive as long as it lives. Strides are in elements.
class Tensor {
public:
    // `object` is a torch.Tensor in CPU memory with a dtype of DType; anything else throws in words.
    static Tensor from_torch(pybind11::handle object, const char* name);

    DType dtype() const { return dtype_; }
    int dimensions() const { return dimensions_; }
    int64_t size(int dimension) const { return size_[dimension < 0 ? dimension + dimensions_ : dimension]; }
    int64_t stride(int dimension) const { return stride_[dimension < 0 ? dimension + dimensions_ : dimension]; }
    int64_t elements() const;
    bool is_contiguous() const;
    const std::string& name() const { return name_; }

    void* data() const { return data_; }
    template <class Element>
    Element* data_as() const {
        return static_cast<Element*>(data_);
    }

    // Each throws a sentence that names the tensor, what it was, and what is accepted, or returns the tensor.
    const Tensor& expect(DType dtype) const;
    const Tensor& expect(std::initializer_list<DType> dtypes) const;
    const Tensor& expect_dimensions(int count) const;
    const Tensor& expect_shape(std::initializer_list<int64_t> shape) const;  // -1 stands for any size
    const Tensor& expect_contiguous() const;
    const Tensor& expect_contiguous_rows() const;  // the last dimension has stride 1

    std::string describe_shape() const;

private:
    std::string name_;
    std::shared_ptr<DLManagedTensor> owner_;
    void* data_ = nullptr;
    DType dtype_ = DType::float32;
    int dimensions_ = 0;
    std::array<int64_t, max_dimensions> size_{};
    std::array<int64_t, max_dimensions> stride_{};
};

const char* dtype_name(DType dtype);

// A tensor argument that may be None.
std::optional<Tensor> optional_tensor(pybind11::handle object, const char* name);

// Calls `function` with a null pointer of the element type of a floating dtype: a way to choose a template.
template <class Function>
auto with_element(DType dtype, Function&& function) {
    return dtype == DType::float32 ? function(static_cast<float*>(nullptr)) : function(static_cast<BFloat16*>(nullptr));
}

}  // namespace rxt
