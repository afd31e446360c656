// Launches the kernel of trie_forward_sm90.cuh.
#pragma once

#include "trie_forward_sm90.cuh"

#include <algorithm>

namespace radix::sm90 {

// Describes x [rows, heads, size] to the copy engine, in boxes of 32 rows and 64 columns. Returns false where the
// engine can't take it, as with an address that is no multiple of 16.
inline bool make_map(
    CUtensorMap& map, const void* x, bool is_bf16, int size, int64_t rows, int64_t heads, int64_t row, int64_t head) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) {
    return false;
  }
  const cuuint64_t sizes[3] = {
      static_cast<cuuint64_t>(size), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(heads)};
  // The stride of a dimension of size 1 may be any number.
  const cuuint64_t strides[2] = {
      static_cast<cuuint64_t>(rows > 1 ? row * 2 : 16), static_cast<cuuint64_t>(heads > 1 ? head * 2 : 16)};
  const cuuint32_t box[3] = {64, 32, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode(
             &map,
             is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             3,
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

template <typename T, int D, bool kWindowed>
cudaError_t launch_kernel(
    const TrieForward& p, const CUtensorMap& k_map, const CUtensorMap& v_map, int blocks, cudaStream_t stream) {
  const auto kernel = &trie_forward_kernel<T, D, kWindowed>;
  constexpr int kBytes = sizeof(TrieShared<T, D>) + 1023;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) {
    return error;
  }
  kernel<<<std::min(blocks, p.num_items), kTrieThreads, kBytes, stream>>>(p, k_map, v_map);
  return cudaGetLastError();
}

// Launches a call of head_dim `size`, 64 or 128, in one thread block on each of `blocks` multiprocessors. The call's
// has_maps is set here.
inline cudaError_t launch_trie_forward(TrieForward p, bool is_bf16, int size, int blocks, cudaStream_t stream) {
  alignas(64) CUtensorMap k_map{}, v_map{};
  p.has_maps = make_map(k_map, p.k, is_bf16, size, p.num_rows, p.kv_heads, p.k_row, p.k_head) &&
               make_map(v_map, p.v, is_bf16, size, p.num_rows, p.kv_heads, p.v_row, p.v_head);
  auto launch = [&](auto number, auto size_constant) {
    using T = decltype(number);
    constexpr int kSize = decltype(size_constant)::value;
    return p.window > 0 ? launch_kernel<T, kSize, true>(p, k_map, v_map, blocks, stream)
                        : launch_kernel<T, kSize, false>(p, k_map, v_map, blocks, stream);
  };
  using Wide = std::integral_constant<int, 128>;
  using Narrow = std::integral_constant<int, 64>;
  if (is_bf16) {
    return size == 128 ? launch(__nv_bfloat16(), Wide()) : launch(__nv_bfloat16(), Narrow());
  }
  return size == 128 ? launch(__half(), Wide()) : launch(__half(), Narrow());
}

}  // namespace radix::sm90
