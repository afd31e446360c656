// radix::fold, radix::fold_plan and radix::fold_batch on the CPU.
#include "../fold.h"
#include "fold_trie.h"
#include "inverse.h"

namespace radix {
namespace {

struct Folded {
  Tensor input_ids;
  Tensor position_ids;
  Tensor unfold_index;
  Tensor fold_index;
  std::vector<int64_t> bounds;
  std::vector<Run> runs;
};

template <typename Id, typename Position>
Folded build(
    const char* op,
    const Tensor& input_ids,
    const Tensor& position_ids,
    std::vector<int64_t> bounds,
    int64_t pad_multiple_of) {
  const Tensor held_ids = as_contiguous(input_ids);
  const Tensor held_positions = as_contiguous(position_ids);
  const Id* ids = held_ids.const_data_ptr<Id>();
  const Position* positions = held_positions.const_data_ptr<Position>();
  const int64_t num_tokens = bounds.back();
  const int64_t num_sequences = static_cast<int64_t>(bounds.size()) - 1;

  Tensor unfold_index = empty_at(cpu(), num_tokens, aoti_torch_dtype_int32());
  int32_t* rows = unfold_index.mutable_data_ptr<int32_t>();
  Trie<Id, Position> trie(ids, positions, std::min(num_sequences, num_tokens));
  for (int64_t s = 0; s < num_sequences; ++s) {
    trie.insert(s, bounds[s], bounds[s + 1], rows);
  }

  const int64_t num_rows = padded_rows(op, trie.num_rows(), pad_multiple_of);
  Tensor compact_ids = empty_at(cpu(), num_rows, dtype_code_of(input_ids));
  Tensor compact_positions = empty_at(cpu(), num_rows, dtype_code_of(position_ids));
  Tensor fold_index = empty_at(cpu(), num_rows, aoti_torch_dtype_int32());
  trie.write_rows(
      bounds.data(),
      num_rows,
      compact_ids.mutable_data_ptr<Id>(),
      compact_positions.mutable_data_ptr<Position>(),
      fold_index.mutable_data_ptr<int32_t>());
  return Folded{compact_ids, compact_positions, unfold_index, fold_index, std::move(bounds), trie.runs()};
}

Tensor positions_from_zero(const std::vector<int64_t>& bounds) {
  Tensor positions = empty_at(cpu(), bounds.back(), aoti_torch_dtype_int64());
  int64_t* position = positions.mutable_data_ptr<int64_t>();
  for (size_t s = 0; s + 1 < bounds.size(); ++s) {
    fill_range(position + bounds[s], int64_t{0}, bounds[s + 1] - bounds[s]);
  }
  return positions;
}

Folded check_and_build(
    const char* op,
    const Tensor& input_ids,
    const Tensor& position_ids,
    const Tensor& cu_seqlens,
    int64_t pad_multiple_of,
    bool from_zero = false,
    bool front = false) {
  check_fold_arguments(op, input_ids, position_ids, cu_seqlens, pad_multiple_of, cpu());
  std::vector<int64_t> bounds = bounds_of(op, cu_seqlens, input_ids.size(0), front);
  const Tensor positions = from_zero ? positions_from_zero(bounds) : position_ids;
  const bool narrow_ids = is_int32(input_ids);
  const bool narrow_positions = is_int32(positions);
  auto* const build_for = narrow_ids ? (narrow_positions ? &build<int32_t, int32_t> : &build<int32_t, int64_t>)
                                     : (narrow_positions ? &build<int64_t, int32_t> : &build<int64_t, int64_t>);
  return build_for(op, input_ids, positions, std::move(bounds), pad_multiple_of);
}

Fold fold_cpu(const Tensor& input_ids, const Tensor& position_ids, const Tensor& cu_seqlens, int64_t pad_multiple_of) {
  Folded folded = check_and_build("fold", input_ids, position_ids, cu_seqlens, pad_multiple_of);
  return {folded.input_ids, folded.position_ids, folded.unfold_index, folded.fold_index};
}

Plan plan_of(const Folded& folded) {
  const int32_t int32 = aoti_torch_dtype_int32();
  const int64_t num_rows = folded.fold_index.size(0);
  const int64_t num_runs = static_cast<int64_t>(folded.runs.size());

  Tensor run_sequences = empty_at(cpu(), num_runs, int32);
  Tensor cu_seqlens_q = empty_at(cpu(), num_runs + 1, int32);
  Tensor cu_seqlens_k = empty_at(cpu(), num_runs + 1, int32);
  int32_t* sequences = run_sequences.mutable_data_ptr<int32_t>();
  int32_t* cu_q = cu_seqlens_q.mutable_data_ptr<int32_t>();
  int32_t* cu_k = cu_seqlens_k.mutable_data_ptr<int32_t>();
  cu_q[0] = cu_k[0] = 0;
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;
  for (int64_t r = 0; r < num_runs; ++r) {
    const Run& run = folded.runs[r];
    const int64_t length = folded.bounds[run.sequence + 1] - folded.bounds[run.sequence];
    sequences[r] = static_cast<int32_t>(run.sequence);
    cu_q[r + 1] = cu_q[r] + static_cast<int32_t>(run.length);
    cu_k[r + 1] = cu_k[r] + static_cast<int32_t>(length);
    max_seqlen_q = std::max(max_seqlen_q, run.length);
    max_seqlen_k = std::max(max_seqlen_k, length);
  }

  auto inverse_of = [&](const Tensor& index) {
    Tensor indptr = empty_at(cpu(), num_rows + 1, int32);
    Tensor members = empty_at(cpu(), index.size(0), int32);
    invert_index(
        index.const_data_ptr<int32_t>(),
        index.size(0),
        num_rows,
        indptr.mutable_data_ptr<int32_t>(),
        members.mutable_data_ptr<int32_t>());
    return std::make_pair(indptr, members);
  };
  auto copy_of = [&](const Tensor& tensor) {
    Tensor copy = empty_at(cpu(), tensor.size(0), int32);
    std::copy_n(tensor.const_data_ptr<int32_t>(), tensor.size(0), copy.mutable_data_ptr<int32_t>());
    return copy;
  };
  auto [unfold_indptr, unfold_members] = inverse_of(folded.unfold_index);
  Tensor kv_index = empty_at(cpu(), cu_k[num_runs], int32);
  const int32_t* unfold_index = folded.unfold_index.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < num_runs; ++r) {
    const int64_t begin = folded.bounds[sequences[r]];
    std::copy_n(unfold_index + begin, cu_k[r + 1] - cu_k[r], kv_index.mutable_data_ptr<int32_t>() + cu_k[r]);
  }
  // Where every sequence adds rows, the K/V rows are those of all tokens and the two inverses are one.
  const bool every_sequence_adds_rows = kv_index.size(0) == folded.unfold_index.size(0);
  auto [kv_indptr, kv_members] =
      every_sequence_adds_rows ? std::make_pair(copy_of(unfold_indptr), copy_of(unfold_members)) : inverse_of(kv_index);

