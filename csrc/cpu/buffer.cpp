#include "cpu/buffer.h"

#include <sys/mman.h>

#include <list>
#include <mutex>
#include <new>

namespace bbopd::cpu {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;
constexpr int kKeptUses =
    256;  // a block that so many later requests had no use for goes back to the system; a call makes some 20

struct Block {
  void* data;
  std::size_t bytes;
  int passed_over;
};

// Blocks that nobody holds. Never destroyed, as tensors may outlive the end of the program.
struct Pool {
  std::mutex mutex;
  std::list<Block> free;
};

Pool& pool() {
  static Pool* const shared = new Pool;
  return *shared;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)

// From the heap, to the byte, so that AddressSanitizer sees what lies beyond.
Buffer::Buffer(std::size_t bytes) : bytes_(bytes) {
  if (bytes != 0) data_ = ::operator new(bytes, std::align_val_t{64});
}

Buffer::~Buffer() { ::operator delete(data_, std::align_val_t{64}); }

#else

Buffer::Buffer(std::size_t bytes) {
  if (bytes == 0) return;
  const std::size_t page = bytes >= kHugePage ? kHugePage : std::size_t{1} << 12;
  bytes_ = (bytes + page - 1) / page * page;
  {
    const std::lock_guard lock(pool().mutex);
    auto& free = pool().free;
    for (auto block = free.begin(); block != free.end();) {
      if (data_ == nullptr && block->bytes >= bytes_ && block->bytes <= bytes_ + bytes_ / 8) {
        data_ = block->data;
        bytes_ = block->bytes;
        block = free.erase(block);
      } else if (++block->passed_over > kKeptUses) {
        munmap(block->data, block->bytes);
        block = free.erase(block);
      } else {
        ++block;
      }
    }
  }
  if (data_ != nullptr) return;
  // room to begin on a huge page's boundary; what is left over at both ends goes back at once
  const std::size_t reserved = page == kHugePage ? bytes_ + kHugePage : bytes_;
  void* const raw = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(raw);
  char* const aligned = begin + (page - reinterpret_cast<std::size_t>(begin) % page) % page;
  if (aligned != begin) munmap(begin, static_cast<std::size_t>(aligned - begin));
  const std::size_t behind = static_cast<std::size_t>(begin + reserved - (aligned + bytes_));
  if (behind != 0) munmap(aligned + bytes_, behind);
  if (page == kHugePage) madvise(aligned, bytes_, MADV_HUGEPAGE);
  data_ = aligned;
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  const std::lock_guard lock(pool().mutex);
  pool().free.push_back({data_, bytes_, 0});
}

#endif

void Buffer::release_unused() {
  const std::lock_guard lock(pool().mutex);
  for (const Block& block : pool().free) munmap(block.data, block.bytes);
  pool().free.clear();
}

}  // namespace bbopd::cpu
