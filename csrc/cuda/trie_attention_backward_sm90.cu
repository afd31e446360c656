// radix::trie_attention_backward_sm90 on CUDA: the backward of trie attention on Hopper, in bfloat16 and float16 at
// head_dim 128 without a window. Nothing is read on the host. setup.py compiles this file for sm_90a alone.
#include "trie_backward_launch_sm90.cuh"
#include "trie_call_sm90.cuh"

#include <tuple>

namespace radix {
namespace {

constexpr const char* kOp = "trie_attention_backward_sm90";

// Checks a tensor of the forward's results, or the gradient of one.
void check_result(
    const char* name, const Tensor& x, int64_t a, int64_t b, int64_t c, int32_t dtype, const Place& place) {
  check_place(kOp, name, x, place);
  const bool has_shape = c < 0 ? x.dim() == 2 && x.size(0) == a && x.size(1) == b
                               : x.dim() == 3 && x.size(0) == a && x.size(1) == b && x.size(2) == c;
  RADIX_CHECK(
      has_shape && dtype_code_of(x) == dtype,
      kOp,
      name,
      " must have the shape and dtype that the forward gives, got ",
      shape_of(x),
      " in ",
      dtype_of(x));
  RADIX_CHECK(
      x.is_contiguous() && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
      kOp,
      name,
      " must be contiguous, and begin at an address that is a multiple of 16 bytes; clone it");
}

std::tuple<Tensor, Tensor, Tensor> trie_attention_backward_sm90_cuda(
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& logsumexp,
    const Tensor& leave,
    const Tensor& depth,
    const Tensor& row_of,
    const Tensor& path,
    const Tensor& kv_index,
    int64_t num_nodes,
    double scale) {
  const Place place = cuda_place({&grad_out, &q, &k, &v, &out, &logsumexp, &leave, &depth, &row_of, &path, &kv_index});
  sm90::TrieBackward call{};
  fill_trie_call(kOp, call, q, k, v, leave, depth, row_of, path, kv_index, num_nodes, place);
  const int64_t rows = q.size(0), heads = q.size(1), kv_heads = k.size(1), size = q.size(2);
  const int32_t dtype = dtype_code_of(q);
  RADIX_CHECK(size == sm90::kHeads, kOp, "head_dim must be 128, got ", size);
  check_result("grad_out", grad_out, rows, heads, size, dtype, place);
  check_result("out", out, rows, heads, size, dtype, place);
  check_result("logsumexp", logsumexp, heads, rows, -1, aoti_torch_dtype_float32(), place);
  const int64_t num_key_items = (rows + sm90::kBlockKeys - 1) / sm90::kBlockKeys * kv_heads;
  RADIX_CHECK(
      rows <= kMaxRows / call.group - 2 * sm90::kBlockKeys && num_key_items <= kMaxRows - kMostMultiprocessors,
      kOp,
      "q has too many rows and heads, ",
      shape_of(q));
  const int64_t q_sizes[] = {rows, heads, size};
  const int64_t k_sizes[] = {rows, kv_heads, size};
  Tensor grad_q = empty_at(place, q_sizes, 3, dtype);
  Tensor grad_k = empty_at(place, k_sizes, 3, dtype);
  Tensor grad_v = empty_at(place, k_sizes, 3, dtype);
  if (rows == 0) {
    return {grad_q, grad_k, grad_v};
  }
  const Device device(kOp, place);
  const int blocks = multiprocessors(kOp, place);
  Workspace workspace;
  const int64_t means_at = workspace.add<float>(rows * heads);
  const int64_t taken_at = workspace.add<int>(2);
  workspace.allocate(place);
  call.out = out.const_data_ptr();
  call.grad_out = grad_out.const_data_ptr();
  call.logsumexp = static_cast<const float*>(logsumexp.const_data_ptr());
  call.means = workspace.at<float>(means_at);
  call.taken = workspace.at<int>(taken_at);
  call.grad_q = grad_q.mutable_data_ptr();
  call.grad_k = grad_k.mutable_data_ptr();
  call.grad_v = grad_v.mutable_data_ptr();
  call.num_key_items = static_cast<int>(num_key_items);
  call.scale = static_cast<float>(scale);
  call.factor = static_cast<float>(scale * 1.4426950408889634);
  check_cuda(kOp, launch_trie_backward(call, dtype == aoti_torch_dtype_bfloat16(), blocks, device.stream()));
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CUDA, m) {
  m.impl("trie_attention_backward_sm90", TORCH_BOX(&radix::trie_attention_backward_sm90_cuda));
}
