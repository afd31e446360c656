// radix::fold and radix::fold_plan on CUDA.
//
// Every token is looked up in a hash table by a hash of its path, and the first token of each path represents it. Then
// each token that is not first is compared with its representative: token, position, and the representatives of the
// tokens before them. If all are equal the merges are right, since a token without one before it has a path of one
// step, and by induction. If one differs, two paths had one hash. Then, and where a token found no slot within a few
// steps, all is done again under another key and, should that fail too, the representatives are found by sorting,
// without a hash (see path_names.cuh). Nothing but a Summary travels to the host.
//
// A small fold is all launches, so one kernel does all up to the Summary, its blocks waiting for each other in between.
#include "../fold.h"
#include "fold_batch.cuh"
#include "inverse.cuh"
#include "path_names.cuh"

#include <cooperative_groups.h>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cuda/atomic>

#include <atomic>

namespace radix {
namespace {

constexpr int32_t kEmpty = -1;
constexpr int64_t kFewSequences = 4 * kThreads;
// Slots after which a search that all of a warp still go on with is given up: hashes that are spread do not do that,
// and tokens that were chosen to meet in the table would read it at one place, one after another.
constexpr int32_t kCrowded = 16;
constexpr unsigned kWholeWarp = 0xffffffff;

// An open-addressing table of tokens, in which all tokens whose paths have one hash find one slot; it holds the first
// of them.
struct Table {
  int32_t* slots;
  uint32_t mask;
  int32_t longest_search;  // in slots
  uint32_t* slot_of;       // [num_tokens]
  uint64_t hash_bits;      // those of the hashes that are used: all, but for tests

  __device__ int32_t first(int64_t token) const {
    return slots[slot_of[token]];
  }
};

// What is shared by the sequences up to one, and all that the host must know of the batch.
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

// What the steps of a fold pass to each other, in device memory.
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

// All steps up to the summaries or, where the representatives are known by sorting, from verifying on.
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
    // Hashes of paths: of the block's share of tokens first, then with what the blocks before it add.
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
  // Few sequences are summed up by one block, for which no other needs to wait.
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

// What one sequence adds, from the summary of the sequences up to it.
struct Added {
  int64_t start;
  int64_t length;
  int64_t count;  // its last tokens
  int64_t first_row;
  int64_t first_kv_row;

  __device__ Added(const Steps& steps, int64_t sequence)
      : start(steps.batch.cu_seqlens[sequence]),
        length(steps.batch.length(sequence)),
        count(length - steps.shared[sequence]),
        first_row(sequence > 0 ? steps.summaries[sequence - 1].rows : 0),
        first_kv_row(sequence > 0 ? steps.summaries[sequence - 1].kv_rows : 0) {
  }

