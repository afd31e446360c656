// How a thread attends for a block's lanes, in the forwards of trie attention on the CPU.
//
// The softmax is that of flash attention: it takes the scores of a tile of keys at a time, and what is summed so far
// fades where a larger score comes.
#pragma once

#include "trie_attention.h"

#include <limits>

namespace radix {

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

// Attends for the lanes of the tile's block, whose queries are loaded: `outs` becomes [value size, lanes].
template <typename Stored, typename T, int kBytes, int kTogether>
RADIX_INLINE void attend_lanes(const Problem& p, int64_t kv_head, ForwardWorkspace<T>& w) {
  using L = Lanes<T, kBytes>;
  transpose_lanes(w.lanes, p.num_lanes, p.q.size, p.q.size, w.queries);
  std::fill_n(w.outs, p.value_size * p.num_lanes, T(0));
  std::fill_n(w.total, p.num_lanes, T(0));
  std::fill_n(w.largest, p.num_lanes, -std::numeric_limits<T>::infinity());
  for (int64_t begin = 0; begin < w.tile.num_keys(); begin += kTileKeys) {
    load_tile<Stored>(p, kv_head, begin, w.tile);
    add_tile<T, kBytes, kTogether>(p, w);
  }
  for (int64_t d = 0; d < p.v.size; ++d) {
    for (int64_t lane = 0; lane < p.num_lanes; lane += L::kCount) {
      L::at(w.outs + d * p.num_lanes + lane) /= L::at(w.total + lane);
    }
  }
}

}  // namespace radix
