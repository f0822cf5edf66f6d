// A block of threads. Kernels are written over it as phases, so that one source runs on a GPU and, every thread of a
// block in turn, on a host (tests/cuda_emulation.cpp). Code outside a phase is the same in all threads.
//
//   block.each(body)             body(thread) in every thread, then a barrier
//   block.lanes(body)            the same without a barrier: the body touches what is its thread's own
//   block.count(condition)       how many threads satisfy condition(thread); a barrier too
//   block.barrier()              after reads of shared memory outside a phase
//   block.exchange(part, apart)  every thread's part from the lane whose number differs by the bit `apart`
//   block.add(counter, amount)   adds to a shared integer, and returns what it was; sums do not depend on the order
//   Block::PerThread<T>          a value for each thread, part[thread]
#pragma once

#if defined(__CUDACC__)
#define BBOPD_IN_BLOCK __device__ __forceinline__
#else
#define BBOPD_IN_BLOCK inline
#endif

namespace bbopd::cuda {

constexpr int kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes;

// Merges the parts of all threads, always in the same order; every thread gets the result. `room` is shared memory for
// kWarps of them.
template <class Part, class Block>
BBOPD_IN_BLOCK Part reduce(Block& block, typename Block::template PerThread<Part>& part, Part* room) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    const auto other = block.exchange(part, apart);
    block.lanes([&](int thread) { part[thread].merge(other[thread]); });
  }
  block.each([&](int thread) {
    if (thread % kLanes == 0) room[thread / kLanes] = part[thread];
  });
  Part total = room[0];
  for (int warp = 1; warp < kWarps; ++warp) total.merge(room[warp]);
  block.barrier();
  return total;
}

}  // namespace bbopd::cuda