  __device__ int64_t row_of(int64_t token) const {
    return first_row + (token - (start + length - count));
  }
};

struct Outputs {
  void* ids;
  void* positions;
  int32_t* unfold_index;
  int32_t* fold_index;
  int32_t* kv_index;  // null where no plan is wanted
};

__device__ inline void store(void* data, bool wide, int64_t i, int64_t value) {
  if (wide) {
    static_cast<int64_t*>(data)[i] = value;
  } else {
    static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value);
  }
}

__global__ void write_rows(Steps steps, int64_t num_nodes, int64_t num_rows, Outputs out) {
  const Batch& batch = steps.batch;
  for_each(batch.num_tokens, [&](int64_t token) {
    const int32_t first = steps.representatives[token];
    const int64_t row = Added(steps, batch.sequences[first]).row_of(first);
    out.unfold_index[token] = static_cast<int32_t>(row);
    if (first == token) {
      store(out.ids, batch.ids.wide, row, batch.ids[token]);
      store(out.positions, batch.positions.wide, row, batch.positions[token]);
      out.fold_index[row] = static_cast<int32_t>(token);
    }
    if (out.kv_index != nullptr) {
      const Added own(steps, batch.sequences[token]);
      if (own.count > 0) {
        out.kv_index[own.first_kv_row + (token - own.start)] = static_cast<int32_t>(row);
      }
    }
  });
  for_each(num_rows - num_nodes, [&](int64_t i) {
    store(out.ids, batch.ids.wide, num_nodes + i, 0);
    store(out.positions, batch.positions.wide, num_nodes + i, 0);
    out.fold_index[num_nodes + i] = 0;
  });
}

__global__ void write_runs(Steps steps, int32_t* run_sequences, int32_t* cu_seqlens_q, int32_t* cu_seqlens_k) {
  for_each(steps.batch.num_sequences, [&](int64_t sequence) {
    if (Added(steps, sequence).count > 0) {
      const Summary& summary = steps.summaries[sequence];
      run_sequences[summary.runs - 1] = static_cast<int32_t>(sequence);
      cu_seqlens_q[summary.runs] = summary.rows;
      cu_seqlens_k[summary.runs] = summary.kv_rows;
    }
  });
  for_each(1, [&](int64_t) { cu_seqlens_q[0] = cu_seqlens_k[0] = 0; });
}

// One fold: what its steps pass to each other.
class DeviceFold {
 public:
  DeviceFold(
      const char* op,
      const Tensor& input_ids,
      const Tensor& position_ids,
      const Tensor& cu_seqlens,
      int64_t pad_multiple_of,
      bool front = false,
      const HashKey& key = HashKey::draw(),
      uint64_t hash_bits = ~uint64_t{0})
      : op_(op),
        place_(cuda_place({&input_ids, &position_ids, &cu_seqlens})),
        device_(op, checked(op, input_ids, position_ids, cu_seqlens, pad_multiple_of, place_)),
        ids_(as_contiguous(input_ids)),
        positions_(as_contiguous(position_ids)),
        cu_seqlens_(as_contiguous(cu_seqlens)) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_cuda(op, cudaStreamIsCapturing(device_.stream(), &capture));
    RADIX_CHECK(
        capture == cudaStreamCaptureStatusNone,
        op,
        "a CUDA graph is being captured, but the number of rows must reach the host; fold before the capture");
    steps_.batch = Batch{
        integers_of(ids_),
        integers_of(positions_),
        integers_of(cu_seqlens_),
        ids_.size(0),
        cu_seqlens_.size(0) - 1,
        nullptr,
        front,
        key};
    steps_.table.hash_bits = hash_bits;
    if (steps_.batch.num_sequences == 0) {
      // No token has a sequence: cu_seqlens holds one number, and all is said once it is 0 and equals the tokens.
      host_bounds();
      steps_.batch.num_tokens = 0;
      summary_ = Summary{0, 0, 0, 0, 0, 0, 0, 1, 1};
    } else {
      fold();
    }
    num_rows_ = padded_rows(op, summary_.rows, pad_multiple_of);
  }

  Fold outputs() {
    write_rows_to(nullptr);
    return {out_ids_, out_positions_, unfold_index_, fold_index_};
  }

