// The kernel of a fold up to what the host must know of it, from hashes of paths on. fold_tables.cuh holds the next
// one.
//
// Every token is looked up in a hash table by a hash of its path, and the first token of each path represents it. Then
// each token that is not first is compared with its representative: token, position, and the representatives of the
// tokens before them. If all are equal the merges are right, by induction from the first tokens of sequences, whose
// paths are one step long. If one differs, two paths had one hash.
//
// A small fold spends its time on launches, so one kernel does all up to the Summary; its blocks wait for each other.
#pragma once

#include "fold_batch.cuh"

#include <cooperative_groups.h>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cuda/atomic>

namespace radix {

constexpr int32_t kEmpty = -1;
constexpr int64_t kFewSequences = 4 * kThreads;
// Slots after which a search is given up if all of a warp are still searching. Spread hashes never get there; tokens
// that were chosen to meet in the table would read it at one place, one after another.
constexpr int32_t kCrowded = 16;
constexpr unsigned kWholeWarp = 0xffffffff;

// An open-addressing table of tokens, in which all tokens whose paths have one hash find one slot; it holds the first
// of them.
struct Table {
  int32_t* slots;
  uint32_t mask;
  int32_t longest_search;  // in slots
  uint32_t* slot_of;       // [num_tokens]
  uint64_t hash_bits;      // the bits of hashes that are used: all but in tests

