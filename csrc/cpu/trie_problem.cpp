// Checks the arguments that forward and backward of trie attention share.
#include "trie_problem.h"

#include <utility>

namespace radix {
namespace {

void check_heads(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v, int64_t sliding_window, Queries queries) {
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
    if (queries == Queries::kOfAllRows) {
      RADIX_CHECK(x->size(0) == q.size(0), op, name, " must have as many rows as q, ", q.size(0), ", got ", x->size(0));
    }
  }
  RADIX_CHECK(
      k.size(0) == v.size(0) && k.size(1) == v.size(1),
      op,
      "k and v must have equal rows and heads, got ",
      shape_of(k),
      " and ",
      shape_of(v));
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

}  // namespace

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
    Queries queries) {
  check_heads(op, q, k, v, sliding_window, queries);
  const int64_t num_rows = k.size(0), group = q.size(1) / k.size(1);
  const int64_t block_rows = std::max<int64_t>(1, kLanes / group);
  return Problem{
      checked_trie_tables(op, tables, num_rows, queries == Queries::kOfAllRows ? "q" : "k"),
      heads_of(q),
      heads_of(k),
      heads_of(v),
      num_rows,
      scale,
      sliding_window == 0 ? kMaxRows : std::min(sliding_window, kMaxRows),
      group,
      block_rows,
      rounded_up(block_rows * group, kAlignment / sizeof(float)),
      rounded_up(k.size(2), key_multiple),
      rounded_up(v.size(2), value_multiple)};
}

}  // namespace radix
