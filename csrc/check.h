// Argument checks and tensor helpers that every kernel file shares.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace radix {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sizes are int64; stored indices are int32, which bounds how many tokens and rows there may be.
constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
// Most torch operators allow no more dimensions either.
constexpr int64_t kMaxDim = 64;

template <typename... Args>
[[noreturn]] inline void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "radix::" << op << ": ";
  (message << ... << args);
  throw std::runtime_error(message.str());
}

// Raises a plain sentence: STD_TORCH_CHECK would put a C++ function, path and line before it.
#define RADIX_CHECK(condition, op, ...) \
  do {                                  \
    if (!(condition)) [[unlikely]] {    \
      ::radix::fail(op, __VA_ARGS__);   \
    }                                   \
  } while (false)

inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < dim; ++d) {
    text << (d ? ", " : "") << sizes[d];
  }
  text << "]";
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return shape_text(sizes.data(), static_cast<int64_t>(sizes.size()));
}

inline std::string dtype_of(const Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

inline int32_t dtype_code_of(const Tensor& tensor) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// Tensor::scalar_type() asks for one dtype after another; these ask for one each.
inline bool is_int32(const Tensor& tensor) {
  return dtype_code_of(tensor) == aoti_torch_dtype_int32();
}

inline bool is_index_dtype(const Tensor& tensor) {
  const int32_t code = dtype_code_of(tensor);
  return code == aoti_torch_dtype_int32() || code == aoti_torch_dtype_int64();
}

// The device that a kernel runs on and that all its tensors must be on.
struct Place {
  int32_t type;
  int32_t index;

  bool operator==(const Place& other) const = default;
};

// AOTInductor's C interface gives the CPU an index of -1 or 0.
inline Place place_of(const Tensor& tensor) {
  Place place{};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &place.type));
  if (place.type != aoti_torch_device_type_cpu()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &place.index));
  }
  return place;
}

inline Place cpu() {
  return Place{aoti_torch_device_type_cpu(), 0};
}

// The bytes of storage that a tensor's offset, sizes and strides claim; one more than any storage has where int64 does
// not hold that number.
inline int64_t claimed_bytes(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  int64_t elements = 0;
  bool overflows = __builtin_add_overflow(offset, 1, &elements);
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) {
      return 0;
    }
    int64_t distance = 0;
    overflows |= __builtin_mul_overflow(sizes[d] - 1, strides[d], &distance);
    overflows |= __builtin_add_overflow(elements, distance, &elements);
  }
  int64_t bytes = 0;
  overflows |= __builtin_mul_overflow(elements, static_cast<int64_t>(tensor.element_size()), &bytes);
  return overflows ? std::numeric_limits<int64_t>::max() : bytes;
}

// The elements from one index of a dimension to the next, 0 where there is none: its stride may then be any number, and
// so may all strides of a tensor without elements. Where the storage was checked, int64 holds that distance in bytes.
inline int64_t step_of(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) > 1 && tensor.numel() > 0 ? tensor.stride(dim) : 0;
}

// A storage may have been resized below its tensors, as FSDP does with parameters that it has put away.
inline void check_storage(const char* op, const char* name, const Tensor& tensor) {
  int64_t held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
  const int64_t claimed = claimed_bytes(tensor);
  RADIX_CHECK(
      claimed <= held,
      op,
      name,
      " claims ",
      claimed,
      " bytes of a storage that holds ",
      held,
      "; it was resized, or its data is not allocated");
}

// None in Python is an undefined tensor here.
inline void check_defined(const char* op, const char* name, const Tensor& tensor) {
  RADIX_CHECK(tensor.defined(), op, name, " must be a tensor, got None");
}

// Checks that a tensor is there, on the device, and in memory as a whole.
inline void check_place(const char* op, const char* name, const Tensor& tensor, const Place& place) {
  check_defined(op, name, tensor);
  if (place_of(tensor) == place) [[likely]] {
    return check_storage(op, name, tensor);
  }
  const bool on_cpu = place == cpu();
  const std::string device = on_cpu ? "the CPU" : "cuda:" + std::to_string(place.index);
  fail(op, name, " is on another device than ", device, "; all tensors must be on one device");
}

// Checks for a 1-D int32 or int64 tensor: ids, positions, indices and cumulative lengths.
inline void check_index_like(const char* op, const char* name, const Tensor& tensor, const Place& place) {
  check_place(op, name, tensor, place);
  RADIX_CHECK(tensor.dim() == 1, op, name, " must have 1 dimension, got shape ", shape_of(tensor));
  RADIX_CHECK(is_index_dtype(tensor), op, name, " must be int32 or int64, got ", dtype_of(tensor));
}

// Checks the shapes of an index's inverse over num_rows rows: indptr [num_rows + 1], and members as long as index.
inline void check_inverse_shapes(
    const char* op,
    const Tensor& index,
    const Tensor& indptr,
    const Tensor& members,
    int64_t num_rows,
    const Place& place) {
  check_index_like(op, "indptr", indptr, place);
  check_index_like(op, "members", members, place);
  RADIX_CHECK(
      indptr.size(0) - 1 == num_rows,
      op,
      "indptr must hold one entry more than there are rows, got ",
      indptr.size(0),
      " entries for ",
      num_rows,
      " rows");
  RADIX_CHECK(
      members.size(0) == index.size(0),
      op,
      "members must be as long as index, got ",
      members.size(0),
      " members for ",
      index.size(0),
      " entries of index");
}

// A new contiguous tensor of at most kMaxDim dimensions: one call of the C interface, where torch::stable::empty is a
// boxed dispatch.
inline Tensor empty_at(const Place& place, const int64_t* sizes, int64_t dim, int32_t dtype_code) {
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  bool overflows = false;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    overflows |= __builtin_mul_overflow(stride, std::max<int64_t>(sizes[d], 1), &stride);
  }
  AtenTensorHandle handle = nullptr;
  if (overflows || aoti_torch_empty_strided(dim, sizes, strides, dtype_code, place.type, place.index, &handle) !=
                       AOTI_TORCH_SUCCESS) {
    // The interface gives no reason. Programs that try again with less memory look for "CUDA out of memory."
    throw std::runtime_error(
        place == cpu() ? "radix: out of memory for a tensor of shape " + shape_text(sizes, dim)
                       : "radix: CUDA out of memory. (Or a kernel failed before.) No tensor of shape " +
                             shape_text(sizes, dim) + " could be made on cuda:" + std::to_string(place.index));
  }
  return Tensor(handle);
}

inline Tensor empty_at(const Place& place, int64_t length, int32_t dtype_code) {
  return empty_at(place, &length, 1, dtype_code);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace radix
