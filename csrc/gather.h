// Many tensors in one call: what dtr_kernels/ops/gradient_lists.py would ask of each in Python, which takes microseconds, is
// read through the C functions that PyTorch has for it, DLPack's exchange API (from version 1.2 of the standard on).
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "checks.h"

namespace dtr {

// The standard's structs, https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h
struct DlTensor {
    void* data;
    int32_t device_type, device_id, dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;  // of the tensor itself, as long as it lives
    uint64_t byte_offset;

    bool is_like(const DlTensor& other) const {
        return device_type == other.device_type && device_id == other.device_id && code == other.code && bits == other.bits &&
               lanes == other.lanes;
    }
    bool is_laid_out_like(const DlTensor& other) const {
        return dimensions == other.dimensions && std::equal(shape, shape + dimensions, other.shape) &&
               std::equal(strides, strides + dimensions, other.strides);
    }
    int64_t elements() const { return std::accumulate(shape, shape + dimensions, int64_t{1}, std::multiplies<int64_t>()); }
    // Without gaps or overlaps, in whatever order of dimensions.
    bool is_dense() const {
        int64_t expected = 1;
        for (int found = 1; expected < elements(); expected *= found) {
            found = 1;
            for (int d = 0; d < dimensions; ++d)
                if (shape[d] > 1 && strides[d] == expected) found = shape[d];
            if (found == 1) return false;
        }
        return true;
    }
};
struct DlExchange {
    uint32_t major, minor;
    void* unused[4];
    int (*describe)(void* tensor, DlTensor* out);  // 0, or an exception is set
};

// The K lists' gradients, or none where not all are tensors of the two types, of a dtype that the kernels take, alike and
// dense: checks of one tensor after the other then say which.
inline std::optional<OwnedGradients> gathered(const pybind11::sequence& rows, pybind11::handle tensor, pybind11::handle parameter) {
    constexpr const char* kName = "__dlpack_c_exchange_api__";
    if (!pybind11::hasattr(tensor, kName)) return std::nullopt;  // before PyTorch 2.10
    const pybind11::object exchange = tensor.attr(kName);
    const auto* api = static_cast<const DlExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    const size_t K = rows.size();
    if (!api) throw pybind11::error_already_set();
    if (api->major != 1 || K < 1 || K > kMaxClusters) return std::nullopt;
    std::vector<pybind11::object> lists;
    for (const pybind11::handle row : rows) {
        if (!PyList_Check(row.ptr()) && !PyTuple_Check(row.ptr())) return std::nullopt;
        lists.push_back(pybind11::reinterpret_borrow<pybind11::object>(row));
        if (pybind11::len(row) != pybind11::len(lists[0])) return std::nullopt;
    }
    const size_t segments = pybind11::len(lists[0]);
    std::vector<uintptr_t> pointers(segments * K);
    std::vector<int64_t> sizes(segments);
    DlTensor first{}, any{};
    for (size_t s = 0; s < segments; ++s)
        for (size_t k = 0; k < K; ++k) {
            PyObject* const x = PySequence_Fast_GET_ITEM(lists[k].ptr(), s);
            const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
            DlTensor here{};
            if (type != tensor.ptr() && type != parameter.ptr()) return std::nullopt;
            if (api->describe(x, &here)) {
                PyErr_Clear();
                return std::nullopt;
            }
            if (k == 0) {
                first = here;
                if (s == 0) any = here;
                if (!first.is_like(any) || !first.is_dense()) return std::nullopt;
                sizes[s] = first.elements();
            } else if (!here.is_like(first) || !here.is_laid_out_like(first)) {
                return std::nullopt;
            }
            pointers[s * K + k] = reinterpret_cast<uintptr_t>(here.data) + here.byte_offset;
        }
    constexpr uint8_t kFloat = 2, kBfloat = 4;
    const auto is = [&](uint8_t code, uint8_t bits) { return any.lanes == 1 && any.code == code && any.bits == bits; };
    if (!is(kFloat, 32) && !is(kFloat, 16) && !is(kBfloat, 16)) return std::nullopt;
    const Type type = any.bits == 32 ? Type::f32 : any.code == kFloat ? Type::f16 : Type::bf16;
    return OwnedGradients(type, K, pointers, std::move(sizes));
}

}  // namespace dtr
