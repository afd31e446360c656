// The backward kernels of trie attention on Hopper (sm_90a).
//
// Weights are computed again, as `trie_triton` does, by two kernels. One sums the gradients of blocks of 128 keys and
// values of a head over the queries that see them, an interval of numbers; the other those of blocks of 128 queries
// over their keys, as the forward finds them. A thread block runs on each multiprocessor, and takes blocks until none
// is left. The second kernel begins where the first leaves multiprocessors idle. Every sum has one order, whoever takes
// it, so that results are deterministic.
//
// One warp group loads: the rows of a block stay in shared memory while tiles of the others pass by. Two warp groups
// compute, 64 rows of the block each. The block's rows are those of the scores, so that weights and gradients of
// scores, which the next products take, stay in registers.
#pragma once

#include "trie_backward_compute_sm90.cuh"
#include "trie_backward_load_sm90.cuh"

namespace radix::sm90 {

constexpr int kMeanThreads = 256;

// Finds the means, and sets the counts of items taken to 0.
template <typename T>
__global__ void __launch_bounds__(kMeanThreads) trie_means_kernel(const __grid_constant__ TrieBackward p) {
  constexpr int kLanes = kHeads / 8;  // of a row and head
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kMeanThreads + threadIdx.x) / kLanes;
  if (blockIdx.x == 0 && threadIdx.x < 2) {
    p.taken[threadIdx.x] = 0;
  }
  float sum = 0.0f;
  const bool is_row = at < static_cast<int64_t>(p.num_rows) * p.heads;
  if (is_row) {
    const int64_t offset = at * kHeads + threadIdx.x % kLanes * 8;
    const uint4 out = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.out) + offset);
    const uint4 grad = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.grad_out) + offset);
    const T* outs = reinterpret_cast<const T*>(&out);
    const T* grads = reinterpret_cast<const T*>(&grad);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum += to_float(outs[i]) * to_float(grads[i]);
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(~0u, sum, step);
  }
  if (is_row && threadIdx.x % kLanes == 0) {
    p.means[at % p.heads * p.num_rows + at / p.heads] = sum;
  }
}

template <typename T, bool kOfKeys>
__global__ void __launch_bounds__(kTrieThreads, 1)
    trie_backward_kernel(const __grid_constant__ TrieBackward p, const __grid_constant__ TrieMaps maps) {
  extern __shared__ char memory[];
  using Shared = BackwardShared<T, kOfKeys>;
  Shared& shared = *reinterpret_cast<Shared*>(memory + -shared_address(memory) % 1024);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32;
  if (kOfKeys) {
    let_next_kernel_begin();
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      init_barrier(shared_address(&shared.held_full[i]), kWarpGroup);
      init_barrier(shared_address(&shared.held_empty[i]), kComputing);
    }
    for (int i = 0; i < Shared::kStages; ++i) {
      init_barrier(shared_address(&shared.full[i][0]), Shared::kTile);
      init_barrier(shared_address(&shared.full[i][1]), Shared::kTile);
      init_barrier(shared_address(&shared.empty[i]), kComputing);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp < 4) {
    give_registers<kLoadingRegisters>();
    BackwardLoader<T, kOfKeys> loader{p, maps, shared, warp, lane};
    if constexpr (kOfKeys) {
      loader.run_keys();
    } else {
      loader.run_queries();
    }
  } else {
    take_registers<kComputingRegisters>();
    BackwardComputer<T, kOfKeys> computer{p, shared, warp / 4 - 1, warp % 4, lane};
    if constexpr (kOfKeys) {
      computer.run_keys();
    } else {
      computer.run_queries();
    }
  }
  if (!kOfKeys) {
    wait_for_kernel_before();  // whatever follows waits for this kernel alone
  }
}

}  // namespace radix::sm90
