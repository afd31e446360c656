// The problem of radix::trie_attention on the CPU, forward and backward, and the blocks it is cut into.
//
// A block is rows side by side in depth-first order. They see rows of the block itself and of the path to its first
// row, and nearly all of that path is seen by all of them: so a block reads its keys once, however many sequences its
// rows belong to. All heads of q that share a head of k are lanes beside each other.
#pragma once

#include "trie_tables.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

namespace radix {

// Lanes of a block and keys of a tile: a block's numbers stay in the second-level cache, and few of the keys are read
// for some of its rows alone.
constexpr int64_t kLanes = 96;
constexpr int64_t kTileKeys = 64;
// The keys of a tile are filled up to a multiple of this.
constexpr int64_t kMultiple = 8;
constexpr int64_t kAlignment = 64;

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

// The checked arguments, and how the rows are cut into blocks.
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

// Whether q holds a query for each row of k and v, or of some rows.
enum class Queries { kOfAllRows, kOfSomeRows };

// Checks all arguments that forward and backward share. Sizes of keys and of values are filled up to the two multiples.
Problem checked_problem(
    const char* op,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const GivenTables& tables,
    double scale,
    int64_t sliding_window,
    int64_t key_multiple,
    int64_t value_multiple,
    Queries queries = Queries::kOfAllRows);

// Calls run(stored, wide) with a 0 of the type that q's numbers are stored as, and a 0 of the type of their sums.
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

// The dtype of those sums, which is that of logsumexp as well.
inline int32_t sum_dtype_of(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// The rows of a block, and the keys they read: the rows themselves and those on the path to the first, without those
// that are above every row's window.
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

// Returns how many keys all blocks read together.
inline int64_t num_keys_read(const Problem& p) {
  int64_t num_keys = 0;
  for (int64_t block = 0; block < p.num_blocks(); ++block) {
    num_keys += block_of(p, block).num_keys();
  }
  return num_keys;
}

}  // namespace radix
