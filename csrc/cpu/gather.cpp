// radix::gather and radix::gather.csr on the CPU: x[index] over dim 0, of any dtype, as copies of rows.
#include "index_checks.h"
#include "parallel.h"

#include <mutex>
#include <tuple>

namespace radix {
namespace {

// Rows may stand at any byte, so they are moved as bytes; the compiler makes one load and store of each. Rows side by
// side, as of ids, need no product of an index and a stride.
template <int64_t kRowBytes, typename Index>
void copy_fixed_rows(const Rows& x, const Index* wanted, int64_t count, char* out) {
  const char* data = x.data;
  const int64_t stride_bytes = x.stride_bytes;
  if (stride_bytes == kRowBytes) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(out + i * kRowBytes, data + static_cast<int64_t>(wanted[i]) * kRowBytes, kRowBytes);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * kRowBytes, data + static_cast<int64_t>(wanted[i]) * stride_bytes, kRowBytes);
  }
}

template <typename Index>
void copy_rows(const Rows& x, const Index* wanted, int64_t count, char* out) {
  // Rows of one element are common (ids, positions, masks) and too short for a call each.
  switch (x.row_bytes) {
    case 0:
      return;
    case 1:
      return copy_fixed_rows<1>(x, wanted, count, out);
    case 2:
      return copy_fixed_rows<2>(x, wanted, count, out);
    case 4:
      return copy_fixed_rows<4>(x, wanted, count, out);
    case 8:
      return copy_fixed_rows<8>(x, wanted, count, out);
    default:
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(out + i * x.row_bytes, x.data + static_cast<int64_t>(wanted[i]) * x.stride_bytes, x.row_bytes);
      }
  }
}

// The first of the bad entries that threads find.
class FirstBad {
 public:
  void add(const BadEntry& bad) {
    if (bad.at >= 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      first_ = first_.at < 0 || bad.at < first_.at ? bad : first_;
    }
  }

  const BadEntry& first() const {
    return first_;
  }

 private:
  std::mutex mutex_;
  BadEntry first_;
};

Tensor gather_rows(const char* op, const char* name, const Tensor& x, const Tensor& index) {
  check_index_like(op, "index", index, cpu());
  const Rows rows = rows_of(op, name, x, cpu());
  const Tensor held_index = as_contiguous(index);
  const int64_t length = held_index.size(0);
  Tensor out = empty_rows(x, length, cpu());
  with_index_type(index, [&](auto type) {
    using Index = decltype(type);
    const Index* entries = static_cast<const Index*>(held_index.const_data_ptr());
    char* out_data = static_cast<char*>(out.mutable_data_ptr());
    FirstBad bad;
    parallel_over(length, rows.row_bytes, [&](int64_t begin, int64_t end) {
      bad.add(for_entries(entries, begin, end, rows.count, [&](int64_t first, const Index* wanted, int64_t count) {
        copy_rows(rows, wanted, count, out_data + first * rows.row_bytes);
      }));
    });
    if (bad.first().at >= 0) {
      refuse_entry(op, "index", bad.first(), rows.count, "rows");
    }
  });
  return out;
}

Tensor gather_cpu(const Tensor& x, const Tensor& index) {
  return gather_rows("gather", "x", x, index);
}

// The inverse serves the backward, which checks its values; here the forward needs index alone.
Tensor gather_csr_cpu(const Tensor& x, const Tensor& index, const Tensor& indptr, const Tensor& members) {
  const char* op = "gather.csr";
  check_index_like(op, "index", index, cpu());
  check_defined(op, "x", x);
  RADIX_CHECK(x.dim() >= 1, op, "x must have at least 1 dimension, got a scalar");
  check_inverse_shapes(op, index, indptr, members, x.size(0), cpu());
  return gather_rows(op, "x", x, index);
}

std::tuple<Tensor, Tensor> gather_kv_cpu(const Tensor& k, const Tensor& v, const Tensor& index) {
  const char* op = "gather_kv";
  check_kv(op, "k", k, "v", v);
  return {gather_rows(op, "k", k, index), gather_rows(op, "v", v, index)};
}

std::tuple<Tensor, Tensor> gather_kv_csr_cpu(
    const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& indptr, const Tensor& members) {
  const char* op = "gather_kv.csr";
  check_kv(op, "k", k, "v", v);
  check_index_like(op, "index", index, cpu());
  check_inverse_shapes(op, index, indptr, members, k.size(0), cpu());
  return {gather_rows(op, "k", k, index), gather_rows(op, "v", v, index)};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("gather", TORCH_BOX(&radix::gather_cpu));
  m.impl("gather.csr", TORCH_BOX(&radix::gather_csr_cpu));
  m.impl("gather_kv", TORCH_BOX(&radix::gather_kv_cpu));
  m.impl("gather_kv.csr", TORCH_BOX(&radix::gather_kv_csr_cpu));
}
