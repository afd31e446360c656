// radix::scatter_add, scatter_add_kv and their .csr overloads on CUDA: each output row is one sum over its segment of
// source rows, in an order that nothing but the segment's length decides.
#include "inverse.cuh"
#include "scatter_add_kernels.cuh"

#include <tuple>

namespace radix {
namespace {

// The inverse of an index, given or made here.
struct Inverse {
  Integers indptr;
  Integers members;
  bool check;
  int64_t* places;  // null unless check and there may be long rows
};

template <size_t kCount>
std::array<Tensor, kCount> sum_all(
    const char* op,
    const std::array<Source, kCount>& sources,
    const std::array<Rows, kCount>& rows,
    const Device& device,
    const Integers& index,
    const Inverse& inverse,
    int64_t num_rows,
    const Place& place) {
  std::array<Tensor, kCount> outs;
  for (size_t t = 0; t < kCount; ++t) {
    outs[t] = empty_rows(sources[t].tensor, num_rows, place);
  }
  with_sum_type(op, sources[0].name, sources[0].tensor, [&](auto type) {
    using T = decltype(type);
    const int64_t unit_bytes = unit_bytes_of(rows) == 16 ? 16 : static_cast<int64_t>(sizeof(T));
    if (num_rows == 0) {
      return;
    }
    Work work{};
    work.lanes = lanes_of(rows, outs, unit_bytes);
    const Tiling tiling = tiling_of<kUnits>(op, num_rows, work.lanes.most_units(), kCount, kBlock, kMaxX);
    work.index = index;
    work.indptr = inverse.indptr;
    work.members = inverse.members;
    work.length = rows[0].count;
    work.num_rows = num_rows;
    work.chunks = tiling.chunks;
    work.check = inverse.check;
    work.places = inverse.places;
    if (unit_bytes == 16) {
      constexpr int kWidth = static_cast<int>(16 / sizeof(T));
      device.launch(&sum_segments<T, kWidth>, tiling.grid, tiling.block, work);
    } else {
      device.launch(&sum_segments<T, 1>, tiling.grid, tiling.block, work);
    }
  });
  return outs;
}

template <size_t kCount>
std::array<Rows, kCount> checked_rows(
    const char* op,
    const std::array<Source, kCount>& sources,
    const Tensor& index,
    int64_t num_rows,
    const Place& place) {
  check_index_like(op, "index", index, place);
  std::array<Rows, kCount> rows;
  for (size_t t = 0; t < kCount; ++t) {
    rows[t] = rows_of(op, sources[t].name, sources[t].tensor, place);
    check_scatter_sizes(op, sources[t].name, rows[t], index, num_rows);
  }
  RADIX_CHECK(
      num_rows > 0 || rows[0].count == 0,
      op,
      "index holds ",
      rows[0].count,
      " entries, but there are no rows (num_rows) to index");
  return rows;
}

template <size_t kCount>
std::array<Tensor, kCount> scatter_add_all(
    const char* op,
    const std::array<Source, kCount>& sources,
    const Tensor& index,
    int64_t num_rows,
    const Place& place) {
  const std::array<Rows, kCount> rows = checked_rows(op, sources, index, num_rows, place);
  with_sum_type(op, sources[0].name, sources[0].tensor, [](auto) {});  // raises before anything is sorted
  const int64_t length = index.size(0);
  const Tensor held_index = as_contiguous(index);
  const Device device(op, place);
  auto run = [&](auto type) {
    using Out = decltype(type);
    Workspace workspace;
    const int64_t indptr_at = workspace.add<Out>(num_rows + 1);
    const int64_t members_at = workspace.add<Out>(length);
    workspace.allocate(place);
    Out* indptr = workspace.at<Out>(indptr_at);
    Out* members = workspace.at<Out>(members_at);
    invert_index(op, place, device, integers_of(held_index), length, num_rows, indptr, members);
    constexpr bool kWide = sizeof(Out) == sizeof(int64_t);
    const Inverse inverse{{indptr, kWide}, {members, kWide}, /*check=*/false, nullptr};
    return sum_all(op, sources, rows, device, integers_of(held_index), inverse, num_rows, place);
  };
  return length <= kMaxRows ? run(int32_t{}) : run(int64_t{});
}

template <size_t kCount>
std::array<Tensor, kCount> scatter_add_csr_all(
    const char* op,
    const std::array<Source, kCount>& sources,
    const Tensor& index,
    const Tensor& indptr,
    const Tensor& members,
    int64_t num_rows,
    const Place& place) {
  const std::array<Rows, kCount> rows = checked_rows(op, sources, index, num_rows, place);
  check_inverse_shapes(op, index, indptr, members, num_rows, place);
  const Tensor held_index = as_contiguous(index);
  const Tensor held_indptr = as_contiguous(indptr);
  const Tensor held_members = as_contiguous(members);
  const Device device(op, place);
  Workspace workspace;
  int64_t* places = nullptr;
  if (rows[0].count > kLongSegment) {
    const int64_t places_at = workspace.add<int64_t>(rows[0].count);
    workspace.allocate(place);
    places = workspace.at<int64_t>(places_at);
  }
  const Inverse inverse{integers_of(held_indptr), integers_of(held_members), /*check=*/true, places};
  return sum_all(op, sources, rows, device, integers_of(held_index), inverse, num_rows, place);
}

Tensor scatter_add_cuda(const Tensor& src, const Tensor& index, int64_t num_rows) {
  return scatter_add_all<1>("scatter_add", {{{"src", src}}}, index, num_rows, cuda_place({&src, &index}))[0];
}

Tensor scatter_add_csr_cuda(
    const Tensor& src, const Tensor& index, const Tensor& indptr, const Tensor& members, int64_t num_rows) {
  const Place place = cuda_place({&src, &index, &indptr, &members});
  return scatter_add_csr_all<1>("scatter_add.csr", {{{"src", src}}}, index, indptr, members, num_rows, place)[0];
}

std::tuple<Tensor, Tensor> scatter_add_kv_cuda(
    const Tensor& src_k, const Tensor& src_v, const Tensor& index, int64_t num_rows) {
  const char* op = "scatter_add_kv";
  check_kv(op, "src_k", src_k, "src_v", src_v);
  const auto [k, v] = scatter_add_all<2>(
      op, {{{"src_k", src_k}, {"src_v", src_v}}}, index, num_rows, cuda_place({&src_k, &src_v, &index}));
  return {k, v};
}

std::tuple<Tensor, Tensor> scatter_add_kv_csr_cuda(
    const Tensor& src_k,
    const Tensor& src_v,
    const Tensor& index,
    const Tensor& indptr,
    const Tensor& members,
    int64_t num_rows) {
  const char* op = "scatter_add_kv.csr";
  check_kv(op, "src_k", src_k, "src_v", src_v);
  const Place place = cuda_place({&src_k, &src_v, &index, &indptr, &members});
  const auto [k, v] =
      scatter_add_csr_all<2>(op, {{{"src_k", src_k}, {"src_v", src_v}}}, index, indptr, members, num_rows, place);
  return {k, v};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CUDA, m) {
  m.impl("scatter_add", TORCH_BOX(&radix::scatter_add_cuda));
  m.impl("scatter_add.csr", TORCH_BOX(&radix::scatter_add_csr_cuda));
  m.impl("scatter_add_kv", TORCH_BOX(&radix::scatter_add_kv_cuda));
  m.impl("scatter_add_kv.csr", TORCH_BOX(&radix::scatter_add_kv_csr_cuda));
}
