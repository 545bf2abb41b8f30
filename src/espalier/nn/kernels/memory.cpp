// Memory for large results, kept for the next ones: a step of training frees them and asks for the same sizes again.
//
// From the C library such memory may come anew each time, a zeroed page of 4 KiB at every first touch, which costs more
// than to fill it. Here blocks start on large pages (2 MiB), and those that are free wait for the next request of their
// size, up to kIdle bytes together. A tensor takes one over through DLPack, whose deleter gives it back.

#include "parallel.hpp"

#if defined(__linux__)
#include <sys/mman.h>

#include <cstddef>
#include <list>
#include <mutex>

namespace {

constexpr size_t kLargePage = 2 << 20, kGrain = 1 << 16, kIdle = size_t(256) << 20;

struct Block {
  void* memory;
  size_t bytes;
};

// Never destroyed: tensors may outlive static objects. Nobody waits for the lock: it stays locked for ever in a process
// that was forked while another thread held it, and then memory comes from the system and goes back to it.
struct Pool {
  std::mutex lock;
  std::list<Block> idle;  // the one freed last is first
  size_t bytes = 0;
};
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

void* take(size_t bytes) {
  Pool& p = pool();
  {
    const std::unique_lock<std::mutex> hold(p.lock, std::try_to_lock);
    for (auto block = p.idle.begin(); hold && block != p.idle.end(); ++block)
      if (block->bytes == bytes) {
        void* const memory = block->memory;
        p.bytes -= bytes;
        p.idle.erase(block);
        return memory;
      }
  }
  // A large page more than is needed, and what lies before the first border and behind the end is given back.
  void* const all = mmap(nullptr, bytes + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(all);
  const size_t before = (kLargePage - address % kLargePage) % kLargePage;
  char* const memory = static_cast<char*>(all) + before;
  if (before) munmap(all, before);
  munmap(memory + bytes, kLargePage - before);
  madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

void give_back(Block block) {
  Pool& p = pool();
  const std::unique_lock<std::mutex> hold(p.lock, std::try_to_lock);
  if (!hold) {
    munmap(block.memory, block.bytes);
    return;
  }
  p.idle.push_front(block);
  p.bytes += block.bytes;
  while (p.bytes > kIdle) {
    munmap(p.idle.back().memory, p.idle.back().bytes);
    p.bytes -= p.idle.back().bytes;
    p.idle.pop_back();
  }
}

// DLPack's structures, as its unversioned interface fixes them.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct Numbers {
  DLManagedTensor managed;
  Block block;
  int64_t count;
};

}  // namespace

// `count` numbers for DLPack, which has a code for each kind of them; null without memory.
ESPALIER_API void* espalier_new_numbers(int64_t count, int64_t code, int64_t bits) {
  const size_t bytes = (size_t(count * bits / 8) + kGrain - 1) / kGrain * kGrain;
  void* const memory = take(bytes);
  if (!memory) return nullptr;
  Numbers* const made = new Numbers{{}, {memory, bytes}, count};
  made->managed.tensor = {memory, 1, 0, 1, uint8_t(code), uint8_t(bits), 1, &made->count, nullptr, 0};
  made->managed.context = made;
  made->managed.deleter = [](DLManagedTensor* managed) {
    Numbers* const own = static_cast<Numbers*>(managed->context);
    give_back(own->block);
    delete own;
  };
  return &made->managed;
}

#else

ESPALIER_API void* espalier_new_numbers(int64_t, int64_t, int64_t) { return nullptr; }

#endif
