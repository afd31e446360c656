// radix::trie_attention_backward on the CPU: the gradients of q, k and v, with the probabilities computed again.
//
// A block of rows reads the keys it sees as in the forward, and has its gradient of q when it has read them all. But
// many blocks add to the gradients of one key and value. So blocks in a row make a chunk, which sums in memory of its
// own: for its own rows and for those on the path to the first of them. The last chunk of a head to finish adds up all,
// one after another. The cut into chunks does not depend on the number of threads, so neither do the sums.
#include "trie_attention.h"
#include "trie_chunks.h"

#include <atomic>
#include <memory>
#include <tuple>
#include <utility>

namespace radix {
namespace {

struct Backward : Problem {
  Heads out, grad_out;
  const char* logsumexp;
  int64_t logsumexp_strides[2];    // from head to head and from row to row
  char *grad_q, *grad_k, *grad_v;  // contiguous
  std::vector<Chunk> chunks;
  char* sums;                                    // [sums, heads, key size + value size]
  std::unique_ptr<std::atomic<int64_t>[]> done;  // chunks of each head of k

  int64_t sum_size() const {
    return key_size + value_size;
  }

  template <typename T>
  T* sum(int64_t index, int64_t kv_head) const {
    return reinterpret_cast<T*>(sums) + (index * k.heads + kv_head) * sum_size();
  }
};

template <typename T>
struct BackwardWorkspace {
  Arena arena;
  Tile<T> tile;
  T *queries, *grads, *outs;         // [lanes, size]
  T *queries_across, *grads_across;  // [size, lanes]
  T *weights, *grad_scores;          // [kTileKeys, lanes]
  T* grad_q;                         // [key size, lanes]
  T *grad_k, *grad_v;                // [kTileKeys, size]
  T *logsumexp, *mean;               // [lanes]
  bool all_finite;                   // queries and grads

