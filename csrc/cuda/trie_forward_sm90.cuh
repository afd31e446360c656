// The forward kernel of trie attention on Hopper (sm_90a), as FlashAttention 3 works (arXiv 2407.08608).
//
// What a block of neighbouring queries sees is what `trie_triton` says: keys are the path to its first query, side by
// side in kv_index, and the block itself. A block holds 128 pairs of a number and a query head of one key/value head.
//
// A thread block runs on each multiprocessor and takes one work item, a block of queries, after another. One warp group
// loads: queries, and tiles of 128 keys and values. Where 32 rows of a tile lie side by side in memory, as those of a
// run do, a copy engine brings them; elsewhere each row is copied by itself. Two warp groups compute, 64 pairs each:
// one multiplies while the other takes exponentials, and the scores of a tile are computed beside the values' sum of
// the tile before. Tiles that all queries see have no mask.
#pragma once

#include "trie_compute_sm90.cuh"
#include "trie_load_sm90.cuh"

namespace radix::sm90 {

template <typename T, int D, bool kWindowed>
__global__ void __launch_bounds__(kTrieThreads, 1) trie_forward_kernel(
    const __grid_constant__ TrieForward p,
    const __grid_constant__ CUtensorMap k_map,
    const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ char memory[];
  using Shared = TrieShared<T, D>;
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      init_barrier(shared_address(&shared.queries_full[i]), 4 * kArrivals);
      init_barrier(shared_address(&shared.queries_empty[i]), kComputing / 32);
    }
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared_address(&shared.keys_full[i]), 4 * kArrivals);
      init_barrier(shared_address(&shared.keys_empty[i]), kComputing / 32);
      init_barrier(shared_address(&shared.values_full[i]), 4 * kArrivals);
      init_barrier(shared_address(&shared.values_empty[i]), kComputing / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp < 4) {
    give_registers<kLoadingRegisters>();
    Loader<T, D, kWindowed>{{p, lane}, p, k_map, v_map, shared, warp}.run();
  } else {
    take_registers<kComputingRegisters>();
    Computer<T, D, kWindowed>{p, shared, warp / 4 - 1, warp % 4, lane}.run();
  }
}

}  // namespace radix::sm90
