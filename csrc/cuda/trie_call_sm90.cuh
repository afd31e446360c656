// The arguments of trie attention's ops on Hopper: checks, and what they fill of a call.
#pragma once

#include "common.cuh"
#include "trie_items_sm90.cuh"

namespace radix {
constexpr int kMostMembers = 16;  // query heads in one block
constexpr int kMostMultiprocessors = 1024;

// Checks for [rows, heads, size] of rows that copies of 16 bytes can take.
inline void check_rows(const char* op, const char* name, const Tensor& x, const Tensor& q, const Place& place) {
  check_place(op, name, x, place);
  RADIX_CHECK(x.dim() == 3, op, name, " must have shape [rows, heads, head_dim], got ", shape_of(x));
  const int32_t dtype = dtype_code_of(x);
  RADIX_CHECK(
      dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16(),
      op,
      name,
      " must be bfloat16 or float16, got ",
      dtype_of(x));
  RADIX_CHECK(
      dtype == dtype_code_of(q) && x.size(0) == q.size(0) && x.size(2) == q.size(2),
      op,
      "q, k and v must have one dtype, as many rows and one head_dim, got ",
      shape_of(q),
      " in ",
      dtype_of(q),
      " for q and ",
      shape_of(x),
      " in ",
      dtype_of(x),
      " for ",
      name);
  RADIX_CHECK(
      x.stride(2) == 1 && step_of(x, 0) % 8 == 0 && step_of(x, 1) % 8 == 0 &&
          reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
      op,
      name,
      " must lie at addresses that are multiples of 16 bytes, with head_dim side by side; clone it");
}

inline const int32_t* table(
    const char* op, const char* name, const Tensor& tensor, int64_t num_rows, const Place& place) {
  check_index_like(op, name, tensor, place);
  RADIX_CHECK(is_int32(tensor) && tensor.is_contiguous(), op, name, " must be int32 and contiguous");
  RADIX_CHECK(
      num_rows < 0 || tensor.size(0) == num_rows,
      op,
      name,
      " must have as many rows as q, ",
      num_rows,
      ", got ",
      tensor.size(0));
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

inline int attribute(const char* op, cudaDeviceAttr wanted, const Place& place) {
  int value = 0;
  check_cuda(op, cudaDeviceGetAttribute(&value, wanted, place.index));
  return value;
}

// Checks what the forward and the backward take, and fills what they have in common.
inline void fill_trie_call(
    const char* op,
    sm90::TrieCall& call,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& leave,
    const Tensor& depth,
    const Tensor& row_of,
    const Tensor& path,
    const Tensor& kv_index,
    int64_t num_nodes,
    const Place& place) {
  check_defined(op, "q", q);
  check_rows(op, "q", q, q, place);
  check_rows(op, "k", k, q, place);
  check_rows(op, "v", v, q, place);
  const int64_t num_rows = q.size(0);
  const int64_t heads = q.size(1);
  const int64_t kv_heads = k.size(1);
  const int64_t size = q.size(2);
  RADIX_CHECK(size == 64 || size == 128, op, "head_dim must be 64 or 128, got ", size);
  RADIX_CHECK(
      v.size(1) == kv_heads && kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
      op,
      "the heads of q must be a multiple of those of k and v, got ",
      heads,
      ", ",
      kv_heads,
      " and ",
      v.size(1));
  RADIX_CHECK(
      0 <= num_nodes && num_nodes <= num_rows,
      op,
      "num_nodes must be from 0 to the ",
      num_rows,
      " rows of q, got ",
      num_nodes);
  const int64_t group = heads / kv_heads;
  const int64_t parts = (group + kMostMembers - 1) / kMostMembers;
  const int64_t members = (group + parts - 1) / parts;
  const int64_t numbers = sm90::kPairs / members;
  const int64_t num_items = (num_rows + numbers - 1) / numbers * kv_heads * parts;
  RADIX_CHECK(
      num_rows <= kMaxRows - sm90::kPairs && num_items <= kMaxRows - kMostMultiprocessors,
      op,
      "q has too many rows and heads, ",
      shape_of(q));
  call.leave = table(op, "leave", leave, num_rows, place);
  call.depth = table(op, "depth", depth, num_rows, place);
  call.row_of = table(op, "row_of", row_of, num_rows, place);
  call.path = table(op, "path", path, num_rows, place);
  call.kv_index = table(op, "kv_index", kv_index, -1, place);
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.q_row = step_of(q, 0);
  call.q_head = step_of(q, 1);
  call.k_row = step_of(k, 0);
  call.k_head = step_of(k, 1);
  call.v_row = step_of(v, 0);
  call.v_head = step_of(v, 1);
  call.num_keys = static_cast<int>(std::min<int64_t>(kv_index.size(0), kMaxRows - sm90::kKeys));
  call.num_rows = static_cast<int>(num_rows);
  call.num_nodes = static_cast<int>(num_nodes);
  call.heads = static_cast<int>(heads);
  call.kv_heads = static_cast<int>(kv_heads);
  call.group = static_cast<int>(group);
  call.members = static_cast<int>(members);
  call.parts = static_cast<int>(parts);
  call.numbers = static_cast<int>(numbers);
  call.num_items = static_cast<int>(num_items);
}

// Returns how many multiprocessors the GPU has, a Hopper one.
inline int multiprocessors(const char* op, const Place& place) {
  RADIX_CHECK(
      attribute(op, cudaDevAttrComputeCapabilityMajor, place) == 9 &&
          attribute(op, cudaDevAttrComputeCapabilityMinor, place) == 0,
      op,
      "the kernel is for compute capability 9.0 alone; radix::trie_attention runs on others");
  return attribute(op, cudaDevAttrMultiProcessorCount, place);
}

}  // namespace radix
