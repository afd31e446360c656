// Tensors seen as rows over dim 0, for gather and scatter_add.
#pragma once

#include "../check.h"

#include <algorithm>
#include <cstring>

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

inline bool has_contiguous_rows(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    const int64_t size = tensor.size(d);
    if (size != 1 && tensor.stride(d) != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Copies the tensor only where its rows are not contiguous.
inline Rows rows_of(const char* op, const char* name, const Tensor& tensor) {
  check_cpu(op, name, tensor);
  RADIX_CHECK(tensor.dim() >= 1, op, name, " must have at least 1 dimension, got a scalar");
  Rows rows{has_contiguous_rows(tensor) ? tensor : torch::stable::contiguous(tensor), nullptr, tensor.size(0), 1, 0, 0};
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    rows.width *= tensor.size(d);
  }
  const int64_t element_bytes = static_cast<int64_t>(tensor.element_size());
  rows.data = static_cast<const char*>(rows.held.const_data_ptr());
  rows.row_bytes = rows.width * element_bytes;
  rows.stride_bytes = rows.held.stride(0) * element_bytes;
  return rows;
}

// A new tensor of `count` rows shaped like those of `like`.
inline Tensor empty_rows(const Tensor& like, int64_t count) {
  std::vector<int64_t> sizes(like.dim());
  sizes[0] = count;
  for (int64_t d = 1; d < like.dim(); ++d) {
    sizes[d] = like.size(d);
  }
  return empty_cpu(sizes, dtype_code_of(like));
}

// Raises unless every index[i] is in [0, bound). `what` says what the bound counts.
template <typename T>
inline void check_in_range(
    const char* op, const char* name, const T* index, int64_t length, int64_t bound, const char* what) {
  bool out_of_range = false;
  for (int64_t i = 0; i < length; ++i) {
    out_of_range |= static_cast<uint64_t>(static_cast<int64_t>(index[i])) >= static_cast<uint64_t>(bound);
  }
  if (!out_of_range) [[likely]] {
    return;
  }
  const T* bad = std::find_if(index, index + length, [bound](T i) { return i < 0 || i >= bound; });
  RADIX_CHECK(bound > 0, op, name, "[", bad - index, "] is ", *bad, ", but there are no ", what, " to index");
  fail(
      op,
      name,
      "[",
      bad - index,
      "] is ",
      *bad,
      ", out of range for ",
      bound,
      " ",
      what,
      " (allowed: 0 to ",
      bound - 1,
      ")");
}

// Runs body(begin, end) over [0, count), in parallel where the bytes moved are worth it. `body` must not throw.
template <typename Body>
inline void parallel_over(int64_t count, int64_t bytes_each, const Body& body) {
  constexpr int64_t kBytesPerTask = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(bytes_each, 1));
  if (count <= grain) {
    body(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, body);
  }
}

// Calls run(T{}) with the index type of a checked index tensor.
template <typename Run>
inline auto with_index_type(const Tensor& index, const Run& run) {
  return index.scalar_type() == ScalarType::Int ? run(int32_t{}) : run(int64_t{});
}

}  // namespace radix
