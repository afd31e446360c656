// radix::trie_order: the rows of a trie in depth-first order, in which every subtree is an interval.
//
// A row is followed by the rest of its run, and then by the runs that branch off below it: runs that leave later come
// first, and runs that leave at one row keep their order. So a run's number follows from its parent run's number, that
// run's length, and the sizes of the subtrees that branch off before it. With the runs' subtrees in the order of their
// parents' rows, a sum over some of them is a difference of two prefix sums.
#pragma once

#include "integers.h"

#include <tuple>

namespace radix {

struct TrieOrder {
  // The first two are copies, so that nobody changes them after the check.
  Integers starts;    // [num_runs + 1], the first row of each run
  Integers firsts;    // [num_runs + 1], where in kv_index the path to each run begins
  Integers kv_index;  // [num_tokens], the rows of each path
  int64_t num_runs;
  int64_t num_rows;
  int64_t num_tokens;
  int32_t* parent;           // [num_runs], the row that each run continues, or -1
  int32_t* above;            // [num_runs], that row's run, or -1
  int32_t* size;             // [num_runs], the rows of each run and of all below it
  int32_t* number;           // [num_runs], that of each run's first row
  int32_t* hop;              // [num_runs], how much larger it is than that of the run above
  const int32_t* branches;   // [num_rows + 2], the runs of parent p are those ranked branches[p + 1] .. branches[p + 2]
  const int32_t* by_parent;  // [num_runs], the run of each rank
  const int32_t* parents;    // [num_runs], the parent of the run of each rank; in place of branches where runs are few
  int32_t* rank;             // [num_runs]
  uint32_t* sums;            // [num_runs + 1], the sizes of the subtrees of all ranks before each, modulo 2^32
  int32_t* enter;            // [num_rows] each, the outputs
  int32_t* leave;
  int32_t* depth;
  int32_t* row_of;
  int32_t* path;

  RADIX_BOTH int64_t length(int64_t run) const {
    return starts[run + 1] - starts[run];
  }

  RADIX_BOTH int64_t prefix(int64_t run) const {
    return firsts[run + 1] - firsts[run] - length(run);
  }