  Plan plan() {
    const int32_t int32 = aoti_torch_dtype_int32();
    Tensor kv_index = empty(summary_.kv_rows);
    write_rows_to(kv_index.mutable_data_ptr<int32_t>());
    Tensor run_sequences = empty(summary_.runs);
    Tensor cu_seqlens_q = empty(summary_.runs + 1);
    Tensor cu_seqlens_k = empty(summary_.runs + 1);
    device_.launch_over(
        std::max<int64_t>(steps_.batch.num_sequences, 1),
        &write_runs,
        steps_,
        run_sequences.mutable_data_ptr<int32_t>(),
        cu_seqlens_q.mutable_data_ptr<int32_t>(),
        cu_seqlens_k.mutable_data_ptr<int32_t>());
    auto inverse_of = [&](const Tensor& index) {
      std::pair<Tensor, Tensor> inverse{empty(num_rows_ + 1), empty(index.size(0))};
      invert_index(
          op_,
          place_,
          device_,
          integers_of(index),
          index.size(0),
          num_rows_,
          inverse.first.mutable_data_ptr<int32_t>(),
          inverse.second.mutable_data_ptr<int32_t>());
      return inverse;
    };
    auto copy_of = [&](const Tensor& tensor) {
      Tensor copy = empty(tensor.size(0));
      check_cuda(
          op_,
          cudaMemcpyAsync(
              copy.mutable_data_ptr(),
              tensor.const_data_ptr(),
              tensor.size(0) * sizeof(int32_t),
              cudaMemcpyDeviceToDevice,
              device_.stream()));
      return copy;
    };
    auto [unfold_indptr, unfold_members] = inverse_of(unfold_index_);
    // Where every sequence adds rows, the K/V rows are those of all tokens and the two inverses are one.
    auto [kv_indptr, kv_members] = summary_.kv_rows == steps_.batch.num_tokens
                                       ? std::pair(copy_of(unfold_indptr), copy_of(unfold_members))
                                       : inverse_of(kv_index);
    Tensor counts = empty_at(cpu(), 4, aoti_torch_dtype_int64());
    int64_t* count = counts.mutable_data_ptr<int64_t>();
    count[0] = summary_.rows;
    count[1] = summary_.longest_run;
    count[2] = summary_.longest;
    count[3] = summary_.shortest;
    return {
        out_ids_,
        out_positions_,
        unfold_index_,
        fold_index_,
        unfold_indptr,
        unfold_members,
        run_sequences,
        cu_seqlens_q,
        cu_seqlens_k,
        kv_index,
        kv_indptr,
        kv_members,
        counts};
  }

  // 1: the key served, 2: a second one did, 3: paths were sorted.
  int64_t ways_tried() const {
    return ways_tried_;
  }

 private:
  static const Place& checked(
      const char* op,
      const Tensor& input_ids,
      const Tensor& position_ids,
      const Tensor& cu_seqlens,
      int64_t pad_multiple_of,
      const Place& place) {
    check_fold_arguments(op, input_ids, position_ids, cu_seqlens, pad_multiple_of, place);
    return place;
  }

  Tensor empty(int64_t length) const {
    return empty_at(place_, length, aoti_torch_dtype_int32());
  }

