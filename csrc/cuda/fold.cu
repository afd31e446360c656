// radix::fold and radix::fold_plan on CUDA.
//
// The kernels merge tokens by hashes and compare what they merged (see fold_kernels.cuh). Where two paths had one hash,
// or a token found no slot within a few steps, all is done again under another key and, should that fail too, the
// representatives are found by sorting, without a hash (see path_names.cuh). Nothing but a Summary travels to the host.
#include "../fold.h"
#include "fold_kernels.cuh"
#include "inverse.cuh"
#include "path_names.cuh"

#include <atomic>

namespace radix {
namespace {

// One fold, from the checks of its arguments to its outputs.
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
      // No token has a sequence: cu_seqlens holds one number, which must be 0 and the number of tokens.
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

  // Returns 1 where the first key served, 2 where the second one did, 3 where paths were sorted.
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
    // The longest search decides the time of a small fold, and an emptier table shortens it.
    const bool is_small = num_tokens < (1 << 20);
    const int64_t slots_each = is_small ? 4 : 2;
    // Chance makes no search of a batch this long in a table that is a quarter or half full.
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

  // Returns how many blocks of run_steps the device runs at once; it is asked once.
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

// Serves tests: returns what fold_plan does with the HashKey that is given and hashes of `hash_bits` bits, and how many
// ways were tried.
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
