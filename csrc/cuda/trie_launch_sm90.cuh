// Launches the kernel of trie_forward_sm90.cuh.
#pragma once

#include "trie_forward_sm90.cuh"
#include "trie_map_sm90.cuh"

#include <algorithm>

namespace radix::sm90 {

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
