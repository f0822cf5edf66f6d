// The kernels, a block for each row, and their launches.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/distill_rows.h"
#include "cuda/top_k_rows.h"

namespace bbopd::cuda {

namespace {

// block.h says what each of these does.
struct DeviceBlock {
  template <class T>
  struct PerThread {
    T value;
    __device__ __forceinline__ T& operator[](int) { return value; }
    __device__ __forceinline__ const T& operator[](int) const { return value; }
  };

  template <class Body>
  __device__ __forceinline__ void lanes(Body body) {
    body(static_cast<int>(threadIdx.x));
  }
  template <class Body>
  __device__ __forceinline__ void each(Body body) {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class Condition>
  __device__ __forceinline__ int count(Condition condition) {
    return __syncthreads_count(condition(static_cast<int>(threadIdx.x)));
  }
  __device__ __forceinline__ void barrier() { __syncthreads(); }
  __device__ __forceinline__ int add(int& counter, int amount) { return atomicAdd(&counter, amount); }

  template <class T>
  __device__ __forceinline__ PerThread<T> exchange(const PerThread<T>& part, int apart) {
    static_assert(sizeof(T) % sizeof(unsigned) == 0);
    unsigned words[sizeof(T) / sizeof(unsigned)];
    std::memcpy(words, &part.value, sizeof(T));
    for (unsigned& word : words) word = __shfl_xor_sync(0xffffffffU, word, apart);
    PerThread<T> other;
    std::memcpy(&other.value, words, sizeof(T));
    return other;
  }
};

__global__ void __launch_bounds__(kThreads)
    finish_rows(const __grid_constant__ FinishArguments arguments, bool aligned) {
  DeviceBlock block;
  finish_row(block, arguments, aligned, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    statistics_rows(const __grid_constant__ StatisticsArguments arguments, bool aligned) {
  __shared__ RowSums room[kWarps];
  DeviceBlock block;
  statistics_row(block, arguments, aligned, blockIdx.x, room);
}

__global__ void __launch_bounds__(kThreads)
    logprobs_rows(const __grid_constant__ LogprobsArguments arguments, bool aligned) {
  __shared__ RowSums room[kWarps];
  DeviceBlock block;
  logprobs_row(block, arguments, aligned, blockIdx.x, room);
}

__global__ void __launch_bounds__(kThreads)
    sparse_rows(const __grid_constant__ DistillArguments arguments, DistillAligned aligned) {
  DeviceBlock block;
  sparse_row(block, arguments, aligned, blockIdx.x);
}

// six blocks of a multiprocessor leave registers enough that none is spilled
template <Divergence kind>
__global__ void __launch_bounds__(kThreads, 6)
    full_rows(const __grid_constant__ DistillArguments arguments, DistillAligned aligned) {
  __shared__ Shares room[kWarps];
  DeviceBlock block;
  full_row<kind>(block, arguments, aligned, blockIdx.x, room);
}

// with the registers of half the blocks that a multiprocessor can hold none is spilled
__global__ void __launch_bounds__(kThreads, 4)
    top_k_rows(const __grid_constant__ TopKArguments arguments, bool aligned) {
  __shared__ TopKRoom room;
  DeviceBlock block;
  TopKRow<DeviceBlock>{block, arguments, aligned, blockIdx.x, room}.run();
}

void check(cudaError_t error, const char* name) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA, in ") + name + ": " + cudaGetErrorString(error));
}

template <class Kernel, class... Arguments>
void launch(const char* name, Kernel kernel, Index n, Place place, const Arguments&... arguments) {
  if (n == 0) return;
  check(cudaSetDevice(place.device), name);
  kernel<<<static_cast<unsigned>(n), kThreads, 0, static_cast<cudaStream_t>(place.stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace

void finish(const FinishArguments& arguments, Index n, Place place) {
  launch("finish", finish_rows, n, place, arguments, is_aligned(arguments.logits));
}

void statistics(const StatisticsArguments& arguments, Place place) {
  launch("statistics", statistics_rows, arguments.n, place, arguments, is_aligned(arguments.logits));
}

void distill(const DistillArguments& arguments, Place place) {
  const DistillAligned aligned = alignment_of(arguments);
  if (arguments.teacher.data == nullptr) return launch("distill", sparse_rows, arguments.n, place, arguments, aligned);
  rows::with_divergence(arguments.divergence, [&]<Divergence kind>() {
    launch("distill", full_rows<kind>, arguments.n, place, arguments, aligned);
  });
}

void logprobs(const LogprobsArguments& arguments, Index n, Place place) {
  launch("logprobs", logprobs_rows, n, place, arguments, is_aligned(arguments.logits));
}

void top_k(const TopKArguments& arguments, Index n, Place place) {
  launch("top_k", top_k_rows, n, place, arguments, is_aligned(arguments.logits));
}

}  // namespace bbopd::cuda
