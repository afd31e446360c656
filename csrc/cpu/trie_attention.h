// How a thread reads the keys of a block, in forward and backward of radix::trie_attention on the CPU.
#pragma once

#include "lanes.h"
#include "trie_problem.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

namespace radix {

// Zeroes the rows of a contiguous tensor behind the first num_nodes.
inline void zero_padding(Tensor& tensor, int64_t num_nodes) {
  const int64_t row_bytes = tensor.size(1) * tensor.size(2) * static_cast<int64_t>(tensor.element_size());
  if (row_bytes > 0 && num_nodes < tensor.size(0)) {
    std::memset(
        static_cast<char*>(tensor.mutable_data_ptr()) + num_nodes * row_bytes,
        0,
        (tensor.size(0) - num_nodes) * row_bytes);
  }
}

// Memory of a thread, cut into aligned arrays.
class Arena {
 public:
  template <typename T>
  void add(T** array, int64_t count) {
    places_.push_back({reinterpret_cast<void**>(array), bytes_});
    bytes_ += rounded_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
  }

  void allocate() {
    memory_.reset(new char[bytes_ + kAlignment]);
    char* const begin = reinterpret_cast<char*>(rounded_up(reinterpret_cast<int64_t>(memory_.get()), kAlignment));
    for (const auto& [array, offset] : places_) {
      *array = begin + offset;
    }
  }

 private:
  struct Place {
    void** array;
    int64_t offset;
  };

  std::vector<Place> places_;
  std::unique_ptr<char[]> memory_;
  int64_t bytes_ = 0;
};

// The keys of a block that a thread holds at a time, and who sees them.
template <typename T>
struct Tile {
  using Int = typename Lanes<T, kAlignment>::Int;

  Block block;
  std::vector<int32_t> key_numbers;  // of all keys of the block, ascending, those left out at first too
  T *keys, *values;                  // [kTileKeys, size]
  Int *number, *depth;               // of each lane; number is -1 for lanes that only fill up
  // A key is seen by the lanes with numbers from low to below high, of depths below limit.
  Int low[kTileKeys], high[kTileKeys], limit[kTileKeys];
  int64_t numbers[kTileKeys];  // of the keys
  int64_t count, filled;       // the keys, without and with those that only fill up and that no lane sees
  bool some_hidden;            // whether not all lanes see all keys

  void add_to(Arena& arena, const Problem& p) {
    arena.add(&keys, kTileKeys * p.key_size);
    arena.add(&values, kTileKeys * p.value_size);
    arena.add(&number, p.num_lanes);
    arena.add(&depth, p.num_lanes);
  }

  void begin_block(const Problem& p, int64_t index) {
    block = block_of(p, index);
    key_numbers.resize(block.above + block.num_rows());
    int32_t above = p.trie.parent[block.first];
    for (int64_t i = block.above - 1; i >= 0; --i) {
      key_numbers[i] = above;
      above = p.trie.parent[above];
    }
    std::iota(key_numbers.begin() + block.above, key_numbers.end(), static_cast<int32_t>(block.first));
    std::fill_n(number, p.num_lanes, Int(-1));
    std::fill_n(depth, p.num_lanes, Int(0));
    for (int64_t i = 0; i < block.num_rows(); ++i) {
      std::fill_n(number + i * p.group, p.group, static_cast<Int>(block.first + i));
      std::fill_n(depth + i * p.group, p.group, static_cast<Int>(p.trie.depth[block.first + i]));
    }
  }

  int64_t num_keys() const {
    return static_cast<int64_t>(key_numbers.size()) - block.skipped;
  }

  bool sees(int64_t lane, int64_t key) const {
    return number[lane] >= low[key] && number[lane] < high[key] && depth[lane] < limit[key];
  }
};

// Loads `count` numbers of type Stored as numbers of type T, and zeros behind them up to `filled`.
template <typename Stored, typename T>
void load(const char* from, int64_t count, int64_t filled, T* to) {
  if constexpr (std::is_same_v<Stored, T>) {
    if (count > 0) {
      std::memcpy(to, from, count * sizeof(T));
    }
  } else {
    const Stored* data = reinterpret_cast<const Stored*>(from);
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<T>(data[i]);
    }
  }
  std::fill(to + count, to + filled, T(0));
}

// Loads the tile of the block's keys that begins at `begin`.
template <typename Stored, typename T>
void load_tile(const Problem& p, int64_t kv_head, int64_t begin, Tile<T>& tile) {
  using Int = typename Tile<T>::Int;
  const Block& block = tile.block;
  tile.count = std::min(kTileKeys, tile.num_keys() - begin);
  tile.filled = rounded_up(tile.count, kMultiple);
  tile.some_hidden = tile.filled > tile.count;
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t number = tile.key_numbers[block.skipped + begin + i];
    const int64_t row = p.trie.row_of[number];
    load<Stored>(p.k.at(row, kv_head), p.k.size, p.key_size, tile.keys + i * p.key_size);
    load<Stored>(p.v.at(row, kv_head), p.v.size, p.value_size, tile.values + i * p.value_size);
    tile.numbers[i] = number;
    tile.low[i] = static_cast<Int>(number);
    tile.high[i] = static_cast<Int>(p.trie.leave[number]);
    tile.limit[i] = static_cast<Int>(std::min<int64_t>(p.trie.depth[number] + p.window, kMaxRows));
    tile.some_hidden =
        tile.some_hidden || tile.low[i] > block.first || tile.high[i] < block.end || tile.limit[i] <= block.most;
  }
  std::fill(tile.keys + tile.count * p.key_size, tile.keys + tile.filled * p.key_size, T(0));
  std::fill(tile.values + tile.count * p.value_size, tile.values + tile.filled * p.value_size, T(0));
  for (int64_t i = tile.count; i < tile.filled; ++i) {
    tile.low[i] = tile.high[i] = tile.limit[i] = 0;
  }
}

// Calls move(lane, row, head of q) for each lane of a block.
template <typename Move>
RADIX_INLINE void for_lanes(const Problem& p, const Block& block, int64_t kv_head, const Move& move) {
  int64_t lane = 0;
  for (int64_t number = block.first; number < block.end; ++number) {
    for (int64_t i = 0; i < p.group; ++i) {
      move(lane++, p.trie.row_of[number], kv_head * p.group + i);
    }
  }
}

// Loads [lanes, stride] with the numbers of each lane side by side, zeros behind them and in lanes that only fill up.
template <typename Stored, typename T>
void load_lanes(const Problem& p, const Heads& x, const Block& block, int64_t kv_head, int64_t stride, T* to) {
  for_lanes(p, block, kv_head, [&](int64_t lane, int64_t row, int64_t head) {
    load<Stored>(x.at(row, head), x.size, stride, to + lane * stride);
  });
  std::fill(to + block.num_rows() * p.group * stride, to + p.num_lanes * stride, T(0));
}

// Writes the first `size` numbers of [lanes, stride] as [size, lanes].
template <typename T>
void transpose_lanes(const T* __restrict from, int64_t num_lanes, int64_t stride, int64_t size, T* __restrict to) {
  constexpr int64_t kTogether = 8;
  for (int64_t lane = 0; lane < num_lanes; lane += kTogether) {
    for (int64_t d = 0; d < size; ++d) {
      for (int64_t i = 0; i < kTogether; ++i) {
        to[d * num_lanes + lane + i] = from[(lane + i) * stride + d];
      }
    }
  }
}

}  // namespace radix
