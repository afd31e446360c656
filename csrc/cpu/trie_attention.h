// What forward and backward of radix::trie_attention share on the CPU: how blocks of rows read the keys they see.
//
// A block is rows side by side in depth-first order. What any of them sees stands in the block itself or on the path to
// its first row, and nearly all of that path is seen by all of them: so a block reads its keys once, however many
// sequences its rows belong to. All heads of q that share a head of k are lanes beside each other.
#pragma once

#include "lanes.h"
#include "trie_tables.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

namespace radix {

// Lanes of a block and keys of a tile: a block's numbers stay in the second-level cache, and few of the keys are read
// for some of its rows alone.
constexpr int64_t kLanes = 96;
constexpr int64_t kTileKeys = 64;
// What the keys of a tile are filled up to a multiple of.
constexpr int64_t kMultiple = 8;
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
      step_of(held, 0) * bytes,
      step_of(held, 1) * bytes,
      held.size(1),
      held.size(2)};
}

struct Problem {
  TrieTables trie;
  Heads q, k, v;
  int64_t num_rows;
  double factor;
  int64_t window;                // as large as any depth where there is none
  int64_t group;                 // heads of q that share a head of k
  int64_t block_rows;            // rows of a block
  int64_t num_lanes;             // of a block, filled up
  int64_t key_size, value_size;  // numbers in a tile of each key and value, filled up

  int64_t num_blocks() const {
    return (trie.num_nodes() + block_rows - 1) / block_rows;
  }
};

// Checks all arguments that forward and backward share. The multiples are what sizes of keys and values are filled up
// to.
Problem checked_problem(
    const char* op,
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
    int64_t sliding_window,
    int64_t key_multiple,
    int64_t value_multiple);

// Calls run with a value of the type that numbers of q's dtype are stored as, and one of the type they are summed in.
template <typename Run>
void with_number_types(const char* op, const Tensor& q, const Run& run) {
  switch (q.scalar_type()) {
    case ScalarType::Double:
      return run(double{}, double{});
    case ScalarType::Float:
      return run(float{}, float{});
    case ScalarType::Half:
      return run(c10::Half{}, float{});
    case ScalarType::BFloat16:
      return run(c10::BFloat16{}, float{});
    default:
      fail(op, "q must be float32, float64, bfloat16 or float16, got ", dtype_of(q));
  }
}

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

// The rows of a block, and the keys they read: those on the path to the first of them, of which those above every
// row's window are left out, and the rows themselves.
struct Block {
  int64_t first, end;  // numbers
  int64_t above;       // how many rows are on the path to the first
  int64_t skipped;     // how many of those are left out
  int64_t most;        // the largest depth

  int64_t num_rows() const {
    return end - first;
  }

  int64_t num_keys() const {
    return above - skipped + num_rows();
  }
};

inline Block block_of(const Problem& p, int64_t index) {
  const int64_t first = index * p.block_rows, end = std::min(first + p.block_rows, p.trie.num_nodes());
  const auto [least, most] = std::minmax_element(p.trie.depth.begin() + first, p.trie.depth.begin() + end);
  const int64_t above = p.trie.depth[first];
  return Block{first, end, above, std::min(above, std::max<int64_t>(0, *least - p.window + 1)), *most};
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

// What a thread holds of a block's keys, a tile at a time, and of who sees them.
template <typename T>
struct Tile {
  using Int = typename Lanes<T, kAlignment>::Int;

  Block block;
  std::vector<int32_t> path;  // the numbers of the rows on the path to the block's first, those left out too
  T *keys, *values;           // [kTileKeys, size]
  Int *number, *depth;        // of each lane; -1 for lanes that are none
  // A key is seen by the lanes with numbers from low to below high, of depths below limit.
  Int low[kTileKeys], high[kTileKeys], limit[kTileKeys];
  int64_t numbers[kTileKeys];  // of the keys
  int64_t count, filled;       // how many keys there are, and with those that fill up, which no lane sees
  bool some_hidden;            // whether not all lanes see all keys

  void add_to(Arena& arena, const Problem& p) {
    arena.add(&keys, kTileKeys * p.key_size);
    arena.add(&values, kTileKeys * p.value_size);
    arena.add(&number, p.num_lanes);
    arena.add(&depth, p.num_lanes);
  }

  void begin_block(const Problem& p, int64_t index) {
    block = block_of(p, index);
    path.resize(block.above);
    int32_t above = p.trie.parent[block.first];
    for (int64_t i = block.above - 1; i >= 0; --i) {
      path[i] = above;
      above = p.trie.parent[above];
    }
    std::fill_n(number, p.num_lanes, Int(-1));
    std::fill_n(depth, p.num_lanes, Int(0));
    for (int64_t i = 0; i < block.num_rows(); ++i) {
      std::fill_n(number + i * p.group, p.group, static_cast<Int>(block.first + i));
      std::fill_n(depth + i * p.group, p.group, static_cast<Int>(p.trie.depth[block.first + i]));
    }
  }

  bool sees(int64_t lane, int64_t key) const {
    return number[lane] >= low[key] && number[lane] < high[key] && depth[lane] < limit[key];
  }
};

// `count` numbers of type Stored as numbers of type T, and zeros behind them up to `filled`.
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

// The tile of the block's keys that begins at `begin`.
template <typename Stored, typename T>
void load_tile(const Problem& p, int64_t kv_head, int64_t begin, Tile<T>& tile) {
  using Int = typename Tile<T>::Int;
  const Block& block = tile.block;
  tile.count = std::min(kTileKeys, block.num_keys() - begin);
  tile.filled = rounded_up(tile.count, kMultiple);
  tile.some_hidden = tile.filled > tile.count;
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t on_path = block.skipped + begin + i;
    const bool is_above = on_path < block.above;
    const int64_t number = is_above ? tile.path[on_path] : block.first + on_path - block.above;
    const int64_t row = p.trie.row_of[number];
    load<Stored>(p.k.at(row, kv_head), p.k.size, p.key_size, tile.keys + i * p.key_size);
    load<Stored>(p.v.at(row, kv_head), p.v.size, p.value_size, tile.values + i * p.value_size);
    tile.numbers[i] = number;
    tile.low[i] = static_cast<Int>(is_above ? 0 : number);
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

// [lanes, stride] with the numbers of each lane side by side, zeros behind them and in lanes that are none.
template <typename Stored, typename T>
void load_lanes(const Problem& p, const Heads& x, const Block& block, int64_t kv_head, int64_t stride, T* to) {
  for_lanes(p, block, kv_head, [&](int64_t lane, int64_t row, int64_t head) {
    load<Stored>(x.at(row, head), x.size, stride, to + lane * stride);
  });
  std::fill(to + block.num_rows() * p.group * stride, to + p.num_lanes * stride, T(0));
}

// The first `size` numbers of [lanes, stride] as [size, lanes].
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

// Runs work(thread's own things) in as many threads as the multiplications are worth. Each takes tasks from a shared
// counter until none is left: tasks differ, and a thread that has to wait for its processor holds up none of the rest.
template <typename Work>
void run_in_threads(int64_t num_tasks, double multiplications, const Work& work) {
  if (multiplications <= kWorkOfOneThread || num_tasks <= 1) {
    work();
  } else {
    torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t, int64_t) { work(); });
  }
}

}  // namespace radix
