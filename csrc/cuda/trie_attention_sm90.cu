// radix::trie_attention_sm90 on CUDA: the forward of trie attention on Hopper, in bfloat16 and float16. Nothing is read
// on the host. setup.py compiles this file for sm_90a alone.
#include "trie_call_sm90.cuh"
#include "trie_launch_sm90.cuh"

#include <cmath>
#include <tuple>

namespace radix {
namespace {

constexpr const char* kOp = "trie_attention_sm90";

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
  sm90::TrieForward call{};
  fill_trie_call(kOp, call, q, k, v, leave, depth, row_of, path, kv_index, num_nodes, place);
  RADIX_CHECK(sliding_window >= 0, kOp, "sliding_window must be at least 0 (0: none), got ", sliding_window);
  const int64_t out_sizes[] = {q.size(0), q.size(1), q.size(2)};
  const int64_t sums_sizes[] = {q.size(1), q.size(0)};
  Tensor out = empty_at(place, out_sizes, 3, dtype_code_of(q));
  Tensor logsumexp = empty_at(place, sums_sizes, 2, aoti_torch_dtype_float32());
  if (call.num_rows == 0) {
    return {out, logsumexp};
  }
  const Device device(kOp, place);
  const int blocks = multiprocessors(kOp, place);
  call.out = out.mutable_data_ptr();
  call.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  // A masked score is -inf, and -inf times 0 is NaN.
  call.factor = std::max(static_cast<float>(std::abs(scale) * 1.4426950408889634), std::numeric_limits<float>::min());
  call.is_negative = scale < 0;
  call.window = static_cast<int>(std::min(sliding_window, kMaxRows));
  const bool is_bf16 = dtype_code_of(q) == aoti_torch_dtype_bfloat16();
  check_cuda(kOp, launch_trie_forward(call, is_bf16, static_cast<int>(q.size(2)), blocks, device.stream()));
  return {out, logsumexp};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CUDA, m) {
  m.impl("trie_attention_sm90", TORCH_BOX(&radix::trie_attention_sm90_cuda));
}
