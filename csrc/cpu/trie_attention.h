// The kernel of radix::trie_attention on the CPU: each row attends to the rows above it, no key or value unfolded.
//
// A block is rows side by side in depth-first order. What any of them sees stands in the block itself or on the path to
// its first row, and nearly all of that path is seen by all of them: so a block reads its keys once, however many
// sequences its rows belong to. The softmax is that of flash attention: scores of a tile of keys at a time, and what is
// summed so far fades where a larger score comes. All heads of q that share a head of k are lanes beside each other.
#pragma once

#include "../integers.h"
#include "lanes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>

namespace radix {

// Lanes of a block and keys of a tile: a block's numbers stay in the second-level cache, and few of the keys are read
// for some of its rows alone.
constexpr int64_t kLanes = 96;
constexpr int64_t kTileKeys = 64;
// What the keys of a tile and the numbers of a value are filled up to a multiple of.
constexpr int64_t kMultiple = 8;
// Vectors that are worked on at once.
constexpr int kVectors = 3;
constexpr int64_t kAlignment = 64;
// Multiplications from which on all threads take part.
constexpr double kWorkOfOneThread = 1 << 18;

inline int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// [rows, heads, size] with numbers of a head side by side.
struct Heads {
  Tensor held;
  const char* data;
  int64_t row_stride, head_stride;  // in bytes
  int64_t heads, size;

  const char* at(int64_t row, int64_t head) const {
    return data + row * row_stride + head * head_stride;
  }
};

inline Heads heads_of(const Tensor& tensor) {
  const Tensor held = tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
  const int64_t bytes = static_cast<int64_t>(held.element_size());
  return Heads{
      held,
      static_cast<const char*>(held.const_data_ptr()),
      held.stride(0) * bytes,
      held.stride(1) * bytes,
      held.size(1),
      held.size(2)};
}

struct Problem {
  Heads q, k, v;
  Integers leave, depth, row_of, path, kv_index;
  int64_t num_nodes, group, block_rows, num_lanes;
  int64_t value_size;  // filled up
  double factor;
  int64_t window;   // as large as any depth where there is none
  char* out;        // [rows, heads, value size], contiguous
  char* logsumexp;  // [heads, rows]
  int64_t num_rows;

  int64_t num_blocks() const {
    return (num_nodes + block_rows - 1) / block_rows;
  }
};

// What one thread works with, of one block of rows and one head of k.
template <typename T>
struct Workspace {
  using Int = typename Lanes<T, kAlignment>::Int;

  std::unique_ptr<char[]> memory;
  T *queries, *keys, *values, *scores, *outs, *largest, *total, *fade;
  Int *number, *depth;  // of each lane; -1 for lanes that are none
  // A key is seen by the lanes with these numbers, of depths below its own plus the window.
  Int low[kTileKeys], high[kTileKeys], limit[kTileKeys];

  explicit Workspace(const Problem& p) {
    const int64_t n = p.num_lanes;
    const int64_t counts[] = {
        p.q.size * n, kTileKeys * p.q.size, kTileKeys * p.value_size, kTileKeys * n, p.value_size * n, n, n, n, n, n};
    T** const tensors[] = {&queries, &keys, &values, &scores, &outs, &largest, &total, &fade};
    int64_t sum = kAlignment;
    for (const int64_t count : counts) {
      sum += rounded_up(count * sizeof(T), kAlignment);
    }
    memory.reset(new char[sum]);
    char* next = reinterpret_cast<char*>(rounded_up(reinterpret_cast<int64_t>(memory.get()), kAlignment));
    for (int i = 0; i < 8; ++i) {
      *tensors[i] = reinterpret_cast<T*>(next);
      next += rounded_up(counts[i] * sizeof(T), kAlignment);
    }
    number = reinterpret_cast<Int*>(next);
    depth = number + n;
  }
};

// `count` numbers of type Stored as numbers of type T.
template <typename Stored, typename T>
void load(const char* from, int64_t count, T* to) {
  if constexpr (std::is_same_v<Stored, T>) {
    std::memcpy(to, from, count * sizeof(T));
  } else {
    const Stored* data = reinterpret_cast<const Stored*>(from);
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<T>(data[i]);
    }
  }
}

// Lanes whose numbers are moved together, side by side, between tensors and a workspace.
constexpr int64_t kMoved = 8;

