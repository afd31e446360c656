// radix::trie_order on the CPU.
#include "../trie_order.h"

namespace radix {
namespace {

Order trie_order_cpu(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const Tensor& kv_index, int64_t num_rows) {
  std::vector<Tensor> held;
  auto [order, outputs] = begin_trie_order(cu_seqlens_q, cu_seqlens_k, kv_index, num_rows, cpu(), held);
  const int64_t num_runs = order.num_runs;
  const auto check_run = [](int64_t run, bool fits) {
    RADIX_CHECK(
        fits,
        "trie_order",
        "cu_seqlens_q, cu_seqlens_k and kv_index must be a fold's, and num_rows at least its rows; run ",
        run,
        " does not fit");
  };
  const std::vector<int64_t> starts = values_of(cu_seqlens_q), firsts = values_of(cu_seqlens_k);
  order.starts = Integers{starts.data(), /*wide=*/true};
  order.firsts = Integers{firsts.data(), /*wide=*/true};
  for (int64_t run = 0; run < num_runs; ++run) {
    check_run(run, order.has_sound_ends(run));
  }
  std::vector<int32_t> parent(num_runs), above(num_runs), size(num_runs, 0), number(num_runs), hop(num_runs);
  std::vector<int32_t> branches(num_rows + 2, 0), by_parent(num_runs), rank(num_runs);
  std::vector<uint32_t> sums(num_runs + 1, 0);
  order.parent = parent.data();
  order.above = above.data();
  order.size = size.data();
  order.number = number.data();
  order.hop = hop.data();
  order.branches = branches.data();
  order.by_parent = by_parent.data();
  order.rank = rank.data();
  order.sums = sums.data();

  for (int64_t run = 0; run < num_runs; ++run) {
    check_run(run, order.find_parent(run));
    ++branches[parent[run] + 2];
  }
  for (int64_t row = 1; row < num_rows + 2; ++row) {
    branches[row] += branches[row - 1];
  }
  // Runs come after the runs that they branch off from.
  for (int64_t run = num_runs - 1; run >= 0; --run) {
    size[run] += static_cast<int32_t>(order.length(run));
    if (above[run] >= 0) {
      size[above[run]] += size[run];
    }
  }
  std::vector<int32_t> next(branches.begin(), branches.end());
  for (int64_t run = 0; run < num_runs; ++run) {
    rank[run] = next[parent[run] + 1]++;
    by_parent[rank[run]] = static_cast<int32_t>(run);
  }
  for (int64_t i = 0; i < num_runs; ++i) {
    sums[i + 1] = sums[i] + size[by_parent[i]];
  }
  for (int64_t run = 0; run < num_runs; ++run) {
    order.find_hop(run);
    number[run] = hop[run] + (above[run] < 0 ? 0 : number[above[run]]);
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    order.find_row(row);
  }
  return outputs;
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("trie_order", TORCH_BOX(&radix::trie_order_cpu));
}
