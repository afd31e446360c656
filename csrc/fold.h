// The outputs of folds and the checks of their arguments, for all devices.
#pragma once

#include "check.h"

#include <tuple>

namespace radix {

using Fold = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Plan =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A Plan, and cu_seqlens in int32.
using BatchTables = decltype(std::tuple_cat(std::declval<Plan>(), std::declval<std::tuple<Tensor>>()));

inline void check_fold_arguments(
    const char* op,
    const Tensor& input_ids,
    const Tensor& position_ids,
    const Tensor& cu_seqlens,
    int64_t multiple,
    const Place& place) {
  check_index_like(op, "input_ids", input_ids, place);
  check_index_like(op, "position_ids", position_ids, place);
  check_index_like(op, "cu_seqlens", cu_seqlens, place);
  const int64_t num_tokens = input_ids.size(0);
  RADIX_CHECK(
      position_ids.size(0) == num_tokens,
      op,
      "position_ids must be as long as input_ids, got ",
      position_ids.size(0),
      " positions for ",
      num_tokens,
      " tokens");
  RADIX_CHECK(
      num_tokens <= kMaxRows, op, "input_ids holds ", num_tokens, " tokens; at most ", kMaxRows, " are allowed");
  RADIX_CHECK(cu_seqlens.size(0) >= 1, op, "cu_seqlens is empty; it must hold 0 and then the end of each sequence");
  RADIX_CHECK(
      cu_seqlens.size(0) - 1 <= kMaxRows,
      op,
      "cu_seqlens holds ",
      cu_seqlens.size(0) - 1,
      " sequences; at most ",
      kMaxRows,
      " are allowed");
  RADIX_CHECK(
      multiple >= 1 && multiple <= kMaxRows, op, "pad_multiple_of must be from 1 to ", kMaxRows, ", got ", multiple);
}

// Returns the ends of the sequences, checked against the number of tokens before any token is read. With `front` tokens
// may stand behind the last end.
template <typename T>
inline std::vector<int64_t> checked_bounds(const char* op, const Tensor& cu_seqlens, int64_t num_tokens, bool front) {
  const Tensor held = as_contiguous(cu_seqlens);
  const T* values = held.const_data_ptr<T>();
  std::vector<int64_t> bounds(values, values + held.size(0));
  RADIX_CHECK(bounds[0] == 0, op, "cu_seqlens must start at 0, got ", bounds[0]);
  for (size_t i = 1; i < bounds.size(); ++i) {
    RADIX_CHECK(
        bounds[i] >= bounds[i - 1],
        op,
        "cu_seqlens must not decrease, got ",
        bounds[i - 1],
        " and then ",
        bounds[i],
        " at index ",
        i);
  }
  RADIX_CHECK(
      bounds.back() == num_tokens || (front && bounds.back() < num_tokens),
      op,
      "cu_seqlens must end at ",
      front ? "most at " : "",
      "the number of tokens, ",
      num_tokens,
      ", got ",
      bounds.back());
  return bounds;
}

// Returns how many rows num_nodes nodes and their padding take.
inline int64_t padded_rows(const char* op, int64_t num_nodes, int64_t pad_multiple_of) {
  const int64_t num_rows = (num_nodes + pad_multiple_of - 1) / pad_multiple_of * pad_multiple_of;
  RADIX_CHECK(
      num_rows <= kMaxRows,
      op,
      "pad_multiple_of=",
      pad_multiple_of,
      " makes ",
      num_rows,
      " rows; at most ",
      kMaxRows,
      " are allowed");
  return num_rows;
}

// Returns the checked bounds of a cu_seqlens of either dtype on the CPU.
inline std::vector<int64_t> bounds_of(const char* op, const Tensor& cu_seqlens, int64_t num_tokens, bool front) {
  return is_int32(cu_seqlens) ? checked_bounds<int32_t>(op, cu_seqlens, num_tokens, front)
                              : checked_bounds<int64_t>(op, cu_seqlens, num_tokens, front);
}

}  // namespace radix
