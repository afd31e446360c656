// radix::fold, radix::fold_plan and radix::fold_batch on CUDA.
//
// The kernels merge tokens by hashes and compare what they merged (see fold_kernels.cuh). Where two paths had one hash,
// or a token found no slot within a few steps, all is done again under another key and, should that fail too, the
// representatives are found by sorting, without a hash (see path_names.cuh). Nothing but a Summary travels to the host.
#include "../fold.h"
#include "fold_tables.cuh"
#include "inverse.cuh"
#include "path_names.cuh"
#include "pinned.cuh"

namespace radix {
namespace {

// The most sequences, and tokens times sequences, of a fold whose inverses write_tables makes: to look into all later
// sequences takes no longer than a sort then.
constexpr int64_t kFewSequencesToSearch = 512;
constexpr int64_t kFewLooks = int64_t{1} << 25;

struct How {
  bool from_zero = false;  // position_ids are not read
  bool front = false;
  HashKey key = HashKey::draw();
  uint64_t hash_bits = ~uint64_t{0};
};

// One fold, from the checks of its arguments to its outputs.
class DeviceFold {
 public:
  DeviceFold(
      const char* op,
      const Tensor& input_ids,
      const Tensor& position_ids,
      const Tensor& cu_seqlens,
      int64_t pad_multiple_of,
      const How& how)
      : op_(op),
        place_(cuda_place({&input_ids, &position_ids, &cu_seqlens})),
        device_(op, checked(op, input_ids, position_ids, cu_seqlens, pad_multiple_of, place_)),
        ids_(as_contiguous(input_ids)),
        positions_(how.from_zero ? Tensor() : as_contiguous(position_ids)),
        cu_seqlens_(as_contiguous(cu_seqlens)) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_cuda(op, cudaStreamIsCapturing(device_.stream(), &capture));
    RADIX_CHECK(
        capture == cudaStreamCaptureStatusNone,
        op,
        "a CUDA graph is being captured, but the number of rows must reach the host; fold before the capture");
    steps_.batch = Batch{
        integers_of(ids_),
        how.from_zero ? Integers{nullptr, /*wide=*/true} : integers_of(positions_),
        integers_of(cu_seqlens_),
        ids_.size(0),
        cu_seqlens_.size(0) - 1,
        nullptr,
        how.from_zero,
        how.front,
        how.key};
    steps_.table.hash_bits = how.hash_bits;
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
    Tables out{};
    add_rows(out);
    write<false>(out);
    return {out_ids_, out_positions_, unfold_index_, fold_index_};
  }

  Plan plan(Tensor* cu_seqlens = nullptr) {
    Tables out{};
    add_rows(out);
    Tensor kv_index = add(out.kv_index, summary_.kv_rows);
    Tensor run_sequences = add(out.run_sequences, summary_.runs);
    Tensor cu_seqlens_q = add(out.cu_seqlens_q, summary_.runs + 1);
    Tensor cu_seqlens_k = add(out.cu_seqlens_k, summary_.runs + 1);
    if (cu_seqlens != nullptr) {
      *cu_seqlens = add(out.cu_seqlens, steps_.batch.num_sequences + 1);
    }
    Tensor unfold_indptr = empty(num_rows_ + 1);
    Tensor unfold_members = empty(steps_.batch.num_tokens);
    Tensor kv_indptr = empty(num_rows_ + 1);
    Tensor kv_members = empty(summary_.kv_rows);
    if (steps_.batch.num_sequences <= kFewSequencesToSearch &&
        steps_.batch.num_sequences * steps_.batch.num_tokens <= kFewLooks) {
      out.unfold_indptr = unfold_indptr.mutable_data_ptr<int32_t>();
      out.unfold_members = unfold_members.mutable_data_ptr<int32_t>();
      out.kv_indptr = kv_indptr.mutable_data_ptr<int32_t>();
      out.kv_members = kv_members.mutable_data_ptr<int32_t>();
      write<true>(out);
    } else {
      write<false>(out);
      invert(unfold_index_, unfold_indptr, unfold_members);
      if (summary_.kv_rows == steps_.batch.num_tokens) {
        // Where every sequence adds rows, the K/V rows are those of all tokens and the two inverses are one.
        copy(unfold_indptr, kv_indptr);
        copy(unfold_members, kv_members);
      } else {
        invert(kv_index, kv_indptr, kv_members);
      }
    }
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

  // Returns a new table of `length` entries and points to it.
  Tensor add(int32_t*& table, int64_t length) const {
    Tensor tensor = empty(length);
    table = tensor.mutable_data_ptr<int32_t>();
    return tensor;
  }

  void fold() {
    const int64_t num_tokens = steps_.batch.num_tokens;
    const int64_t num_sequences = steps_.batch.num_sequences;
    static ConcurrentBlocks known;
    const int64_t most = known.of(place_, device_, &run_steps<false>, &run_steps<true>, &write_tables<true>);
    const int64_t wanted = (std::max(num_tokens, num_sequences) + kThreads - 1) / kThreads;
    blocks_ = static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, most));
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