  void fold() {
    const int64_t num_tokens = steps_.batch.num_tokens;
    const int64_t num_sequences = steps_.batch.num_sequences;
    const int64_t wanted = (std::max(num_tokens, num_sequences) + kThreads - 1) / kThreads;
    blocks_ = static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, most_blocks()));
    // In a small fold the longest search counts, which a table that is nearly empty shortens.
    const bool is_small = num_tokens < (1 << 20);
    const int64_t slots_each = is_small ? 4 : 2;
    // Longer than chance makes any search of a batch in a table that is a quarter or half full.
    steps_.table.longest_search = is_small ? 64 : 256;
    steps_.capacity = 4;
    while (steps_.capacity < slots_each * num_tokens) {
      steps_.capacity *= 2;
    }
    const int64_t sequences_at = workspace_.add<int32_t>(num_tokens);
    const int64_t slot_of_at = workspace_.add<uint32_t>(num_tokens);
    const int64_t slots_at = workspace_.add<int32_t>(steps_.capacity);
    const int64_t path_hashes_at = workspace_.add<uint64_t>(num_tokens);
    const int64_t representatives_at = workspace_.add<int32_t>(num_tokens);
    const int64_t shared_at = workspace_.add<int32_t>(num_sequences);
    const int64_t verified_at = workspace_.add<int32_t>(1);
    const int64_t summaries_at = workspace_.add<Summary>(num_sequences);
    const int64_t path_totals_at = workspace_.add<PathSum>(blocks_);
    const int64_t summary_totals_at = workspace_.add<Summary>(blocks_);
    workspace_.allocate(place_);
    steps_.batch.sequences = workspace_.at<int32_t>(sequences_at);
    steps_.table.slots = workspace_.at<int32_t>(slots_at);
    steps_.table.mask = static_cast<uint32_t>(steps_.capacity - 1);
    steps_.table.slot_of = workspace_.at<uint32_t>(slot_of_at);
    steps_.path_hashes = workspace_.at<uint64_t>(path_hashes_at);
    steps_.representatives = workspace_.at<int32_t>(representatives_at);
    steps_.shared = workspace_.at<int32_t>(shared_at);
    steps_.verified = workspace_.at<int32_t>(verified_at);
    steps_.summaries = workspace_.at<Summary>(summaries_at);
    steps_.path_totals = workspace_.at<PathSum>(path_totals_at);
    steps_.summary_totals = workspace_.at<Summary>(summary_totals_at);

    device_.launch_cooperative(&run_steps<false>, blocks_, steps_);
    unfold_index_ = empty(num_tokens);  // while the device is busy
    copy_summary();
    if (!summary_.well_formed) {
      host_bounds();
      fail(op_, "cu_seqlens changed while it was read");
    }
    if (steps_.batch.front) {
      steps_.batch.num_tokens = summary_.tokens;
      unfold_index_ = empty(summary_.tokens);
    }
    if (!summary_.verified) {
      steps_.batch.key = HashKey::draw();
      ways_tried_ = 2;
      device_.launch_cooperative(&run_steps<false>, blocks_, steps_);
      copy_summary();
    }
    if (!summary_.verified) {
      ways_tried_ = 3;
      name_paths(op_, place_, device_, steps_.batch, summary_.longest, steps_.representatives);
      device_.launch_cooperative(&run_steps<true>, blocks_, steps_);
      copy_summary();
    }
    RADIX_CHECK(summary_.verified, op_, "the arguments changed while they were read");
  }

  // How many blocks of run_steps the device runs at once, asked for once.
  int64_t most_blocks() const {
    constexpr int kDevices = 64;
    static std::atomic<int64_t> known[kDevices];
    std::atomic<int64_t>* const remembered = place_.index < kDevices ? &known[place_.index] : nullptr;
    int64_t blocks = remembered ? remembered->load(std::memory_order_relaxed) : 0;
    if (blocks == 0) {
      blocks = std::min(device_.concurrent_blocks(&run_steps<false>), device_.concurrent_blocks(&run_steps<true>));
      if (remembered) {
        remembered->store(blocks, std::memory_order_relaxed);
      }
    }
    return blocks;
  }

  void copy_summary() {
    check_cuda(
        op_,
        cudaMemcpyAsync(
            &summary_,
            steps_.summaries + steps_.batch.num_sequences - 1,
            sizeof(Summary),
            cudaMemcpyDeviceToHost,
            device_.stream()));
    check_cuda(op_, cudaStreamSynchronize(device_.stream()));
  }

  // Raises what the CPU raises for malformed cu_seqlens, from a copy.
  void host_bounds() const {
    Tensor copy = empty_at(cpu(), cu_seqlens_.size(0), dtype_code_of(cu_seqlens_));
    check_cuda(
        op_,
        cudaMemcpyAsync(
            copy.mutable_data_ptr(),
            cu_seqlens_.const_data_ptr(),
            cu_seqlens_.size(0) * (is_int32(cu_seqlens_) ? sizeof(int32_t) : sizeof(int64_t)),
            cudaMemcpyDeviceToHost,
            device_.stream()));
    check_cuda(op_, cudaStreamSynchronize(device_.stream()));
    bounds_of(op_, copy, steps_.batch.num_tokens, steps_.batch.front);
  }

  void write_rows_to(int32_t* kv_index) {
    if (steps_.batch.num_sequences == 0) {
      unfold_index_ = empty(0);
    }
    out_ids_ = empty_at(place_, num_rows_, dtype_code_of(ids_));
    out_positions_ = empty_at(place_, num_rows_, dtype_code_of(positions_));
    fold_index_ = empty(num_rows_);
    device_.launch_over(
        std::max(steps_.batch.num_tokens, num_rows_ - summary_.rows),
        &write_rows,
        steps_,
        static_cast<int64_t>(summary_.rows),
        num_rows_,
        Outputs{
            out_ids_.mutable_data_ptr(),
            out_positions_.mutable_data_ptr(),
            unfold_index_.mutable_data_ptr<int32_t>(),
            fold_index_.mutable_data_ptr<int32_t>(),
            kv_index});
  }

  const char* op_;
  Place place_;
  Device device_;
  Tensor ids_;
  Tensor positions_;
  Tensor cu_seqlens_;
  Steps steps_{};
  unsigned blocks_ = 0;
  Workspace workspace_;
  Summary summary_{};
  int64_t ways_tried_ = 1;
  int64_t num_rows_ = 0;
  Tensor out_ids_;
  Tensor out_positions_;
  Tensor unfold_index_;
  Tensor fold_index_;
};