// Calls move(lanes from here on, how many, the row and the head of q of each) for all lanes of a block.
template <typename Move>
RADIX_INLINE void for_lanes(const Problem& p, int64_t first, int64_t count, int64_t kv_head, const Move& move) {
  int64_t rows[kMoved], heads[kMoved];
  for (int64_t lane = 0; lane < count * p.group; lane += kMoved) {
    const int64_t together = std::min(kMoved, count * p.group - lane);
    for (int64_t j = 0; j < together; ++j) {
      rows[j] = p.row_of[first + (lane + j) / p.group];
      heads[j] = kv_head * p.group + (lane + j) % p.group;
    }
    move(lane, together, rows, heads);
  }
}

template <typename Stored, typename T>
void load_queries(const Problem& p, int64_t first, int64_t count, int64_t kv_head, Workspace<T>& w) {
  using Int = typename Workspace<T>::Int;
  if (count * p.group < p.num_lanes) {
    std::fill_n(w.queries, p.q.size * p.num_lanes, T(0));
    std::fill_n(w.number, p.num_lanes, -1);
    std::fill_n(w.depth, p.num_lanes, 0);
  }
  for_lanes(p, first, count, kv_head, [&](int64_t lane, int64_t together, const int64_t* rows, const int64_t* heads) {
    const Stored* from[kMoved];
    for (int64_t j = 0; j < together; ++j) {
      from[j] = reinterpret_cast<const Stored*>(p.q.at(rows[j], heads[j]));
      w.number[lane + j] = static_cast<Int>(first + (lane + j) / p.group);
      w.depth[lane + j] = static_cast<Int>(p.depth[rows[j]]);
    }
    T* __restrict to = w.queries + lane;
    if (together == kMoved) {
      for (int64_t d = 0; d < p.q.size; ++d) {
        for (int64_t j = 0; j < kMoved; ++j) {
          to[d * p.num_lanes + j] = static_cast<T>(from[j][d]);
        }
      }
    } else {
      for (int64_t j = 0; j < together; ++j) {
        for (int64_t d = 0; d < p.q.size; ++d) {
          to[d * p.num_lanes + j] = static_cast<T>(from[j][d]);
        }
      }
    }
  });
}

// Key `i` of the tile, a row.
template <typename Stored, typename T>
void load_key(const Problem& p, int64_t row, int64_t kv_head, int64_t i, Workspace<T>& w) {
  load<Stored>(p.k.at(row, kv_head), p.k.size, w.keys + i * p.k.size);
  if (p.v.size > 0) {
    load<Stored>(p.v.at(row, kv_head), p.v.size, w.values + i * p.value_size);
  }
  std::fill(w.values + i * p.value_size + p.v.size, w.values + (i + 1) * p.value_size, T(0));
}

template <typename T, int kBytes>
RADIX_INLINE void hide(Workspace<T>& w, int64_t num_keys, int64_t num_lanes) {
  using L = Lanes<T, kBytes>;
  const typename L::Vector hidden = typename L::Vector{} - std::numeric_limits<T>::infinity();
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int64_t lane = 0; lane < num_lanes; lane += L::kCount) {
      const typename L::IntVector number = L::at(w.number + lane), depth = L::at(w.depth + lane);
      typename L::Vector& scores = L::at(w.scores + key * num_lanes + lane);
      const auto sees = (number >= w.low[key]) & (number < w.high[key]) & (depth < w.limit[key]);
      scores = sees ? scores : hidden;
    }
  }
}

// As add_values, of all lanes and numbers, but that a hidden key adds nothing and not 0 times its value.
template <typename T>
void add_seen_values(const Problem& p, Workspace<T>& w, int64_t num_keys) {
  for (int64_t lane = 0; lane < p.num_lanes; ++lane) {
    for (int64_t d = 0; d < p.value_size; ++d) {
      T sum = w.outs[d * p.num_lanes + lane] * w.fade[lane];
      for (int64_t key = 0; key < num_keys; ++key) {
        const bool below = w.number[lane] >= w.low[key] && w.number[lane] < w.high[key];
        if (below && w.depth[lane] < w.limit[key]) {
          sum += w.values[key * p.value_size + d] * w.scores[key * p.num_lanes + lane];
        }
      }
      w.outs[d * p.num_lanes + lane] = sum;
    }
  }
}

