// Memory for scratch and gradients, on huge pages where the system gives them, kept from one call to the next: fresh 4
// KB pages for a gradient of the vocabulary's size cost as much time as the matrix product that fills it.
#pragma once

#include <cstddef>
#include <utility>

namespace bbopd::cpu {

class Buffer {
 public:
  Buffer() = default;
  // At least `bytes`, aligned to 64; what it holds is undefined. Throws std::bad_alloc.
  explicit Buffer(std::size_t bytes);
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t bytes() const { return bytes_; }

  // Gives the memory of buffers that are no longer in use back to the system.
  static void release_unused();

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace bbopd::cpu