  void copy_summary() {
    const Pinned<Summary> pinned(op_);
    check_cuda(
        op_,
        cudaMemcpyAsync(
            pinned.get(),
            steps_.summaries + steps_.batch.num_sequences - 1,
            sizeof(Summary),
            cudaMemcpyDeviceToHost,
            device_.stream()));
    check_cuda(op_, cudaStreamSynchronize(device_.stream()));
    summary_ = *pinned.get();
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

  void add_rows(Tables& out) {
    if (steps_.batch.num_sequences == 0) {
      unfold_index_ = empty(0);
    }
    out_ids_ = empty_at(place_, num_rows_, dtype_code_of(ids_));
    out_positions_ =
        empty_at(place_, num_rows_, steps_.batch.positions.wide ? aoti_torch_dtype_int64() : aoti_torch_dtype_int32());
    out.num_nodes = summary_.rows;
    out.num_rows = num_rows_;
    out.num_kv_rows = summary_.kv_rows;
    out.ids = out_ids_.mutable_data_ptr();
    out.positions = out_positions_.mutable_data_ptr();
    out.unfold_index = unfold_index_.mutable_data_ptr<int32_t>();
    fold_index_ = add(out.fold_index, num_rows_);
  }

  template <bool kInverts>
  void write(Tables out) const {
    const unsigned blocks = std::max(blocks_, 1u);
    Workspace workspace;
    if constexpr (kInverts) {
      const int64_t before_at = workspace.add<Members>(steps_.batch.num_tokens);
      const int64_t totals_at = workspace.add<Members>(blocks);
      workspace.allocate(place_);
      out.before = workspace.at<Members>(before_at);
      out.totals = workspace.at<Members>(totals_at);
      device_.launch_cooperative(&write_tables<true>, blocks, Writing{steps_, out});
    } else {
      device_.launch(&write_tables<false>, dim3(blocks), dim3(kThreads), Writing{steps_, out});
    }
  }

  void invert(const Tensor& index, Tensor& indptr, Tensor& members) const {
    invert_index(
        op_,
        place_,
        device_,
        integers_of(index),
        index.size(0),
        num_rows_,
        indptr.mutable_data_ptr<int32_t>(),
        members.mutable_data_ptr<int32_t>());
  }

  void copy(const Tensor& from, Tensor& to) const {
    check_cuda(
        op_,
        cudaMemcpyAsync(
            to.mutable_data_ptr(),
            from.const_data_ptr(),
            from.size(0) * sizeof(int32_t),
            cudaMemcpyDeviceToDevice,
            device_.stream()));
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
  return DeviceFold("fold", input_ids, position_ids, cu_seqlens, pad_multiple_of, How{}).outputs();
}

Plan fold_plan_cuda(
    const Tensor& input_ids, const Tensor& position_ids, const Tensor& cu_seqlens, int64_t pad_multiple_of) {
  return DeviceFold("fold_plan", input_ids, position_ids, cu_seqlens, pad_multiple_of, How{}).plan();
}

BatchTables fold_batch_cuda(
    const Tensor& input_ids,
    const Tensor& position_ids,
    const Tensor& cu_seqlens,
    int64_t pad_multiple_of,
    bool from_zero,
    bool front) {
  DeviceFold fold(
      "fold_batch", input_ids, position_ids, cu_seqlens, pad_multiple_of, How{.from_zero = from_zero, .front = front});
  Tensor ends;
  const Plan plan = fold.plan(&ends);
  return std::tuple_cat(plan, std::tuple(ends));
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
  DeviceFold fold(op, input_ids, position_ids, cu_seqlens, 1, How{.key = given, .hash_bits = bits});
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
  m.impl("fold_batch", TORCH_BOX(&radix::fold_batch_cuda));
  m.impl("_fold_by_key", TORCH_BOX(&radix::fold_by_key));
}
