// radix::trie_attention on the CPU: each row attends to the rows above it, no key or value unfolded.
//
// The softmax is that of flash attention: it takes the scores of a tile of keys at a time, and what is summed so far
// fades where a larger score comes.
#include "trie_attention.h"
#include "parallel.h"

#include <atomic>
#include <cmath>
#include <tuple>

namespace radix {
namespace {

struct Forward : Problem {
  char* out;        // [rows, heads, value size], contiguous
  char* logsumexp;  // [heads, rows]
};

template <typename T>
struct ForwardWorkspace {
  Arena arena;
  Tile<T> tile;
  T* lanes;                   // [lanes, q size]
  T* queries;                 // [q size, lanes]
  T* scores;                  // [kTileKeys, lanes]
  T* outs;                    // [value size, lanes]
  T *largest, *total, *fade;  // [lanes]

  explicit ForwardWorkspace(const Problem& p) {
    tile.add_to(arena, p);
    arena.add(&lanes, p.num_lanes * p.q.size);
    arena.add(&queries, p.num_lanes * p.q.size);
    arena.add(&scores, kTileKeys * p.num_lanes);
    arena.add(&outs, p.value_size * p.num_lanes);
    arena.add(&largest, p.num_lanes);
    arena.add(&total, p.num_lanes);
    arena.add(&fade, p.num_lanes);
    arena.allocate();
  }
};

template <typename T, int kBytes>
RADIX_INLINE void hide(const Tile<T>& tile, int64_t num_lanes, T* scores) {
  using L = Lanes<T, kBytes>;
  const typename L::Vector hidden = typename L::Vector{} - std::numeric_limits<T>::infinity();
  for (int64_t key = 0; key < tile.filled; ++key) {
    for (int64_t lane = 0; lane < num_lanes; lane += L::kCount) {
      const typename L::IntVector number = L::at(tile.number + lane), depth = L::at(tile.depth + lane);
      typename L::Vector& score = L::at(scores + key * num_lanes + lane);
      const auto sees = (number >= tile.low[key]) & (number < tile.high[key]) & (depth < tile.limit[key]);
      score = sees ? score : hidden;
    }
  }
}

// Adds the values to what the lanes have summed; a hidden key adds nothing, not 0 times its value.
template <typename T>
void add_seen_values(const Problem& p, ForwardWorkspace<T>& w) {
  for (int64_t lane = 0; lane < p.num_lanes; ++lane) {
    for (int64_t d = 0; d < p.value_size; ++d) {
      T sum = w.outs[d * p.num_lanes + lane] * w.fade[lane];
      for (int64_t key = 0; key < w.tile.count; ++key) {
        if (w.tile.sees(lane, key)) {
          sum += w.tile.values[key * p.value_size + d] * w.scores[key * p.num_lanes + lane];
        }
      }
      w.outs[d * p.num_lanes + lane] = sum;
    }
  }
}

// Adds a tile of keys to what the lanes have summed.
template <typename T, int kBytes, int kTogether>
RADIX_INLINE void add_tile(const Problem& p, ForwardWorkspace<T>& w) {
  using L = Lanes<T, kBytes>;
  static_assert(kMultiple % kTogether == 0 && kAlignment % kBytes == 0);
  const int64_t n = p.num_lanes, num_keys = w.tile.filled;
  const Strided<T> keys{w.tile.keys, p.key_size, 1}, values{w.tile.values, 1, p.value_size};
  multiply<T, kBytes, kTogether, Onto::kNothing>(
      num_keys, n, keys, w.queries, n, p.q.size, T(p.factor), nullptr, w.scores, n);
  if (w.tile.some_hidden) {
    hide<T, kBytes>(w.tile, n, w.scores);
  }
  for (int64_t lane = 0; lane < n; lane += L::kCount) {
    add_scores<T, kBytes>(w.scores + lane, num_keys, n, w.largest + lane, w.total + lane, w.fade + lane);
  }
  if (w.tile.some_hidden && !all_finite<T, kBytes>(w.tile.values, num_keys * p.value_size)) [[unlikely]] {
    return add_seen_values(p, w);
  }
  multiply<T, kBytes, kTogether, Onto::kFaded>(p.value_size, n, values, w.scores, n, num_keys, T(1), w.fade, w.outs, n);
}

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
    using L = Lanes<T, kBytes>;
    w.tile.begin_block(p, block);
    load_lanes<Stored>(p, p.q, w.tile.block, kv_head, p.q.size, w.lanes);
    transpose_lanes(w.lanes, p.num_lanes, p.q.size, p.q.size, w.queries);
    std::fill_n(w.outs, p.value_size * p.num_lanes, T(0));
    std::fill_n(w.total, p.num_lanes, T(0));
    std::fill_n(w.largest, p.num_lanes, -std::numeric_limits<T>::infinity());
    for (int64_t begin = 0; begin < w.tile.block.num_keys(); begin += kTileKeys) {
      load_tile<Stored>(p, kv_head, begin, w.tile);
      add_tile<T, kBytes, kTogether>(p, w);
    }
    for (int64_t d = 0; d < p.v.size; ++d) {
      for (int64_t lane = 0; lane < p.num_lanes; lane += L::kCount) {
        L::at(w.outs + d * p.num_lanes + lane) /= L::at(w.total + lane);
      }
    }
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