  explicit BackwardWorkspace(const Problem& p) {
    tile.add_to(arena, p);
    arena.add(&queries, p.num_lanes * p.key_size);
    arena.add(&grads, p.num_lanes * p.value_size);
    arena.add(&outs, p.num_lanes * p.value_size);
    arena.add(&queries_across, p.key_size * p.num_lanes);
    arena.add(&grads_across, p.value_size * p.num_lanes);
    arena.add(&weights, kTileKeys * p.num_lanes);
    arena.add(&grad_scores, kTileKeys * p.num_lanes);
    arena.add(&grad_q, p.key_size * p.num_lanes);
    arena.add(&grad_k, kTileKeys * p.key_size);
    arena.add(&grad_v, kTileKeys * p.value_size);
    arena.add(&logsumexp, p.num_lanes);
    arena.add(&mean, p.num_lanes);
    arena.allocate();
  }
};

template <typename Stored, typename T, int kBytes>
RADIX_INLINE void begin_block(const Backward& p, int64_t block, int64_t kv_head, BackwardWorkspace<T>& w) {
  using L = Lanes<T, kBytes>;
  const int64_t n = p.num_lanes;
  w.tile.begin_block(p, block);
  load_lanes<Stored>(p, p.q, w.tile.block, kv_head, p.key_size, w.queries);
  load_lanes<Stored>(p, p.grad_out, w.tile.block, kv_head, p.value_size, w.grads);
  load_lanes<Stored>(p, p.out, w.tile.block, kv_head, p.value_size, w.outs);
  transpose_lanes(w.queries, n, p.key_size, p.q.size, w.queries_across);
  transpose_lanes(w.grads, n, p.value_size, p.v.size, w.grads_across);
  w.all_finite = all_finite<T, kBytes>(w.queries, n * p.key_size) && all_finite<T, kBytes>(w.grads, n * p.value_size);
  std::fill_n(w.grad_q, p.key_size * n, T(0));
  std::fill_n(w.logsumexp, n, T(0));
  for_lanes(p, w.tile.block, kv_head, [&](int64_t lane, int64_t row, int64_t head) {
    w.logsumexp[lane] =
        reinterpret_cast<const T*>(p.logsumexp)[head * p.logsumexp_strides[0] + row * p.logsumexp_strides[1]];
  });
  for (int64_t lane = 0; lane < n; ++lane) {
    typename L::Vector sums = {};
    for (int64_t d = lane * p.value_size; d < (lane + 1) * p.value_size; d += L::kCount) {
      sums += L::at(w.grads + d) * L::at(w.outs + d);
    }
    T mean = 0;
    for (int i = 0; i < L::kCount; ++i) {
      mean += sums[i];
    }
    w.mean[lane] = mean;
  }
}

// Weights hold scores and become probabilities; grad_scores hold the gradients of those and become those of the scores.
// Both are 0 where a lane does not see a key.
template <typename T, int kBytes>
RADIX_INLINE void weigh(const Problem& p, BackwardWorkspace<T>& w) {
  using L = Lanes<T, kBytes>;
  const int64_t n = p.num_lanes;
  for (int64_t key = 0; key < w.tile.filled; ++key) {
    for (int64_t lane = 0; lane < n; lane += L::kCount) {
      const typename L::IntVector number = L::at(w.tile.number + lane), depth = L::at(w.tile.depth + lane);
      const auto sees = (number >= w.tile.low[key]) & (number < w.tile.high[key]) & (depth < w.tile.limit[key]);
      typename L::Vector& weights = L::at(w.weights + key * n + lane);
      typename L::Vector& grads = L::at(w.grad_scores + key * n + lane);
      typename L::Vector weight = weights - L::at(w.logsumexp + lane);
      exp_of_negative<T, kBytes>(weight);
      const typename L::Vector grad = (grads - L::at(w.mean + lane)) * weight * T(p.factor);
      weights = sees ? weight : typename L::Vector{};
      grads = sees ? grad : typename L::Vector{};
    }
  }
}

// Adds the products of a tile. A key and a lane that does not see it give each other nothing, where a matrix product
// would give 0 times what they hold.
template <typename T>
void multiply_seen(const Problem& p, BackwardWorkspace<T>& w) {
  const int64_t n = p.num_lanes;
  std::fill_n(w.grad_k, w.tile.filled * p.key_size, T(0));
  std::fill_n(w.grad_v, w.tile.filled * p.value_size, T(0));
  for (int64_t key = 0; key < w.tile.count; ++key) {
    for (int64_t lane = 0; lane < n; ++lane) {
      if (w.tile.sees(lane, key)) {
        const T weight = w.weights[key * n + lane], grad_score = w.grad_scores[key * n + lane];
        for (int64_t d = 0; d < p.key_size; ++d) {
          w.grad_q[d * n + lane] += grad_score * w.tile.keys[key * p.key_size + d];
          w.grad_k[key * p.key_size + d] += grad_score * w.queries[lane * p.key_size + d];
        }
        for (int64_t d = 0; d < p.value_size; ++d) {
          w.grad_v[key * p.value_size + d] += weight * w.grads[lane * p.value_size + d];
        }
      }
    }
  }
}

// Adds a tile of keys to the gradient of q, and to the sums of the chunk.
template <typename T, int kBytes, int kTogether>
RADIX_INLINE void add_tile(const Backward& p, const Chunk& chunk, int64_t kv_head, BackwardWorkspace<T>& w) {
  using L = Lanes<T, kBytes>;
  static_assert(kMultiple % kTogether == 0 && kAlignment % kBytes == 0);
  const int64_t n = p.num_lanes, num_keys = w.tile.filled;
  const Strided<T> keys{w.tile.keys, p.key_size, 1}, values{w.tile.values, p.value_size, 1};
  const Strided<T> keys_across{w.tile.keys, 1, p.key_size};
  const Strided<T> weights{w.weights, n, 1}, grad_scores{w.grad_scores, n, 1};
  multiply<T, kBytes, kTogether, Onto::kNothing>(
      num_keys, n, keys, w.queries_across, n, p.q.size, T(p.factor), nullptr, w.weights, n);
  multiply<T, kBytes, kTogether, Onto::kNothing>(
      num_keys, n, values, w.grads_across, n, p.v.size, T(1), nullptr, w.grad_scores, n);
  weigh<T, kBytes>(p, w);
  const bool finite = w.all_finite && all_finite<T, kBytes>(w.tile.keys, num_keys * p.key_size);
  if (finite || !w.tile.some_hidden) [[likely]] {
    multiply<T, kBytes, kTogether, Onto::kItself>(
        p.key_size, n, keys_across, w.grad_scores, n, num_keys, T(1), nullptr, w.grad_q, n);
    multiply<T, kBytes, kTogether, Onto::kNothing>(
        num_keys, p.key_size, grad_scores, w.queries, p.key_size, n, T(1), nullptr, w.grad_k, p.key_size);
    multiply<T, kBytes, kTogether, Onto::kNothing>(
        num_keys, p.value_size, weights, w.grads, p.value_size, n, T(1), nullptr, w.grad_v, p.value_size);
  } else {
    multiply_seen(p, w);
  }
  for (int64_t key = 0; key < w.tile.count; ++key) {
    const int64_t number = w.tile.numbers[key];
    const int64_t index =
        number >= chunk.first ? chunk.num_above() + number - chunk.first : p.trie.depth[number] - chunk.skipped;
    T* const sums = p.sum<T>(chunk.offset + index, kv_head);
    for (int64_t d = 0; d < p.key_size; d += L::kCount) {
      L::at(sums + d) += L::at(w.grad_k + key * p.key_size + d);
    }
    for (int64_t d = 0; d < p.value_size; d += L::kCount) {
      L::at(sums + p.key_size + d) += L::at(w.grad_v + key * p.value_size + d);
    }
  }
}

// Adds the sums of chunks for the rows above them to those rows' own, one chunk after another, and stores the totals.
template <typename Stored, typename T>
void store_sums(const Backward& p, int64_t kv_head) {
  std::vector<int64_t> index(p.trie.num_nodes());  // of the sum of each number
  for (const Chunk& chunk : p.chunks) {
    for (int64_t number = chunk.first; number < chunk.end; ++number) {
      index[number] = chunk.offset + chunk.num_above() + number - chunk.first;
    }
  }
  for (const Chunk& chunk : p.chunks) {
    int64_t number = p.trie.parent[chunk.first];
    for (int64_t i = chunk.num_above() - 1; i >= 0; --i, number = p.trie.parent[number]) {
      const T* __restrict from = p.sum<T>(chunk.offset + i, kv_head);
      T* __restrict to = p.sum<T>(index[number], kv_head);
      for (int64_t d = 0; d < p.sum_size(); ++d) {
        to[d] += from[d];
      }
    }
  }
  for (int64_t number = 0; number < p.trie.num_nodes(); ++number) {
    const T* sums = p.sum<T>(index[number], kv_head);
    const int64_t place = p.trie.row_of[number] * p.k.heads + kv_head;
    std::transform(sums, sums + p.k.size, reinterpret_cast<Stored*>(p.grad_k) + place * p.k.size, [](T sum) {
      return static_cast<Stored>(sum);
    });
    sums += p.key_size;
    std::transform(sums, sums + p.v.size, reinterpret_cast<Stored*>(p.grad_v) + place * p.v.size, [](T sum) {
      return static_cast<Stored>(sum);
    });
  }
}

template <typename Stored, typename T>
struct BackwardKernel {
  template <int kBytes, int kTogether>
  static RADIX_INLINE void run(const Backward& p, std::atomic<int64_t>& next) {
    BackwardWorkspace<T> w(p);
    const int64_t num_chunks = static_cast<int64_t>(p.chunks.size());
    for (int64_t i = next++; i < num_chunks * p.k.heads; i = next++) {
      const Chunk& chunk = p.chunks[i / p.k.heads];
      const int64_t kv_head = i % p.k.heads;
      for (int64_t sum = 0; sum < chunk.num_sums(); ++sum) {
        std::fill_n(p.sum<T>(chunk.offset + sum, kv_head), p.sum_size(), T(0));
      }
      for (int64_t block = chunk.first_block; block < chunk.end_block; ++block) {
        begin_block<Stored, T, kBytes>(p, block, kv_head, w);
        for (int64_t begin = 0; begin < w.tile.block.num_keys(); begin += kTileKeys) {
          load_tile<Stored>(p, kv_head, begin, w.tile);
          add_tile<T, kBytes, kTogether>(p, chunk, kv_head, w);
        }
        for_lanes(p, w.tile.block, kv_head, [&](int64_t lane, int64_t row, int64_t head) {
          Stored* const to = reinterpret_cast<Stored*>(p.grad_q) + (row * p.q.heads + head) * p.q.size;
          for (int64_t d = 0; d < p.q.size; ++d) {
            to[d] = static_cast<Stored>(w.grad_q[d * p.num_lanes + lane]);
          }
        });
      }
      if (++p.done[kv_head] == num_chunks) {
        store_sums<Stored, T>(p, kv_head);
      }
    }
  }
};

// Raises unless out and logsumexp have the shapes and dtypes that the forward gives them, and grad_out those of out.
void check_results(
    const char* op,
    const Tensor& q,
    const Tensor& v,
    const Tensor& grad_out,
    const Tensor& out,
    const Tensor& logsumexp) {
  const std::pair<const char*, const Tensor*> named[] = {{"grad_out", &grad_out}, {"out", &out}};
  for (const auto& [name, x] : named) {
    check_place(op, name, *x, cpu());
    RADIX_CHECK(
        x->dim() == 3 && x->size(0) == q.size(0) && x->size(1) == q.size(1) && x->size(2) == v.size(2) &&
            x->scalar_type() == q.scalar_type(),
        op,
        name,
        " must have the shape [",
        q.size(0),
        ", ",
        q.size(1),
        ", ",
        v.size(2),
        "] and the dtype of the result, ",
        dtype_of(q),
        ", got ",
        shape_of(*x),
        " and ",
        dtype_of(*x));
  }
  const bool is_double = q.scalar_type() == ScalarType::Double;
  check_place(op, "logsumexp", logsumexp, cpu());
  RADIX_CHECK(
      logsumexp.dim() == 2 && logsumexp.size(0) == q.size(1) && logsumexp.size(1) == q.size(0) &&
          logsumexp.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
      op,
      "logsumexp must be [",
      q.size(1),
      ", ",
      q.size(0),
      "] in ",
      is_double ? "float64" : "float32",
      ", got ",
      shape_of(logsumexp),
      " and ",
      dtype_of(logsumexp));
}

Tensor like(const Tensor& tensor, int64_t num_nodes) {
  const int64_t sizes[] = {tensor.size(0), tensor.size(1), tensor.size(2)};
  Tensor grad = empty_at(cpu(), sizes, 3, dtype_code_of(tensor));
  zero_padding(grad, num_nodes);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> trie_attention_backward_cpu(
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& logsumexp,
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
  const char* op = "trie_attention_backward";
  const GivenTables tables{enter, leave, depth, row_of, path, kv_index, cu_seqlens_q, num_nodes};
  constexpr int64_t kFilled = kAlignment / sizeof(float);
  Backward p{checked_problem(op, q, k, v, tables, scale, sliding_window, kFilled, kFilled)};
  check_results(op, q, v, grad_out, out, logsumexp);
  p.out = heads_of(out);
  p.grad_out = heads_of(grad_out);
  p.logsumexp = static_cast<const char*>(logsumexp.const_data_ptr());
  p.logsumexp_strides[0] = logsumexp.stride(0);
  p.logsumexp_strides[1] = logsumexp.stride(1);
  Tensor grad_q = like(q, num_nodes), grad_k = like(k, num_nodes), grad_v = like(v, num_nodes);
  p.grad_q = static_cast<char*>(grad_q.mutable_data_ptr());
  p.grad_k = static_cast<char*>(grad_k.mutable_data_ptr());
  p.grad_v = static_cast<char*>(grad_v.mutable_data_ptr());
  if (num_nodes == 0) {
    return {grad_q, grad_k, grad_v};
  }

  const double work = double(num_keys_read(p)) * p.num_lanes * (3 * p.key_size + 2 * p.value_size) * p.k.heads;
  p.chunks = chunks_of(p, work);
  const int64_t sum_sizes[] = {p.chunks.back().offset + p.chunks.back().num_sums(), k.size(1), p.sum_size()};
  Tensor sums = empty_at(cpu(), sum_sizes, 3, sum_dtype_of(q));
  p.sums = static_cast<char*>(sums.mutable_data_ptr());
  p.done.reset(new std::atomic<int64_t>[p.k.heads]());
  with_number_types(op, q, [&](auto stored, auto wide) {
    std::atomic<int64_t> next = 0;
    run_in_threads(static_cast<int64_t>(p.chunks.size()) * p.k.heads, work, [&] {
      run_for_processor<BackwardKernel<decltype(stored), decltype(wide)>>(p, next);
    });
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("trie_attention_backward", TORCH_BOX(&radix::trie_attention_backward_cpu));
}