// Adds a tile of keys to what the lanes have summed. `some_hidden` says that not all lanes see all keys.
template <typename T, int kBytes, int kTogether>
RADIX_INLINE void add_tile(const Problem& p, Workspace<T>& w, int64_t num_keys, bool some_hidden) {
  using L = Lanes<T, kBytes>;
  static_assert(kMultiple % kTogether == 0 && kAlignment % kBytes == 0);
  const int64_t n = p.num_lanes;
  int64_t lane = 0;
  for (; lane + kVectors * L::kCount <= n; lane += kVectors * L::kCount) {
    for (int64_t key = 0; key < num_keys; key += kTogether) {
      score_lanes<T, kBytes, kTogether, kVectors>(
          w.keys + key * p.k.size, w.queries + lane, p.k.size, n, T(p.factor), w.scores + key * n + lane);
    }
  }
  for (; lane < n; lane += L::kCount) {
    for (int64_t key = 0; key < num_keys; key += kTogether) {
      score_lanes<T, kBytes, kTogether, 1>(
          w.keys + key * p.k.size, w.queries + lane, p.k.size, n, T(p.factor), w.scores + key * n + lane);
    }
  }
  if (some_hidden) {
    hide<T, kBytes>(w, num_keys, n);
  }
  for (lane = 0; lane < n; lane += L::kCount) {
    add_scores<T, kBytes>(w.scores + lane, num_keys, n, w.largest + lane, w.total + lane, w.fade + lane);
  }
  if (some_hidden && !all_finite<T, kBytes>(w.values, num_keys * p.value_size)) [[unlikely]] {
    return add_seen_values(p, w, num_keys);
  }
  for (lane = 0; lane + kVectors * L::kCount <= n; lane += kVectors * L::kCount) {
    for (int64_t d = 0; d < p.value_size; d += kTogether) {
      add_values<T, kBytes, kTogether, kVectors>(
          w.values + d, w.scores + lane, w.fade + lane, num_keys, p.value_size, n, w.outs + d * n + lane);
    }
  }
  for (; lane < n; lane += L::kCount) {
    for (int64_t d = 0; d < p.value_size; d += kTogether) {
      add_values<T, kBytes, kTogether, 1>(
          w.values + d, w.scores + lane, w.fade + lane, num_keys, p.value_size, n, w.outs + d * n + lane);
    }
  }
}

template <typename Stored, typename T>
void store_lanes(const Problem& p, int64_t first, int64_t count, int64_t kv_head, const Workspace<T>& w) {
  for_lanes(p, first, count, kv_head, [&](int64_t lane, int64_t together, const int64_t* rows, const int64_t* heads) {
    Stored* to[kMoved];
    for (int64_t j = 0; j < together; ++j) {
      to[j] = reinterpret_cast<Stored*>(p.out) + (rows[j] * p.q.heads + heads[j]) * p.v.size;
      reinterpret_cast<T*>(p.logsumexp)[heads[j] * p.num_rows + rows[j]] =
          w.largest[lane + j] + std::log(w.total[lane + j]);
    }
    for (int64_t j = 0; j < together; ++j) {
      for (int64_t d = 0; d < p.v.size; ++d) {
        to[j][d] = static_cast<Stored>(w.outs[d * p.num_lanes + lane + j]);
      }
    }
  });
}

template <typename Stored, typename T, int kBytes>
RADIX_INLINE void store(const Problem& p, int64_t first, int64_t count, int64_t kv_head, Workspace<T>& w) {
  using L = Lanes<T, kBytes>;
  for (int64_t d = 0; d < p.v.size; ++d) {
    for (int64_t lane = 0; lane < p.num_lanes; lane += L::kCount) {
      L::at(w.outs + d * p.num_lanes + lane) /= L::at(w.total + lane);
    }
  }
  store_lanes<Stored>(p, first, count, kv_head, w);
}

