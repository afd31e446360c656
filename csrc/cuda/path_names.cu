// Names stretches of tokens, twice as long in each round: a name is the first token at which such a stretch ends, and
// two tokens have one name exactly when the stretches that end with them are equal. Stretches stop at the start of
// their sequence, so after the last round they are whole paths. A round sorts (CUB's merge sort) and looks equals up.
#include "path_names.cuh"

#include <cub/device/device_merge_sort.cuh>

namespace radix {
namespace {

// A stretch, which ends with `token`, as two numbers that tell it from others: token and position, or two names.
struct Stretch {
  int64_t first;
  int64_t second;
  int32_t token;

  __device__ bool comes_before(const Stretch& other) const {
    return first != other.first ? first < other.first : second < other.second;
  }
};

struct Order {
  __device__ bool operator()(const Stretch& a, const Stretch& b) const {
    return a.comes_before(b) || (!b.comes_before(a) && a.token < b.token);
  }
};

__global__ void list_tokens(Batch batch, Stretch* stretches) {
  for_each(batch.num_tokens, [&](int64_t token) {
    stretches[token] = Stretch{batch.ids[token], batch.position(token), static_cast<int32_t>(token)};
  });
}

// Each stretch is the `step` tokens that end with its token and the `step` before those, as far as there are any.
__global__ void list_halves(Batch batch, const int32_t* names, int64_t step, Stretch* stretches) {
  for_each(batch.num_tokens, [&](int64_t token) {
    const int32_t earlier = token - step < batch.start(token) ? kNone : names[token - step];
    stretches[token] = Stretch{names[token], earlier, static_cast<int32_t>(token)};
  });
}

__global__ void take_names(const Stretch* sorted, int64_t count, int32_t* names) {
  for_each(count, [&](int64_t i) {
    const Stretch stretch = sorted[i];
    int64_t low = 0;
    int64_t high = i;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (sorted[middle].comes_before(stretch)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    names[stretch.token] = sorted[low].token;
  });
}

}  // namespace

void name_paths(
    const char* op, const Place& place, const Device& device, const Batch& batch, int64_t longest, int32_t* names) {
  const int64_t count = batch.num_tokens;
  Workspace workspace;
  const int64_t stretches_at = workspace.add<Stretch>(count);
  size_t sort_bytes = 0;
  auto sort = [&](void* temporary, Stretch* stretches) {
    check_cuda(op, cub::DeviceMergeSort::SortKeys(temporary, sort_bytes, stretches, count, Order{}, device.stream()));
  };
  sort(nullptr, nullptr);
  const int64_t sort_at = workspace.add<char>(static_cast<int64_t>(sort_bytes));
  workspace.allocate(place);
  Stretch* stretches = workspace.at<Stretch>(stretches_at);
  auto name = [&] {
    sort(workspace.at<char>(sort_at), stretches);
    device.launch_over(count, &take_names, stretches, count, names);
  };
  device.launch_over(count, &list_tokens, batch, stretches);
  name();
  for (int64_t step = 1; step < longest; step *= 2) {
    device.launch_over(count, &list_halves, batch, names, step, stretches);
    name();
  }
}

}  // namespace radix
