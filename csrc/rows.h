// Tensors seen as rows over dim 0, for gather and scatter_add.
#pragma once

#include "check.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace radix {

// A tensor whose rows are contiguous inside and may stand any distance apart.
struct Rows {
  Tensor held;
  const char* data;
  int64_t count;
  int64_t width;  // elements in a row
  int64_t row_bytes;
  int64_t stride_bytes;  // from one row to the next
};

// Wraps around where int64 does not hold the product, as the sizes of a tensor without elements may have it.
inline int64_t product(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

// Sees a tensor as rows; copies it only where its rows are not contiguous inside.
inline Rows rows_of(const char* op, const char* name, const Tensor& tensor, const Place& place) {
  check_place(op, name, tensor, place);
  const auto sizes = tensor.sizes();
  RADIX_CHECK(sizes.size() >= 1, op, name, " must have at least 1 dimension, got a scalar");
  RADIX_CHECK(
      static_cast<int64_t>(sizes.size()) <= kMaxDim,
      op,
      name,
      " must have at most ",
      kMaxDim,
      " dimensions, got ",
      sizes.size());
  Rows rows{tensor, nullptr, sizes[0], 1, 0, 0};
  bool contiguous_rows = true;
  const auto strides = tensor.strides();
  for (size_t d = sizes.size() - 1; d > 0; --d) {
    contiguous_rows = contiguous_rows && (sizes[d] == 1 || strides[d] == rows.width);
    rows.width = product(rows.width, sizes[d]);
  }
  if (!contiguous_rows) {
    rows.held = torch::stable::contiguous(tensor);
  }
  const int64_t element_bytes = static_cast<int64_t>(tensor.element_size());
  rows.data = static_cast<const char*>(rows.held.const_data_ptr());
  rows.row_bytes = product(rows.width, element_bytes);
  rows.stride_bytes = step_of(rows.held, 0) * element_bytes;
  return rows;
}

// A new tensor of `count` rows shaped like those of `like`.
inline Tensor empty_rows(const Tensor& like, int64_t count, const Place& place) {
  const auto sizes = like.sizes();
  int64_t out_sizes[kMaxDim];
  std::copy(sizes.begin(), sizes.end(), out_sizes);
  out_sizes[0] = count;
  return empty_at(place, out_sizes, static_cast<int64_t>(sizes.size()), dtype_code_of(like));
}

// Checks two tensors that one index serves.
inline void check_kv(const char* op, const char* k_name, const Tensor& k, const char* v_name, const Tensor& v) {
  check_defined(op, k_name, k);
  check_defined(op, v_name, v);
  RADIX_CHECK(k.dim() >= 1, op, k_name, " must have at least 1 dimension, got a scalar");
  RADIX_CHECK(v.dim() >= 1, op, v_name, " must have at least 1 dimension, got a scalar");
  RADIX_CHECK(
      k.size(0) == v.size(0),
      op,
      k_name,
      " and ",
      v_name,
      " must have equally many rows, got ",
      k.size(0),
      " and ",
      v.size(0));
  RADIX_CHECK(
      dtype_code_of(k) == dtype_code_of(v),
      op,
      k_name,
      " and ",
      v_name,
      " must have one dtype, got ",
      dtype_of(k),
      " and ",
      dtype_of(v));
}

// Checks the sizes that scatter_add is given.
inline void check_scatter_sizes(
    const char* op, const char* name, const Rows& src, const Tensor& index, int64_t num_rows) {
  RADIX_CHECK(num_rows >= 0 && num_rows <= kMaxRows, op, "num_rows must be from 0 to ", kMaxRows, ", got ", num_rows);
  RADIX_CHECK(
      index.size(0) == src.count,
      op,
      "index must hold one entry for each row of ",
      name,
      ", got ",
      index.size(0),
      " entries for ",
      src.count,
      " rows");
}

// The type that keeps sums of T. Integers wrap around as in index_add, which takes unsigned arithmetic: signed overflow
// is undefined.
template <typename T>
using accumulator_t = std::conditional_t<
    std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>,
    float,
    typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::common_type<T>>::type>;

// Calls run(T{}) with the element type of a tensor that scatter_add can sum.
template <typename Run>
inline void with_sum_type(const char* op, const char* name, const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return run(double{});
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(c10::Half{});
    case ScalarType::BFloat16:
      return run(c10::BFloat16{});
    case ScalarType::Long:
      return run(int64_t{});
    case ScalarType::Int:
      return run(int32_t{});
    case ScalarType::Short:
      return run(int16_t{});
    case ScalarType::Char:
      return run(int8_t{});
    case ScalarType::Byte:
      return run(uint8_t{});
    default:
      fail(
          op,
          name,
          " must be float64, float32, float16, bfloat16 or an integer of 8 to 64 bits, got ",
          dtype_of(tensor));
  }
}

// Calls run(T{}) with the index type of a checked index tensor.
template <typename Run>
inline auto with_index_type(const Tensor& index, const Run& run) {
  return is_int32(index) ? run(int32_t{}) : run(int64_t{});
}

}  // namespace radix
