// The inverse of an index on CUDA, by CUB's stable radix sort.
#include "inverse.cuh"

#include <torch/headeronly/macros/Macros.h>

#include <cub/device/device_radix_sort.cuh>

namespace radix {
namespace {

template <typename Out>
__global__ void number_entries(Integers index, int64_t length, int64_t num_rows, uint32_t* rows, Out* entries) {
  for_each(length, [&](int64_t i) {
    const int64_t row = index[i];
    CUDA_KERNEL_ASSERT(row >= 0 && row < num_rows && "index out of range");
    rows[i] = static_cast<uint32_t>(row);
    entries[i] = static_cast<Out>(i);
  });
}

// indptr[j] is the first entry whose row is at least j.
template <typename Out>
__global__ void find_segments(const uint32_t* sorted_rows, int64_t length, int64_t num_rows, Out* indptr) {
  for_each(num_rows + 1, [&](int64_t j) {
    int64_t low = 0;
    int64_t high = length;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (sorted_rows[middle] < j) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    indptr[j] = static_cast<Out>(low);
  });
}

}  // namespace

template <typename Out>
void invert_index(
    const char* op,
    const Place& place,
    const Device& device,
    const Integers& index,
    int64_t length,
    int64_t num_rows,
    Out* indptr,
    Out* members) {
  Workspace workspace;
  const int64_t rows_at = workspace.add<uint32_t>(length);
  const int64_t sorted_rows_at = workspace.add<uint32_t>(length);
  const int64_t entries_at = workspace.add<Out>(length);
  const int bits = 64 - __builtin_clzll(static_cast<uint64_t>(num_rows) | 1);
  size_t sort_bytes = 0;
  auto sort = [&](void* temporary, const uint32_t* rows, uint32_t* sorted_rows, const Out* entries) {
    check_cuda(
        op,
        cub::DeviceRadixSort::SortPairs(
            temporary, sort_bytes, rows, sorted_rows, entries, members, length, 0, bits, device.stream()));
  };
  sort(nullptr, nullptr, nullptr, nullptr);
  const int64_t sort_at = workspace.add<char>(static_cast<int64_t>(sort_bytes));
  workspace.allocate(place);
  uint32_t* rows = workspace.at<uint32_t>(rows_at);
  uint32_t* sorted_rows = workspace.at<uint32_t>(sorted_rows_at);
  Out* entries = workspace.at<Out>(entries_at);
  if (length > 0) {
    device.launch_over(length, &number_entries<Out>, index, length, num_rows, rows, entries);
    sort(workspace.at<char>(sort_at), rows, sorted_rows, entries);
  }
  device.launch_over(num_rows + 1, &find_segments<Out>, sorted_rows, length, num_rows, indptr);
}

template void invert_index<int32_t>(
    const char*, const Place&, const Device&, const Integers&, int64_t, int64_t, int32_t*, int32_t*);
template void invert_index<int64_t>(
    const char*, const Place&, const Device&, const Integers&, int64_t, int64_t, int64_t*, int64_t*);

}  // namespace radix
