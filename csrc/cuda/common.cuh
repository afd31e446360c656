// Device, stream, launches and workspaces, for all CUDA kernels.
#pragma once

#include "../integers.h"

#include <cuda_runtime.h>

#include <atomic>
#include <initializer_list>

// Weak, so that the library still loads beside a torch without CUDA, which lacks it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace radix {

constexpr int kThreads = 256;

// Returns the CUDA device of the first of these tensors that is on one; the dispatcher makes sure that one is.
inline Place cuda_place(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (tensor->defined() && tensor->is_cuda()) {
      return place_of(*tensor);
    }
  }
  return cpu();
}

// Raises for a call that failed, and has the runtime that is linked into this library forget it.
inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) [[unlikely]] {
    cudaGetLastError();
    fail(op, "CUDA error: ", cudaGetErrorString(error));
  }
}

// The current stream of a device, which is the current device for as long as this lives.
class Device {
 public:
  Device(const char* op, const Place& place) : op_(op), device_(place.index) {
    RADIX_CHECK(
        aoti_torch_get_current_cuda_stream != nullptr,
        op,
        "a tensor is on a CUDA device, but the installed torch has no CUDA; install one that has");
    RADIX_CHECK(place.type == aoti_torch_device_type_cuda(), op, "no tensor is on a CUDA device");
    check_cuda(op, cudaGetDevice(&before_));
    if (before_ != place.index) {
      check_cuda(op, cudaSetDevice(place.index));
    }
    restore_ = before_ != place.index;
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() {
    if (restore_) {
      cudaSetDevice(before_);
    }
  }

  cudaStream_t stream() const {
    return stream_;
  }

  // Runs kernel(arguments...) in blocks of `block` threads.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Arguments&... arguments) const {
    kernel<<<grid, block, 0, stream_>>>(arguments...);
    check_cuda(op_, cudaGetLastError());
  }

  // Runs a kernel whose blocks wait for each other: all of them run at once.
  template <typename Parameter>
  void launch_cooperative(void (*kernel)(Parameter), unsigned blocks, Parameter argument) const {
    void* arguments[] = {&argument};
    check_cuda(
        op_,
        cudaLaunchCooperativeKernel(
            reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads), arguments, 0, stream_));
  }

  // Returns how many blocks of a kernel can run at once on this device.
  template <typename Parameter>
  int64_t concurrent_blocks(void (*kernel)(Parameter)) const {
    int each = 0;
    int multiprocessors = 0;
    check_cuda(op_, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0));
    check_cuda(op_, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_));
    return static_cast<int64_t>(each) * multiprocessors;
  }

  // Runs a kernel that loops over `count` items with for_each.
  template <typename... Parameters, typename... Arguments>
  void launch_over(int64_t count, void (*kernel)(Parameters...), const Arguments&... arguments) const {
    if (count > 0) {
      const int64_t blocks = std::min<int64_t>((count + kThreads - 1) / kThreads, 1 << 20);
      launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments...);
    }
  }

 private:
  const char* op_;
  int device_;
  int before_ = 0;
  bool restore_ = false;
  cudaStream_t stream_ = nullptr;
};

// How many blocks of each of some kernels a device runs at once. Each device is asked once.
class ConcurrentBlocks {
 public:
  template <typename... Kernels>
  int64_t of(const Place& place, const Device& device, Kernels... kernels) {
    std::atomic<int64_t>* const remembered = place.index < kDevices ? &known_[place.index] : nullptr;
    int64_t blocks = remembered ? remembered->load(std::memory_order_relaxed) : 0;
    if (blocks == 0) {
      blocks = std::min({device.concurrent_blocks(kernels)...});
      if (remembered) {
        remembered->store(blocks, std::memory_order_relaxed);
      }
    }
    return blocks;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int64_t> known_[kDevices]{};
};

// Runs body(i) for each i in [0, count) that falls to this thread of a launch_over.
template <typename Body>
__device__ inline void for_each(int64_t count, const Body& body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    body(i);
  }
}

// Parts of one allocation: add() lays each out, allocate() takes the memory, at() gives the pointers.
class Workspace {
 public:
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return offset;
  }

  void allocate(const Place& place) {
    memory_ = empty_at(place, std::max<int64_t>(bytes_, 1), aoti_torch_dtype_uint8());
    base_ = static_cast<char*>(memory_.mutable_data_ptr());
  }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  int64_t bytes_ = 0;
  Tensor memory_;
  char* base_ = nullptr;
};

}  // namespace radix