  // The run that holds a row; num_runs for padding rows.
  RADIX_BOTH int64_t run_of(int64_t row) const {
    int64_t low = 0;
    int64_t high = num_runs;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (starts[middle + 1] <= row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Tells whether the ends of a run, whatever numbers they are, lie in order and within rows and tokens.
  RADIX_BOTH bool has_sound_ends(int64_t run) const {
    const int64_t start = starts[run];
    const int64_t end = starts[run + 1];
    const int64_t first = firsts[run];
    const int64_t last = firsts[run + 1];
    if (run == 0 && (start != 0 || first != 0)) {
      return false;
    }
    return 0 <= start && start <= end && end <= num_rows && 0 <= first && first <= last && last <= num_tokens &&
           last - first >= end - start;
  }

  // Finds the row that a run with sound ends continues. Returns false where that row does not come before the run, or
  // has another depth than the run's path says: so no chain of runs is longer than a path.
  RADIX_BOTH bool find_parent(int64_t run) const {
    const int64_t rows_above = prefix(run);
    const int64_t row = rows_above > 0 ? kv_index[firsts[run] + rows_above - 1] : -1;
    parent[run] = static_cast<int32_t>(row);
    above[run] = -1;
    if (rows_above == 0) {
      return true;
    }
    if (row < 0 || row >= starts[run]) {
      return false;
    }
    // On CUDA this thread knows nothing of the ends of other runs.
    const int64_t continued = run_of(row);
    if (continued >= run) {
      return false;
    }
    above[run] = static_cast<int32_t>(continued);
    return rows_above == prefix(continued) + row - starts[continued] + 1;
  }

  // The first rank of the runs whose parent is `row`, or would be.
  RADIX_BOTH int64_t first_rank(int64_t row) const {
    if (parents == nullptr) {
      return branches[row + 1];
    }
    int64_t low = 0;
    int64_t high = num_runs;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (parents[middle] < row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // The rows of the runs that leave `run` at `row` or deeper, and of all below them.
  RADIX_BOTH int64_t size_of_branches(int64_t run, int64_t row) const {
    return sums[first_rank(starts[run + 1])] - sums[first_rank(row)];
  }

  RADIX_BOTH void find_hop(int64_t run) const {
    int64_t before = sums[rank[run]] - sums[first_rank(parent[run])];
    if (above[run] >= 0) {
      before += length(above[run]) + size_of_branches(above[run], parent[run] + 1);
    }
    hop[run] = static_cast<int32_t>(before);
  }

  RADIX_BOTH void find_row(int64_t row) const {
    const int64_t run = run_of(row);
    if (run == num_runs) {
      enter[row] = -1;
      leave[row] = -1;
      depth[row] = 0;
      row_of[row] = static_cast<int32_t>(row);
      path[row] = 0;
      return;
    }
    const int64_t offset = row - starts[run];
    const int64_t entered = number[run] + offset;
    enter[row] = static_cast<int32_t>(entered);
    leave[row] = static_cast<int32_t>(entered + length(run) - offset + size_of_branches(run, row));
    depth[row] = static_cast<int32_t>(prefix(run) + offset);
    row_of[entered] = static_cast<int32_t>(row);
    path[row] = static_cast<int32_t>(firsts[run]);
  }
};

using Order = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns the outputs and an order that writes to them and reads the inputs, whose values are neither checked nor
// copied yet. `held` keeps contiguous inputs alive.
inline std::tuple<TrieOrder, Order> begin_trie_order(
    const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k,
    const Tensor& kv_index,
    int64_t num_rows,
    const Place& place,
    std::vector<Tensor>& held) {
  const char* op = "trie_order";
  check_index_like(op, "cu_seqlens_q", cu_seqlens_q, place);
  check_index_like(op, "cu_seqlens_k", cu_seqlens_k, place);
  check_index_like(op, "kv_index", kv_index, place);
  RADIX_CHECK(
      cu_seqlens_q.size(0) == cu_seqlens_k.size(0) && cu_seqlens_q.size(0) >= 1,
      op,
      "cu_seqlens_q and cu_seqlens_k must be equally long and hold at least a 0, got ",
      cu_seqlens_q.size(0),
      " and ",
      cu_seqlens_k.size(0),
      " entries");
  RADIX_CHECK(
      num_rows >= 0 && num_rows < kMaxRows, op, "num_rows must be from 0 to ", kMaxRows - 1, ", got ", num_rows);
  RADIX_CHECK(
      kv_index.size(0) <= kMaxRows,
      op,
      "kv_index holds ",
      kv_index.size(0),
      " entries; at most ",
      kMaxRows,
      " are allowed");
  held = {as_contiguous(cu_seqlens_q), as_contiguous(cu_seqlens_k), as_contiguous(kv_index)};
  const int32_t int32 = aoti_torch_dtype_int32();
  Order outputs{
      empty_at(place, num_rows, int32),
      empty_at(place, num_rows, int32),
      empty_at(place, num_rows, int32),
      empty_at(place, num_rows, int32),
      empty_at(place, num_rows, int32)};
  TrieOrder order{};
  order.starts = integers_of(held[0]);
  order.firsts = integers_of(held[1]);
  order.kv_index = integers_of(held[2]);
  order.num_runs = cu_seqlens_q.size(0) - 1;
  order.num_rows = num_rows;
  order.num_tokens = kv_index.size(0);
  auto data = [](Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
  order.enter = data(std::get<0>(outputs));
  order.leave = data(std::get<1>(outputs));
  order.depth = data(std::get<2>(outputs));
  order.row_of = data(std::get<3>(outputs));
  order.path = data(std::get<4>(outputs));
  return {order, std::move(outputs)};
}

}  // namespace radix
