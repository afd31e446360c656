// Launches the kernels of trie_backward_sm90.cuh.
#pragma once

#include "trie_backward_sm90.cuh"
#include "trie_map_sm90.cuh"

#include <algorithm>

namespace radix::sm90 {

template <typename T, bool kOfKeys>
cudaError_t launch_backward_kernel(const TrieBackward& p, const TrieMaps& maps, int blocks, cudaStream_t stream) {
  const auto kernel = &trie_backward_kernel<T, kOfKeys>;
  constexpr int kBytes = sizeof(BackwardShared<T, kOfKeys>) + 1023;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute overlaps{};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(blocks, kOfKeys ? p.num_key_items : p.num_items)));
  config.blockDim = dim3(kTrieThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &overlaps;
  config.numAttrs = kOfKeys ? 0 : 1;
  return cudaLaunchKernelEx(&config, kernel, p, maps);
}

template <typename T>
cudaError_t launch_backward_kernels(const TrieBackward& p, const TrieMaps& maps, int blocks, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(p.num_rows) * p.heads * (kHeads / 8);
  const unsigned mean_blocks = static_cast<unsigned>((threads + kMeanThreads - 1) / kMeanThreads);
  trie_means_kernel<T><<<mean_blocks, kMeanThreads, 0, stream>>>(p);
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) {
    error = launch_backward_kernel<T, true>(p, maps, blocks, stream);
  }
  return error == cudaSuccess ? launch_backward_kernel<T, false>(p, maps, blocks, stream) : error;
}

// Launches a call in one thread block on each of `blocks` multiprocessors. What maps there are is set here.
inline cudaError_t launch_trie_backward(TrieBackward p, bool is_bf16, int blocks, cudaStream_t stream) {
  alignas(64) TrieMaps maps{};
  const int64_t grad_head = kHeads, grad_row = static_cast<int64_t>(p.heads) * kHeads;
  auto make = [&](CUtensorMap& map, const void* x, int64_t heads, int64_t row, int64_t head, int64_t members) {
    return make_group_map(map, x, is_bf16, kHeads, p.num_rows, heads, row, head, members);
  };
  p.has_maps =
      make(maps.k, p.k, p.kv_heads, p.k_row, p.k_head, 1) && make(maps.v, p.v, p.kv_heads, p.v_row, p.v_head, 1);
  p.has_query_maps = make(maps.q, p.q, p.heads, p.q_row, p.q_head, p.group) &&
                     make(maps.grad_out, p.grad_out, p.heads, grad_row, grad_head, p.group);
  return is_bf16 ? launch_backward_kernels<__nv_bfloat16>(p, maps, blocks, stream)
                 : launch_backward_kernels<__half>(p, maps, blocks, stream);
}

}  // namespace radix::sm90
