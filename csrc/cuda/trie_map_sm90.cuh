// Describes matrices to the copy engine.
#pragma once

#include "sm90.cuh"

#include <algorithm>

namespace radix::sm90 {

// Describes an array of 16-bit numbers to the copy engine, in boxes. Returns false where the engine can't take it, as
// with an address that is no multiple of 16.
template <int kDims>
bool encode_map(
    CUtensorMap& map,
    const void* x,
    bool is_bf16,
    const cuuint64_t (&sizes)[kDims],
    const cuuint64_t (&strides)[kDims - 1],
    const cuuint32_t (&box)[kDims]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  cuuint32_t steps[kDims];
  std::fill(steps, steps + kDims, 1);
  return encode != nullptr && encode(
                                  &map,
                                  is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                  kDims,
                                  const_cast<void*>(x),
                                  sizes,
                                  strides,
                                  box,
                                  steps,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE,
                                  CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The stride in bytes of a dimension; that of a dimension of size 1 may be any number.
inline cuuint64_t stride_of(int64_t size, int64_t stride) {
  return static_cast<cuuint64_t>(size > 1 ? stride * 2 : 16);
}

// Describes x [rows, heads, size] in boxes of 32 rows and 64 columns, for copy_box.
inline bool make_map(
    CUtensorMap& map, const void* x, bool is_bf16, int size, int64_t rows, int64_t heads, int64_t row, int64_t head) {
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(size), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(heads)};
  return encode_map<3>(map, x, is_bf16, sizes, {stride_of(rows, row), stride_of(heads, head)}, {64, 32, 1});
}

// Describes x [rows, heads, size] in boxes of 64 columns and 32 pairs of a row and one of `members` heads, a group, for
// copy_group_box. Returns false where groups don't fit, too.
inline bool make_group_map(
    CUtensorMap& map,
    const void* x,
    bool is_bf16,
    int size,
    int64_t rows,
    int64_t heads,
    int64_t row,
    int64_t head,
    int64_t members) {
  if (32 % members != 0) {
    return false;
  }
  const int64_t groups = heads / members;
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(size),
      static_cast<cuuint64_t>(members),
      static_cast<cuuint64_t>(rows),
      static_cast<cuuint64_t>(groups)};
  return encode_map<4>(
      map,
      x,
      is_bf16,
      sizes,
      {stride_of(members, head), stride_of(rows, row), stride_of(groups, head * members)},
      {64, static_cast<cuuint32_t>(members), static_cast<cuuint32_t>(32 / members), 1});
}

}  // namespace radix::sm90
