// radix::trie_attention on the CPU.
#include "trie_attention.h"

#include "rows.h"

#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

namespace radix {
namespace {

void check_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, int64_t sliding_window) {
  const std::pair<const char*, const Tensor*> named[] = {{"q", &q}, {"k", &k}, {"v", &v}};
  for (const auto& [name, x] : named) {
    check_place(op, name, *x, cpu());
    RADIX_CHECK(x->dim() == 3, op, name, " must have shape [rows, heads, head_dim], got ", shape_of(*x));
    RADIX_CHECK(
        x->scalar_type() == q.scalar_type(),
        op,
        "q, k and v must have one dtype, got ",
        dtype_of(q),
        " for q and ",
        dtype_of(*x),
        " for ",
        name);
    RADIX_CHECK(x->size(0) == q.size(0), op, name, " must have as many rows as q, ", q.size(0), ", got ", x->size(0));
  }
  RADIX_CHECK(
      k.size(1) == v.size(1), op, "k and v must have equal rows and heads, got ", shape_of(k), " and ", shape_of(v));
  RADIX_CHECK(k.size(2) == q.size(2), op, "q and k must have one head_dim, got ", q.size(2), " and ", k.size(2));
  RADIX_CHECK(
      q.size(1) > 0 && q.size(2) > 0,
      op,
      "q must have at least one head and a head_dim of at least 1, got ",
      shape_of(q));
  RADIX_CHECK(
      k.size(1) > 0 && q.size(1) % k.size(1) == 0,
      op,
      "the ",
      q.size(1),
      " heads of q must be a multiple of the ",
      k.size(1),
      " heads of k and v");
  RADIX_CHECK(sliding_window >= 0, op, "sliding_window must be at least 0 (0: none), got ", sliding_window);
}

// An index tensor of which all entries that count are in [0, bound). `what` says what the bound counts.
Integers checked_index(
    const char* op,
    const char* name,
    const Tensor& tensor,
    int64_t length,
    int64_t bound,
    const char* what,
    std::vector<Tensor>& held) {
  held.push_back(as_contiguous(tensor));
  with_index_type(tensor, [&](auto type) {
    using Index = decltype(type);
    check_in_range(op, name, static_cast<const Index*>(held.back().const_data_ptr()), length, bound, what);
  });
  return integers_of(held.back());
}

std::tuple<Tensor, Tensor> trie_attention_cpu(
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
    int64_t sliding_window) {
  const char* op = "trie_attention";
  check_heads(op, q, k, v, sliding_window);
  const int64_t num_rows = q.size(0);
  const std::pair<const char*, const Tensor*> by_row[] = {
      {"enter", &enter}, {"leave", &leave}, {"depth", &depth}, {"row_of", &row_of}, {"path", &path}};
  for (const auto& [name, x] : by_row) {
    check_index_like(op, name, *x, cpu());
    RADIX_CHECK(x->size(0) == num_rows, op, name, " must have as many rows as q, ", num_rows, ", got ", x->size(0));
  }
  check_index_like(op, "kv_index", kv_index, cpu());
  check_index_like(op, "cu_seqlens_q", cu_seqlens_q, cpu());
  RADIX_CHECK(
      num_nodes >= 0 && num_nodes <= num_rows,
      op,
      "num_nodes must be from 0 to the ",
      num_rows,
      " rows of q, got ",
      num_nodes);
  const int64_t num_keys = kv_index.size(0);
  std::vector<Tensor> held;
  Problem p{
      heads_of(q),
      heads_of(k),
      heads_of(v),
      checked_index(op, "leave", leave, num_nodes, kMaxRows, "rows", held),
      checked_index(op, "depth", depth, num_nodes, num_nodes, "rows", held),
      checked_index(op, "row_of", row_of, num_nodes, num_nodes, "rows", held),
      checked_index(op, "path", path, num_nodes, num_keys, "entries of kv_index", held),
      checked_index(op, "kv_index", kv_index, num_keys, num_nodes, "rows", held)};
  const Integers numbers = checked_index(op, "enter", enter, num_nodes, num_nodes, "rows", held);
  for (int64_t i = 0; i < num_nodes; ++i) {
    const int64_t row = p.row_of[i];
    RADIX_CHECK(
        numbers[row] == i, op, "row_of must be the inverse of enter, but enter[row_of[", i, "]] is ", numbers[row]);
    RADIX_CHECK(
        p.leave[row] > i, op, "leave[", row, "] must be more than enter[", row, "], ", i, ", got ", p.leave[row]);
    RADIX_CHECK(
        p.path[row] + p.depth[row] < num_keys, op, "path and depth of row ", row, " lead past the end of kv_index");
  }
  p.num_nodes = num_nodes;
  p.num_rows = num_rows;
  p.group = q.size(1) / k.size(1);
  p.block_rows = std::max<int64_t>(1, kLanes / p.group);
  p.num_lanes = rounded_up(p.block_rows * p.group, kAlignment / sizeof(float));
  p.value_size = rounded_up(v.size(2), kMultiple);
  p.factor = scale;
  p.window = sliding_window == 0 ? kMaxRows : std::min(sliding_window, kMaxRows);

  const bool is_double = q.scalar_type() == ScalarType::Double;
  const int64_t out_sizes[] = {num_rows, q.size(1), v.size(2)}, sum_sizes[] = {q.size(1), num_rows};
  Tensor out = empty_at(cpu(), out_sizes, 3, dtype_code_of(q));
  Tensor logsumexp = empty_at(cpu(), sum_sizes, 2, is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.logsumexp = static_cast<char*>(logsumexp.mutable_data_ptr());
  const int64_t out_bytes = q.size(1) * v.size(2) * static_cast<int64_t>(out.element_size());
  if (out_bytes > 0) {
    std::memset(p.out + num_nodes * out_bytes, 0, (num_rows - num_nodes) * out_bytes);
  }
  const int64_t sum_bytes = static_cast<int64_t>(logsumexp.element_size());
  for (int64_t head = 0; head < q.size(1); ++head) {
    std::memset(p.logsumexp + (head * num_rows + num_nodes) * sum_bytes, 0, (num_rows - num_nodes) * sum_bytes);
  }
  switch (q.scalar_type()) {
    case ScalarType::Double:
      attend_all<double, double>(p);
      break;
    case ScalarType::Float:
      attend_all<float, float>(p);
      break;
    case ScalarType::Half:
      attend_all<c10::Half, float>(p);
      break;
    case ScalarType::BFloat16:
      attend_all<c10::BFloat16, float>(p);
      break;
    default:
      fail(op, "q must be float32, float64, bfloat16 or float16, got ", dtype_of(q));
  }
  return {out, logsumexp};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("trie_attention", TORCH_BOX(&radix::trie_attention_cpu));
}
