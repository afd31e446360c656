// Small places in pinned memory, to which copies from a device are short.
#pragma once

#include "common.cuh"

#include <mutex>

namespace radix {

// A place for one T, of this thread alone for as long as this lives. Places are used again and never freed: their
// number is that of the threads that ever held one at once.
template <typename T>
class Pinned {
 public:
  explicit Pinned(const char* op) {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    std::vector<T*>& places = pool().places;
    if (places.empty()) {
      // Another thread may be capturing a graph, which an allocation in the usual mode would break.
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      check_cuda(op, cudaThreadExchangeStreamCaptureMode(&mode));
      void* memory = nullptr;
      const cudaError_t error = cudaHostAlloc(&memory, kPlaces * sizeof(T), cudaHostAllocPortable);
      cudaThreadExchangeStreamCaptureMode(&mode);
      check_cuda(op, error);
      for (int64_t i = 0; i < kPlaces; ++i) {
        places.push_back(static_cast<T*>(memory) + i);
      }
    }
    place_ = places.back();
    places.pop_back();
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  ~Pinned() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().places.push_back(place_);
  }

  T* get() const {
    return place_;
  }

 private:
  static constexpr int64_t kPlaces = 32;

  struct Pool {
    std::mutex mutex;
    std::vector<T*> places;
  };

  // It outlives threads that run while the process ends.
  static Pool& pool() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  T* place_;
};

}  // namespace radix