  int64_t min_seqlen = folded.bounds.size() > 1 ? kMaxRows : 0;
  for (size_t s = 0; s + 1 < folded.bounds.size(); ++s) {
    min_seqlen = std::min(min_seqlen, folded.bounds[s + 1] - folded.bounds[s]);
  }
  Tensor counts = empty_at(cpu(), 4, aoti_torch_dtype_int64());
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  count[0] = cu_q[num_runs];
  count[1] = max_seqlen_q;
  count[2] = max_seqlen_k;
  count[3] = min_seqlen;
  return {
      folded.input_ids,
      folded.position_ids,
      folded.unfold_index,
      folded.fold_index,
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

Plan fold_plan_cpu(
    const Tensor& input_ids, const Tensor& position_ids, const Tensor& cu_seqlens, int64_t pad_multiple_of) {
  return plan_of(check_and_build("fold_plan", input_ids, position_ids, cu_seqlens, pad_multiple_of));
}

BatchTables fold_batch_cpu(
    const Tensor& input_ids,
    const Tensor& position_ids,
    const Tensor& cu_seqlens,
    int64_t pad_multiple_of,
    bool from_zero,
    bool front) {
  const Folded folded =
      check_and_build("fold_batch", input_ids, position_ids, cu_seqlens, pad_multiple_of, from_zero, front);
  Tensor ends = empty_at(cpu(), static_cast<int64_t>(folded.bounds.size()), aoti_torch_dtype_int32());
  std::copy(folded.bounds.begin(), folded.bounds.end(), ends.mutable_data_ptr<int32_t>());
  return std::tuple_cat(plan_of(folded), std::tuple(ends));
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("fold", TORCH_BOX(&radix::fold_cpu));
  m.impl("fold_plan", TORCH_BOX(&radix::fold_plan_cpu));
  m.impl("fold_batch", TORCH_BOX(&radix::fold_batch_cpu));
}