template <typename Stored, typename T, int kBytes, int kTogether>
RADIX_INLINE void attend_block(const Problem& p, int64_t block, int64_t kv_head, Workspace<T>& w) {
  using Int = typename Workspace<T>::Int;
  const int64_t first = block * p.block_rows, end = std::min(first + p.block_rows, p.num_nodes);
  load_queries<Stored>(p, first, end - first, kv_head, w);
  std::fill_n(w.outs, p.value_size * p.num_lanes, T(0));
  std::fill_n(w.total, p.num_lanes, T(0));
  std::fill_n(w.largest, p.num_lanes, -std::numeric_limits<T>::infinity());
  const auto [least, most] = std::minmax_element(w.depth, w.depth + (end - first) * p.group);
  const int64_t first_row = p.row_of[first], above = p.depth[first_row];
  // What stands above the window of every row is left out.
  const int64_t skipped = std::min(above, std::max<int64_t>(0, *least - p.window + 1));
  const int64_t num_keys = above - skipped + end - first;
  for (int64_t begin = 0; begin < num_keys; begin += kTileKeys) {
    const int64_t count = std::min(kTileKeys, num_keys - begin), filled = rounded_up(count, kMultiple);
    bool some_hidden = filled > count;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t on_path = skipped + begin + i, number = first + on_path - above;
      const bool is_above = on_path < above;
      const int64_t row = is_above ? p.kv_index[p.path[first_row] + on_path] : p.row_of[number];
      load_key<Stored>(p, row, kv_head, i, w);
      w.low[i] = static_cast<Int>(is_above ? 0 : number);
      w.high[i] = static_cast<Int>(p.leave[row]);
      w.limit[i] = static_cast<Int>(std::min<int64_t>(p.depth[row] + p.window, kMaxRows));
      some_hidden = some_hidden || w.low[i] > first || w.high[i] < end || w.limit[i] <= *most;
    }
    for (int64_t i = count; i < filled; ++i) {
      std::fill_n(w.keys + i * p.k.size, p.k.size, T(0));
      std::fill_n(w.values + i * p.value_size, p.value_size, T(0));
      w.low[i] = w.high[i] = w.limit[i] = 0;
    }
    add_tile<T, kBytes, kTogether>(p, w, filled, some_hidden);
  }
  store<Stored, T, kBytes>(p, first, end - first, kv_head, w);
}

// Takes one block after another until none is left. Blocks differ in work, so threads share a counter.
template <typename Stored, typename T, int kBytes, int kTogether>
RADIX_INLINE void attend_blocks(const Problem& p, std::atomic<int64_t>& next) {
  Workspace<T> workspace(p);
  const int64_t count = p.num_blocks() * p.k.heads;
  for (int64_t i = next++; i < count; i = next++) {
    attend_block<Stored, T, kBytes, kTogether>(p, i / p.k.heads, i % p.k.heads, workspace);
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
// Bytes of the vectors that the processor has, or that ATEN_CPU_CAPABILITY holds it to, as it does torch.
inline int vector_bytes() {
  static const int bytes = [] {
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string most = wanted == nullptr ? "avx512" : wanted;
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && most != "default";
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && most != "avx2";
    return has_avx512 ? 64 : has_avx2 ? 32 : 16;
  }();
  return bytes;
}

template <typename Stored, typename T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void attend_avx512(
    const Problem& p, std::atomic<int64_t>& next) {
  attend_blocks<Stored, T, 64, 8>(p, next);
}

template <typename Stored, typename T>
__attribute__((target("avx2,fma"))) void attend_avx2(const Problem& p, std::atomic<int64_t>& next) {
  attend_blocks<Stored, T, 32, 4>(p, next);
}

template <typename Stored, typename T>
void attend(const Problem& p, std::atomic<int64_t>& next) {
  switch (vector_bytes()) {
    case 64:
      return attend_avx512<Stored, T>(p, next);
    case 32:
      return attend_avx2<Stored, T>(p, next);
    default:
      return attend_blocks<Stored, T, 16, 4>(p, next);
  }
}
#else
// 32 registers of 16 bytes, as Arm has them.
template <typename Stored, typename T>
void attend(const Problem& p, std::atomic<int64_t>& next) {
  attend_blocks<Stored, T, 16, 8>(p, next);
}
#endif

template <typename Stored, typename T>
void attend_all(const Problem& p) {
  std::atomic<int64_t> next = 0;
  int64_t num_keys = 0;
  for (int64_t block = 0; block < p.num_blocks(); ++block) {
    num_keys += p.depth[p.row_of[block * p.block_rows]] + p.block_rows;
  }
  const double work = double(num_keys) * p.num_lanes * (p.k.size + p.value_size) * p.k.heads;
  if (work <= kWorkOfOneThread) {
    attend<Stored, T>(p, next);
  } else {
    torch::stable::parallel_for(
        0, p.num_blocks() * p.k.heads, 1, [&](int64_t, int64_t) { attend<Stored, T>(p, next); });
  }
}

}  // namespace radix