Fold fold_cuda(const Tensor& input_ids, const Tensor& position_ids, const Tensor& cu_seqlens, int64_t pad_multiple_of) {
  return DeviceFold("fold", input_ids, position_ids, cu_seqlens, pad_multiple_of).outputs();
}

Plan fold_plan_cuda(
    const Tensor& input_ids, const Tensor& position_ids, const Tensor& cu_seqlens, int64_t pad_multiple_of) {
  return DeviceFold("fold_plan", input_ids, position_ids, cu_seqlens, pad_multiple_of).plan();
}

Plan fold_plan_front_cuda(
    const Tensor& input_ids, const Tensor& position_ids, const Tensor& cu_seqlens, int64_t pad_multiple_of) {
  return DeviceFold("fold_plan_front", input_ids, position_ids, cu_seqlens, pad_multiple_of, true).plan();
}

// For tests: fold_plan with the numbers of a HashKey given and hashes of `hash_bits` bits, and how many ways were
// tried.
decltype(std::tuple_cat(std::declval<Plan>(), std::declval<std::tuple<int64_t>>())) fold_by_key(
    const Tensor& input_ids,
    const Tensor& position_ids,
    const Tensor& cu_seqlens,
    const Tensor& key,
    int64_t hash_bits) {
  const char* op = "_fold_by_key";
  check_index_like(op, "key", key, cpu());
  RADIX_CHECK(key.size(0) == 3 && !is_int32(key), op, "key must hold 3 numbers of int64, got ", key.size(0));
  RADIX_CHECK(hash_bits >= 0 && hash_bits <= 64, op, "hash_bits must be from 0 to 64, got ", hash_bits);
  const Tensor held = as_contiguous(key);
  const int64_t* numbers = held.const_data_ptr<int64_t>();
  const HashKey given{
      static_cast<uint64_t>(numbers[0]), static_cast<uint64_t>(numbers[1]), static_cast<uint64_t>(numbers[2])};
  const uint64_t bits = hash_bits == 64 ? ~uint64_t{0} : (uint64_t{1} << hash_bits) - 1;
  DeviceFold fold(op, input_ids, position_ids, cu_seqlens, 1, false, given, bits);
  return std::tuple_cat(fold.plan(), std::tuple(fold.ways_tried()));
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_FRAGMENT(radix, m) {
  m.def(
      "_fold_by_key(Tensor input_ids, Tensor position_ids, Tensor cu_seqlens, Tensor key, int hash_bits)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
      " int)");
}

STABLE_TORCH_LIBRARY_IMPL(radix, CUDA, m) {
  m.impl("fold", TORCH_BOX(&radix::fold_cuda));
  m.impl("fold_plan", TORCH_BOX(&radix::fold_plan_cuda));
  m.impl("fold_plan_front", TORCH_BOX(&radix::fold_plan_front_cuda));
  m.impl("_fold_by_key", TORCH_BOX(&radix::fold_by_key));
}
