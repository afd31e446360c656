// radix::trie_attention on the CPU: each row attends to the rows above it, no key or value unfolded.
#include "parallel.h"
#include "trie_forward.h"

#include <atomic>
#include <cmath>
#include <tuple>

namespace radix {
namespace {

struct Forward : Problem {
  char* out;        // [rows, heads, value size], contiguous
  char* logsumexp;  // [heads, rows]
};

template <typename Stored, typename T>
void store(const Forward& p, int64_t kv_head, const ForwardWorkspace<T>& w) {
  for_lanes(p, w.tile.block, kv_head, [&](int64_t lane, int64_t row, int64_t head) {
    Stored* const to = reinterpret_cast<Stored*>(p.out) + (row * p.q.heads + head) * p.v.size;
    for (int64_t d = 0; d < p.v.size; ++d) {
      to[d] = static_cast<Stored>(w.outs[d * p.num_lanes + lane]);
    }
    reinterpret_cast<T*>(p.logsumexp)[head * p.num_rows + row] = w.largest[lane] + std::log(w.total[lane]);
  });
}

template <typename Stored, typename T>
struct ForwardKernel {
  template <int kBytes, int kTogether>
  static RADIX_INLINE void attend_block(const Forward& p, int64_t block, int64_t kv_head, ForwardWorkspace<T>& w) {
    w.tile.begin_block(p, block);
    load_lanes<Stored>(p, p.q, w.tile.block, kv_head, p.q.size, w.lanes);
    attend_lanes<Stored, T, kBytes, kTogether>(p, kv_head, w);
    store<Stored>(p, kv_head, w);
  }

  template <int kBytes, int kTogether>
  static RADIX_INLINE void run(const Forward& p, std::atomic<int64_t>& next) {
    ForwardWorkspace<T> workspace(p);
    const int64_t count = p.num_blocks() * p.k.heads;
    for (int64_t i = next++; i < count; i = next++) {
      attend_block<kBytes, kTogether>(p, i / p.k.heads, i % p.k.heads, workspace);
    }
  }
};

std::tuple<Tensor, Tensor> trie_attention_cpu(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& enter,
    const Tensor& leave,
    const Tensor& depth,
    const Tensor& row_of,
    const Tensor& path,
    const Tensor& kv_index,
    const Tensor& cu_seqlens_q,
    int64_t num_nodes,
    double scale,
    int64_t sliding_window) {
  const char* op = "trie_attention";
  const GivenTables tables{enter, leave, depth, row_of, path, kv_index, cu_seqlens_q, num_nodes};
  Forward p{checked_problem(op, q, k, v, tables, scale, sliding_window, 1, kMultiple)};
  const int64_t num_rows = p.num_rows, out_sizes[] = {num_rows, q.size(1), v.size(2)};
  const int64_t sum_sizes[] = {q.size(1), num_rows};
  Tensor out = empty_at(cpu(), out_sizes, 3, dtype_code_of(q));
  Tensor logsumexp = empty_at(cpu(), sum_sizes, 2, sum_dtype_of(q));
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.logsumexp = static_cast<char*>(logsumexp.mutable_data_ptr());
  zero_padding(out, num_nodes);
  const int64_t sum_bytes = static_cast<int64_t>(logsumexp.element_size());
  for (int64_t head = 0; head < q.size(1) && num_nodes < num_rows; ++head) {
    std::memset(p.logsumexp + (head * num_rows + num_nodes) * sum_bytes, 0, (num_rows - num_nodes) * sum_bytes);
  }
  const double work = double(num_keys_read(p)) * p.num_lanes * (p.key_size + p.value_size) * p.k.heads;
  with_number_types(op, q, [&](auto stored, auto wide) {
    std::atomic<int64_t> next = 0;
    run_in_threads(p.num_blocks() * p.k.heads, work, [&] {
      run_for_processor<ForwardKernel<decltype(stored), decltype(wide)>>(p, next);
    });
  });
  return {out, logsumexp};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("trie_attention", TORCH_BOX(&radix::trie_attention_cpu));
}