  __device__ int32_t first(int64_t token) const {
    return slots[slot_of[token]];
  }
};

// Totals over the sequences up to one; the last holds all that the host must know of the batch.
struct Summary {
  int32_t tokens;
  int32_t rows;
  int32_t runs;
  int32_t kv_rows;
  int32_t longest_run;
  int32_t longest;
  int32_t shortest;
  int32_t well_formed;
  int32_t verified;
};
static_assert(sizeof(Summary) <= 64, "one small copy tells the host all");

__host__ __device__ inline int32_t wrapping_sum(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

struct Combine {
  __host__ __device__ Summary operator()(const Summary& a, const Summary& b) const {
    return Summary{
        wrapping_sum(a.tokens, b.tokens),
        wrapping_sum(a.rows, b.rows),
        wrapping_sum(a.runs, b.runs),
        wrapping_sum(a.kv_rows, b.kv_rows),
        a.longest_run > b.longest_run ? a.longest_run : b.longest_run,
        a.longest > b.longest ? a.longest : b.longest,
        a.shortest < b.shortest ? a.shortest : b.shortest,
        a.well_formed & b.well_formed,
        a.verified & b.verified};
  }
};

// A sum of step hashes since the last start of a sequence, if there is one among its tokens.
struct PathSum {
  uint64_t sum;
  bool starts;
};

struct ContinuePath {
  __host__ __device__ PathSum operator()(const PathSum& a, const PathSum& b) const {
    return b.starts ? b : PathSum{a.sum + b.sum, a.starts};
  }
};

// The arrays that the steps of a fold pass to each other, in device memory.
struct Steps {
  Batch batch;
  Table table;
  int64_t capacity;
  uint64_t* path_hashes;     // [num_tokens]
  int32_t* representatives;  // [num_tokens]
  int32_t* shared;           // [num_sequences] leading tokens that earlier sequences hold too
  int32_t* verified;
  Summary* summaries;       // [num_sequences] of the sequences up to each
  PathSum* path_totals;     // [blocks]
  Summary* summary_totals;  // [blocks]
};

// The last sequence that starts at or before a token.
__device__ inline int32_t find_sequence(const Batch& batch, int64_t token) {
  int64_t low = 0;
  int64_t high = batch.num_sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (batch.cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return static_cast<int32_t>(low);
}

// Takes every sequence for one that adds nothing.
__device__ inline void clear_sequences(const Steps& steps) {
  for_each(
      steps.batch.num_sequences, [&](int64_t s) { steps.shared[s] = static_cast<int32_t>(steps.batch.length(s)); });
  for_each(1, [&](int64_t) { *steps.verified = 1; });
}

__device__ inline void insert_token(const Steps& steps, int32_t token) {
  const Table& table = steps.table;
  const uint64_t path = steps.path_hashes[token] & table.hash_bits;
  uint32_t slot = static_cast<uint32_t>(mix(path) & table.hash_bits) & table.mask;
  for (int32_t looked = 1;; ++looked, slot = (slot + 1) & table.mask) {
    // A slot that is taken stays with its path, whichever of the path's tokens it holds at the moment. The hash of that
    // token's path was written before the token was.
    cuda::atomic_ref<int32_t, cuda::thread_scope_device> place(table.slots[slot]);
    int32_t held = place.load(cuda::memory_order_acquire);
    if (held == kEmpty && place.compare_exchange_strong(held, token, cuda::memory_order_acq_rel)) {
      break;
    }
    if ((steps.path_hashes[held] & table.hash_bits) == path) {
      if (token < held) {
        place.fetch_min(token, cuda::memory_order_release);
      }
      break;
    }
    if (looked == table.longest_search || (looked == kCrowded && __activemask() == kWholeWarp)) {
      *steps.verified = 0;
      break;
    }
  }
  table.slot_of[token] = slot;
}

// The representative of a token, by the table or, where that failed, as it was found by sorting.
template <bool kNamed>
__device__ inline int32_t first_of(const Steps& steps, int64_t token) {
  return kNamed ? steps.representatives[token] : steps.table.first(token);
}

// Writes a token's representative and where its sequence leaves the earlier ones, and compares the two tokens.
template <bool kNamed>
__device__ inline void verify_token(const Steps& steps, int64_t token) {
  const Batch& batch = steps.batch;
  const int64_t start = batch.start(token);
  const int32_t first = first_of<kNamed>(steps, token);
  const int32_t before = token == start ? kNone : first_of<kNamed>(steps, token - 1);
  if constexpr (!kNamed) {
    steps.representatives[token] = first;
  }
  if (first == token) {
    if (token == start || before != token - 1) {
      steps.shared[batch.sequences[token]] = static_cast<int32_t>(token - start);
    }
  } else {
    const int32_t before_first = first == batch.start(first) ? kNone : first_of<kNamed>(steps, first - 1);
    if (before != before_first || !batch.same_token(token, first)) {
      *steps.verified = 0;
    }
  }
}

__device__ inline Summary summary_of(const Steps& steps, int64_t sequence) {
  const int32_t length = static_cast<int32_t>(steps.batch.length(sequence));
  const int32_t added = length - steps.shared[sequence];
  return Summary{
      length,
      added,
      added > 0,
      added > 0 ? length : 0,
      added,
      length,
      length,
      steps.batch.well_formed_at(sequence),
      *steps.verified};
}

constexpr Summary kNothing{0, 0, 0, 0, 0, 0, std::numeric_limits<int32_t>::max(), 1, 1};

// The share of `count` items that one of the blocks works on.
struct Share {
  int64_t begin;
  int64_t end;

  __device__ Share(int64_t count, unsigned blocks)
      : begin(count * blockIdx.x / blocks), end(count * (blockIdx.x + 1) / blocks) {
  }
};

// Runs all steps up to the summaries; where the representatives are known by sorting, from verifying on.
template <bool kNamed>
__global__ void __launch_bounds__(kThreads, 3) run_steps(Steps steps) {
  using PathScan = cub::BlockScan<PathSum, kThreads>;
  using SummaryScan = cub::BlockScan<Summary, kThreads>;
  using SummaryReduce = cub::BlockReduce<Summary, kThreads>;
  __shared__ union {
    typename PathScan::TempStorage path;
    typename SummaryScan::TempStorage summary;
    typename SummaryReduce::TempStorage reduce;
  } shared;
  __shared__ Summary earlier;
  const auto grid = cooperative_groups::this_grid();
  const Batch& batch = steps.batch;
  const Share tokens(batch.tokens(), gridDim.x);
  clear_sequences(steps);
  if constexpr (kNamed) {
    grid.sync();
  } else {
    // Hashes paths: first over the block's share of tokens, then with what the blocks before it add.
    for_each(steps.capacity / 4, [&](int64_t i) {
      reinterpret_cast<int4*>(steps.table.slots)[i] = make_int4(kEmpty, kEmpty, kEmpty, kEmpty);
    });
    PathSum total{0, false};
    for (int64_t base = tokens.begin; base < tokens.end; base += kThreads) {
      const int64_t token = base + threadIdx.x;
      PathSum path{0, false};
      if (token < tokens.end) {
        batch.sequences[token] = find_sequence(batch, token);
        path = PathSum{batch.step_hash(token), token == batch.start(token)};
      }
      PathSum sum;
      PathScan(shared.path).InclusiveScan(path, path, ContinuePath{}, sum);
      __syncthreads();
      if (token < tokens.end) {
        steps.path_hashes[token] = ContinuePath{}(total, path).sum;
      }
      total = ContinuePath{}(total, sum);
    }
    if (threadIdx.x == 0) {
      steps.path_totals[blockIdx.x] = total;
    }
    grid.sync();
    PathSum before{0, false};
    for (unsigned base = 0; base < blockIdx.x; base += kThreads) {
      const unsigned block = base + threadIdx.x;
      PathSum sum = block < blockIdx.x ? steps.path_totals[block] : PathSum{0, false};
      PathSum all;
      PathScan(shared.path).InclusiveScan(sum, sum, ContinuePath{}, all);
      __syncthreads();
      before = ContinuePath{}(before, all);
    }
    for (int64_t token = tokens.begin + threadIdx.x; token < tokens.end; token += kThreads) {
      if (batch.start(token) < tokens.begin) {
        steps.path_hashes[token] += before.sum;
      }
      insert_token(steps, static_cast<int32_t>(token));
    }
    grid.sync();
  }
  for (int64_t token = tokens.begin + threadIdx.x; token < tokens.end; token += kThreads) {
    verify_token<kNamed>(steps, token);
  }
  grid.sync();
  // One block sums up few sequences, and no other needs to wait for it.
  const bool few = batch.num_sequences <= kFewSequences;
  if (few && blockIdx.x > 0) {
    return;
  }
  const Share sequences(batch.num_sequences, few ? 1 : gridDim.x);
  Summary total = kNothing;
  for (int64_t base = sequences.begin; base < sequences.end; base += kThreads) {
    const int64_t sequence = base + threadIdx.x;
    Summary summary = sequence < sequences.end ? summary_of(steps, sequence) : kNothing;
    Summary sum;
    SummaryScan(shared.summary).InclusiveScan(summary, summary, Combine{}, sum);
    __syncthreads();
    if (sequence < sequences.end) {
      steps.summaries[sequence] = Combine{}(total, summary);
    }
    total = Combine{}(total, sum);
  }
  if (few) {
    return;
  }
  if (threadIdx.x == 0) {
    steps.summary_totals[blockIdx.x] = total;
  }
  grid.sync();
  if (sequences.begin == sequences.end) {
    return;
  }
  Summary before = kNothing;
  for (unsigned block = threadIdx.x; block < blockIdx.x; block += kThreads) {
    before = Combine{}(before, steps.summary_totals[block]);
  }
  before = SummaryReduce(shared.reduce).Reduce(before, Combine{});
  if (threadIdx.x == 0) {
    earlier = before;
  }
  __syncthreads();
  for (int64_t sequence = sequences.begin + threadIdx.x; sequence < sequences.end; sequence += kThreads) {
    steps.summaries[sequence] = Combine{}(earlier, steps.summaries[sequence]);
  }
}

}  // namespace radix
