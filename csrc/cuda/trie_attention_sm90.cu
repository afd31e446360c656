// radix::trie_attention_sm90 on CUDA: the forward of trie attention on Hopper, in bfloat16 and float16. Nothing is read
// on the host. setup.py compiles this file for sm_90a alone.
#include "common.cuh"
#include "trie_launch_sm90.cuh"

#include <cmath>
#include <tuple>

namespace radix {
namespace {

constexpr const char* kOp = "trie_attention_sm90";
constexpr int kMostMembers = 16;  // query heads in one block
constexpr int kMostMultiprocessors = 1024;

// Checks for [rows, heads, size] of rows that copies of 16 bytes can take.
void check_rows(const char* name, const Tensor& x, const Tensor& q, const Place& place) {
  check_place(kOp, name, x, place);
  RADIX_CHECK(x.dim() == 3, kOp, name, " must have shape [rows, heads, head_dim], got ", shape_of(x));
  const int32_t dtype = dtype_code_of(x);
  RADIX_CHECK(
      dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16(),
      kOp,
      name,
      " must be bfloat16 or float16, got ",
      dtype_of(x));
  RADIX_CHECK(
      dtype == dtype_code_of(q) && x.size(0) == q.size(0) && x.size(2) == q.size(2),
      kOp,
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
      kOp,
      name,
      " must lie at addresses that are multiples of 16 bytes, with head_dim side by side; clone it");
}

const int32_t* table(const char* name, const Tensor& tensor, int64_t num_rows, const Place& place) {
  check_index_like(kOp, name, tensor, place);
  RADIX_CHECK(is_int32(tensor) && tensor.is_contiguous(), kOp, name, " must be int32 and contiguous");
  RADIX_CHECK(
      num_rows < 0 || tensor.size(0) == num_rows,
      kOp,
      name,
      " must have as many rows as q, ",
      num_rows,
      ", got ",
      tensor.size(0));
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

int attribute(cudaDeviceAttr wanted, const Place& place) {
  int value = 0;
  check_cuda(kOp, cudaDeviceGetAttribute(&value, wanted, place.index));
  return value;
}

std::tuple<Tensor, Tensor> trie_attention_sm90_cuda(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& leave,
    const Tensor& depth,
    const Tensor& row_of,
    const Tensor& path,
    const Tensor& kv_index,
    int64_t num_nodes,
    double scale,
    int64_t sliding_window) {
  const Place place = cuda_place({&q, &k, &v, &leave, &depth, &row_of, &path, &kv_index});
  check_defined(kOp, "q", q);
  check_rows("q", q, q, place);
  check_rows("k", k, q, place);
  check_rows("v", v, q, place);
  const int64_t num_rows = q.size(0);
  const int64_t heads = q.size(1);
  const int64_t kv_heads = k.size(1);
  const int64_t size = q.size(2);
  RADIX_CHECK(size == 64 || size == 128, kOp, "head_dim must be 64 or 128, got ", size);
  RADIX_CHECK(
      v.size(1) == kv_heads && kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
      kOp,
      "the heads of q must be a multiple of those of k and v, got ",
      heads,
      ", ",
      kv_heads,
      " and ",
      v.size(1));
  RADIX_CHECK(
      0 <= num_nodes && num_nodes <= num_rows,
      kOp,
      "num_nodes must be from 0 to the ",
      num_rows,
      " rows of q, got ",
      num_nodes);
  RADIX_CHECK(sliding_window >= 0, kOp, "sliding_window must be at least 0 (0: none), got ", sliding_window);
  const int64_t group = heads / kv_heads;
  const int64_t parts = (group + kMostMembers - 1) / kMostMembers;
  const int64_t members = (group + parts - 1) / parts;
  const int64_t numbers = sm90::kPairs / members;
  const int64_t num_items = (num_rows + numbers - 1) / numbers * kv_heads * parts;
  RADIX_CHECK(
      num_rows <= kMaxRows - sm90::kPairs && num_items <= kMaxRows - kMostMultiprocessors,
      kOp,
      "q has too many rows and heads, ",
      shape_of(q));

  const int64_t out_sizes[] = {num_rows, heads, size};
  const int64_t sums_sizes[] = {heads, num_rows};
  Tensor out = empty_at(place, out_sizes, 3, dtype_code_of(q));
  Tensor logsumexp = empty_at(place, sums_sizes, 2, aoti_torch_dtype_float32());
  sm90::TrieForward call{};
  call.leave = table("leave", leave, num_rows, place);
  call.depth = table("depth", depth, num_rows, place);
  call.row_of = table("row_of", row_of, num_rows, place);
  call.path = table("path", path, num_rows, place);
  call.kv_index = table("kv_index", kv_index, -1, place);
  if (num_rows == 0) {
    return {out, logsumexp};
  }
  const Device device(kOp, place);
  RADIX_CHECK(
      attribute(cudaDevAttrComputeCapabilityMajor, place) == 9 &&
          attribute(cudaDevAttrComputeCapabilityMinor, place) == 0,
      kOp,
      "the kernel is for compute capability 9.0 alone; radix::trie_attention runs on others");
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
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
  // A masked score is -inf, and -inf times 0 is NaN.
  call.factor = std::max(static_cast<float>(std::abs(scale) * 1.4426950408889634), std::numeric_limits<float>::min());
  call.is_negative = scale < 0;
  call.window = static_cast<int>(std::min(sliding_window, kMaxRows));
  const bool is_bf16 = dtype_code_of(q) == aoti_torch_dtype_bfloat16();
  const int blocks = attribute(cudaDevAttrMultiProcessorCount, place);
  check_cuda(kOp, launch_trie_forward(call, is_bf16, static_cast<int>(size), blocks, device.stream()));
  return {out, logsumexp};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CUDA, m) {
  m.impl("trie_attention_sm90", TORCH_BOX(&radix::trie_attention_sm90_cuda));
}
