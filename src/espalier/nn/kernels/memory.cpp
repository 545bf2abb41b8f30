// Memory for large results, kept for the next ones: a step of training frees them and asks for the same sizes again.
//
// From the C library such memory may come anew each time, zeroed at every first touch, which costs more than to fill it,
// on a virtual machine many times. Here blocks start on large pages (2 MiB), and those that are free wait for the next
// request of their size: kWarm bytes as they are, the rest lazily freed, so that the system takes their pages when it
// needs some and leaves them otherwise. Together with what is in use they are no more than was ever in use at once, or
// than kWarm. A tensor takes a block over through DLPack, whose deleter gives it back.

#include "parallel.hpp"

#if defined(__linux__)
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <list>
#include <mutex>

#ifndef MADV_FREE  // from Linux 4.5; headers may be older
#define MADV_FREE 8
#endif

namespace {

constexpr size_t kLargePage = 2 << 20, kGrain = 1 << 16, kWarm = size_t(256) << 20;

struct Block {
  void* memory;
  size_t bytes;
};

struct Waiting {
  std::list<Block> blocks;  // the one freed last is first
  size_t bytes = 0;

  void add(Block block) {
    blocks.push_front(block);
    bytes += block.bytes;
  }
  Block remove(std::list<Block>::iterator at) {
    const Block block = *at;
    bytes -= block.bytes;
    blocks.erase(at);
    return block;
  }
  Block remove_oldest() { return remove(--blocks.end()); }
  void* find(size_t wanted) {
    for (auto block = blocks.begin(); block != blocks.end(); ++block)
      if (block->bytes == wanted) return remove(block).memory;
    return nullptr;
  }
  void unmap_oldest() {
    const Block block = remove_oldest();
    munmap(block.memory, block.bytes);
  }
};

// Never destroyed: tensors may outlive static objects. Nobody waits for the lock: it stays locked for ever in a process
// that was forked while another thread held it, and then memory comes from the system and goes back to it.
struct Pool {
  std::mutex lock;
  Waiting warm, lazy;
  std::atomic<size_t> used{0};
  size_t most = kWarm;
};
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

void* from_system(size_t bytes) {
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

void* take(size_t bytes) {
  Pool& p = pool();
  const size_t used = p.used += bytes;
  {
    const std::unique_lock<std::mutex> hold(p.lock, std::try_to_lock);
    if (hold) {
      if (void* const memory = p.warm.find(bytes)) return memory;
      if (void* const memory = p.lazy.find(bytes)) return memory;
      p.most = std::max(p.most, used);
      while (p.lazy.bytes && used + p.warm.bytes + p.lazy.bytes > p.most) p.lazy.unmap_oldest();
      while (p.warm.bytes && used + p.warm.bytes > p.most) p.warm.unmap_oldest();
    }
  }
  void* const memory = from_system(bytes);
  if (!memory) p.used -= bytes;
  return memory;
}

void give_back(Block block) {
  Pool& p = pool();
  p.used -= block.bytes;
  const std::unique_lock<std::mutex> hold(p.lock, std::try_to_lock);
  if (!hold) {
    munmap(block.memory, block.bytes);
    return;
  }
  p.warm.add(block);
  while (p.warm.bytes > kWarm) {
    const Block oldest = p.warm.remove_oldest();
    if (madvise(oldest.memory, oldest.bytes, MADV_FREE))
      munmap(oldest.memory, oldest.bytes);
    else
      p.lazy.add(oldest);
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

// Everything that waits goes back to the system.
ESPALIER_API void espalier_empty_cache() {
  Pool& p = pool();
  const std::unique_lock<std::mutex> hold(p.lock, std::try_to_lock);
  for (Waiting* waiting : {&p.warm, &p.lazy})
    while (hold && waiting->bytes) waiting->unmap_oldest();
}

#else

ESPALIER_API void* espalier_new_numbers(int64_t, int64_t, int64_t) { return nullptr; }
ESPALIER_API void espalier_empty_cache() {}

#endif
