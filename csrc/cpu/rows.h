// Tensors seen as rows over dim 0, for gather and scatter_add.
#pragma once

#include "../check.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

// A function marked with it is compiled for several vector widths, one of which is chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define RADIX_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RADIX_VECTOR_CLONES
#endif

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

// Copies the tensor only where its rows are not contiguous.
inline Rows rows_of(const char* op, const char* name, const Tensor& tensor) {
  check_cpu(op, name, tensor);
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
    rows.width *= sizes[d];
  }
  if (!contiguous_rows) {
    rows.held = torch::stable::contiguous(tensor);
  }
  const int64_t element_bytes = static_cast<int64_t>(tensor.element_size());
  rows.data = static_cast<const char*>(rows.held.const_data_ptr());
  rows.row_bytes = rows.width * element_bytes;
  rows.stride_bytes = rows.held.stride(0) * element_bytes;
  return rows;
}

// A new tensor of `count` rows shaped like those of `like`.
inline Tensor empty_rows(const Tensor& like, int64_t count) {
  const auto sizes = like.sizes();
  int64_t out_sizes[kMaxDim];
  std::copy(sizes.begin(), sizes.end(), out_sizes);
  out_sizes[0] = count;
  return empty_cpu(out_sizes, static_cast<int64_t>(sizes.size()), dtype_code_of(like));
}

// The largest index, where negative ones count as larger than all others.
template <typename T>
RADIX_VECTOR_CLONES uint64_t largest_index(const T* index, int64_t length) {
  std::make_unsigned_t<T> largest = 0;
  for (int64_t i = 0; i < length; ++i) {
    largest = std::max(largest, static_cast<std::make_unsigned_t<T>>(index[i]));
  }
  return largest;
}

// Raises unless every index[i] is in [0, bound). `what` says what the bound counts.
template <typename T>
inline void check_in_range(
    const char* op, const char* name, const T* index, int64_t length, int64_t bound, const char* what) {
  // Negative int32 are at least 2^31 as unsigned, whatever the bound.
  const uint64_t limit = std::min<uint64_t>(static_cast<uint64_t>(bound), std::numeric_limits<T>::max() + uint64_t{1});
  if (length == 0 || largest_index(index, length) < limit) [[likely]] {
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
  return is_int32(index) ? run(int32_t{}) : run(int64_t{});
}

}  // namespace radix
