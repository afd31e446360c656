// radix::trie_order on CUDA; nothing is read on the host.
#include "../trie_order.h"
#include "inverse.cuh"

#include <torch/headeronly/macros/Macros.h>

#include <cub/block/block_scan.cuh>
#include <cub/device/device_scan.cuh>

namespace radix {
namespace {

// Another stream may write to the tensors, so a copy is checked and used.
__device__ inline void copy_end(const TrieOrder& order, int64_t i, int32_t* starts, int32_t* firsts) {
  const int64_t start = order.starts[i];
  const int64_t first = order.firsts[i];
  CUDA_KERNEL_ASSERT(start >= 0 && start <= order.num_rows && "cu_seqlens_q must be a fold's");
  CUDA_KERNEL_ASSERT(first >= 0 && first <= order.num_tokens && "cu_seqlens_k must be a fold's");
  starts[i] = static_cast<int32_t>(start);
  firsts[i] = static_cast<int32_t>(first);
}

__device__ inline void check_ends(const TrieOrder& order, int64_t run) {
  CUDA_KERNEL_ASSERT(order.has_sound_ends(run) && "cu_seqlens_q and cu_seqlens_k must be a fold's");
}

__device__ inline void check_parent(const TrieOrder& order, int64_t run) {
  const bool fits = order.find_parent(run);
  CUDA_KERNEL_ASSERT(fits && "cu_seqlens_q, cu_seqlens_k and kv_index must be a fold's");
}

// A chain of runs is no longer than a path: all threads together take at most as many steps as there are tokens.
__device__ inline void add_size(const TrieOrder& order, int64_t run) {
  const int32_t length = static_cast<int32_t>(order.length(run));
  for (int64_t at = run; at >= 0; at = order.above[at]) {
    atomicAdd(order.size + at, length);
  }
}

__device__ inline void find_number(const TrieOrder& order, int64_t run) {
  int32_t number = 0;
  for (int64_t at = run; at >= 0; at = order.above[at]) {
    number += order.hop[at];
  }
  order.number[run] = number;
}

__global__ void copy_ends(TrieOrder order, int32_t* starts, int32_t* firsts) {
  for_each(order.num_runs + 1, [&](int64_t i) { copy_end(order, i, starts, firsts); });
}

__global__ void find_parents(TrieOrder order, int32_t* group) {
  for_each(order.num_runs, [&](int64_t run) {
    check_ends(order, run);
    check_parent(order, run);
    group[run] = order.parent[run] + 1;
    order.size[run] = 0;
  });
}

__global__ void find_sizes(TrieOrder order) {
  for_each(order.num_runs, [&](int64_t run) { add_size(order, run); });
}

__global__ void rank_runs(TrieOrder order, uint32_t* sizes_by_rank) {
  for_each(order.num_runs + 1, [&](int64_t i) {
    sizes_by_rank[i] = i < order.num_runs ? static_cast<uint32_t>(order.size[order.by_parent[i]]) : 0;
    if (i < order.num_runs) {
      order.rank[order.by_parent[i]] = static_cast<int32_t>(i);
    }
  });
}

__global__ void find_hops(TrieOrder order) {
  for_each(order.num_runs, [&](int64_t run) { order.find_hop(run); });
}

__global__ void number_runs(TrieOrder order) {
  for_each(order.num_runs, [&](int64_t run) { find_number(order, run); });
}

__global__ void find_rows(TrieOrder order) {
  for_each(order.num_rows, [&](int64_t row) { order.find_row(row); });
}

// Runs so few that each block finds all that there is to know of them for itself, in shared memory.
constexpr int kFewRuns = 1024;
// Blocks that share the rows then; more would only do the same work of the runs once more.
constexpr int64_t kMostBlocks = 256;

__global__ void __launch_bounds__(kThreads) order_few_runs(TrieOrder order) {
  constexpr int kRunsEach = kFewRuns / kThreads;
  using Scan = cub::BlockScan<uint32_t, kThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ int32_t starts[kFewRuns + 1], firsts[kFewRuns + 1], parent[kFewRuns], above[kFewRuns], size[kFewRuns];
  __shared__ int32_t number[kFewRuns], hop[kFewRuns], rank[kFewRuns], parents[kFewRuns];
  __shared__ uint32_t sums[kFewRuns + 1];
  const int num_runs = static_cast<int>(order.num_runs);
  auto for_each_run = [&](auto body) {
    for (int run = threadIdx.x; run < num_runs; run += kThreads) {
      body(run);
    }
    __syncthreads();
  };
  for (int i = threadIdx.x; i <= num_runs; i += kThreads) {
    copy_end(order, i, starts, firsts);
  }
  __syncthreads();
  order.starts = Integers{starts, /*wide=*/false};
  order.firsts = Integers{firsts, /*wide=*/false};
  order.parent = parent;
  order.above = above;
  order.size = size;
  order.number = number;
  order.hop = hop;
  order.rank = rank;
  order.parents = parents;
  order.sums = sums;
  for_each_run([&](int run) { check_ends(order, run); });
  for_each_run([&](int run) {
    check_parent(order, run);
    size[run] = 0;
  });
  for_each_run([&](int run) { add_size(order, run); });
  for_each_run([&](int run) {
    int before = 0;
    for (int other = 0; other < num_runs; ++other) {
      before += parent[other] < parent[run] || (parent[other] == parent[run] && other < run);
    }
    rank[run] = before;
    parents[before] = parent[run];
    sums[before] = static_cast<uint32_t>(size[run]);
  });
  uint32_t own[kRunsEach];
  for (int i = 0; i < kRunsEach; ++i) {
    const int at = threadIdx.x * kRunsEach + i;
    own[i] = at < num_runs ? sums[at] : 0;
  }
  uint32_t total;
  Scan(scan).ExclusiveSum(own, own, total);
  __syncthreads();
  for (int i = 0; i < kRunsEach; ++i) {
    const int at = threadIdx.x * kRunsEach + i;
    if (at < num_runs) {
      sums[at] = own[i];
    }
  }
  if (threadIdx.x == 0) {
    sums[num_runs] = total;
  }
  __syncthreads();
  for_each_run([&](int run) { order.find_hop(run); });
  for_each_run([&](int run) { find_number(order, run); });
  for_each(order.num_rows, [&](int64_t row) { order.find_row(row); });
}

Order trie_order_cuda(
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const Tensor& kv_index, int64_t num_rows) {
  const char* op = "trie_order";
  const Place place = cuda_place({&cu_seqlens_q, &cu_seqlens_k, &kv_index});
  std::vector<Tensor> held;
  auto [order, outputs] = begin_trie_order(cu_seqlens_q, cu_seqlens_k, kv_index, num_rows, place, held);
  const int64_t num_runs = order.num_runs;
  const Device device(op, place);
  if (num_runs <= kFewRuns) {
    device.launch_over(std::clamp<int64_t>(num_rows, 1, kMostBlocks * kThreads), &order_few_runs, order);
    return outputs;
  }
  size_t scan_bytes = 0;
  auto scan = [&](void* temporary, const uint32_t* in, uint32_t* out) {
    check_cuda(op, cub::DeviceScan::ExclusiveSum(temporary, scan_bytes, in, out, num_runs + 1, device.stream()));
  };
  scan(nullptr, nullptr, nullptr);
  Workspace workspace;
  const int64_t parent_at = workspace.add<int32_t>(num_runs);
  const int64_t above_at = workspace.add<int32_t>(num_runs);
  const int64_t size_at = workspace.add<int32_t>(num_runs);
  const int64_t number_at = workspace.add<int32_t>(num_runs);
  const int64_t hop_at = workspace.add<int32_t>(num_runs);
  const int64_t branches_at = workspace.add<int32_t>(num_rows + 2);
  const int64_t by_parent_at = workspace.add<int32_t>(num_runs);
  const int64_t rank_at = workspace.add<int32_t>(num_runs);
  const int64_t sums_at = workspace.add<uint32_t>(num_runs + 1);
  const int64_t group_at = workspace.add<int32_t>(num_runs);
  const int64_t sizes_by_rank_at = workspace.add<uint32_t>(num_runs + 1);
  const int64_t starts_at = workspace.add<int32_t>(num_runs + 1);
  const int64_t firsts_at = workspace.add<int32_t>(num_runs + 1);
  const int64_t scan_at = workspace.add<char>(static_cast<int64_t>(scan_bytes));
  workspace.allocate(place);
  order.parent = workspace.at<int32_t>(parent_at);
  order.above = workspace.at<int32_t>(above_at);
  order.size = workspace.at<int32_t>(size_at);
  order.number = workspace.at<int32_t>(number_at);
  order.hop = workspace.at<int32_t>(hop_at);
  order.branches = workspace.at<int32_t>(branches_at);
  order.by_parent = workspace.at<int32_t>(by_parent_at);
  order.rank = workspace.at<int32_t>(rank_at);
  order.sums = workspace.at<uint32_t>(sums_at);
  int32_t* group = workspace.at<int32_t>(group_at);
  uint32_t* sizes_by_rank = workspace.at<uint32_t>(sizes_by_rank_at);
  int32_t* starts = workspace.at<int32_t>(starts_at);
  int32_t* firsts = workspace.at<int32_t>(firsts_at);

  device.launch_over(num_runs + 1, &copy_ends, order, starts, firsts);
  order.starts = Integers{starts, /*wide=*/false};
  order.firsts = Integers{firsts, /*wide=*/false};
  if (num_runs > 0) {
    device.launch_over(num_runs, &find_parents, order, group);
    device.launch_over(num_runs, &find_sizes, order);
    invert_index<int32_t>(
        op,
        place,
        device,
        Integers{group, false},
        num_runs,
        num_rows + 1,
        workspace.at<int32_t>(branches_at),
        workspace.at<int32_t>(by_parent_at));
    device.launch_over(num_runs + 1, &rank_runs, order, sizes_by_rank);
    scan(workspace.at<char>(scan_at), sizes_by_rank, order.sums);
    device.launch_over(num_runs, &find_hops, order);
    device.launch_over(num_runs, &number_runs, order);
  }
  device.launch_over(num_rows, &find_rows, order);
  return outputs;
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CUDA, m) {
  m.impl("trie_order", TORCH_BOX(&radix::trie_order_cuda));
}
