// How kernels share work between threads, and how they are called: what every kernel file needs of the outside.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#define ESPALIER_API extern "C" __attribute__((visibility("default")))

// GOMP_parallel of the OpenMP runtime that torch has loaded, handed over when the library is opened; null runs one
// thread. Linking a runtime of our own would keep two pools of threads that spin on each other's cores.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern Team espalier_team;

namespace {

// Pieces of work that threads take in turn, a few at a time. No result may depend on which thread takes which.
class Items {
 public:
  Items(std::atomic<int64_t>& taken, int64_t count, int64_t share) : taken_(taken), count_(count), share_(share) {}
  bool next(int64_t& item) {
    if (at_ == end_) {
      at_ = taken_.fetch_add(share_, std::memory_order_relaxed);
      end_ = std::min(at_ + share_, count_);
      if (at_ >= count_) return at_ = end_ = 0, false;
    }
    item = at_++;
    return true;
  }

 private:
  std::atomic<int64_t>& taken_;
  int64_t count_, share_, at_ = 0, end_ = 0;
};

// Call body(items) on up to `threads` threads, which together take all of `count` items. No exception may cross the
// runtime's frames: want of memory is noted there and thrown here.
template <class Body> void parallel(int64_t count, int64_t threads, Body body) {
  threads = std::min(threads, count);
  std::atomic<int64_t> taken{0};
  std::atomic<bool> failed{false};
  const int64_t share = std::max<int64_t>(1, count / (16 * std::max<int64_t>(threads, 1)));
  auto run = [&] {
    try {
      body(Items(taken, count, share));
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  using Run = decltype(run);
  if (threads > 1 && espalier_team)
    espalier_team([](void* given) { (*static_cast<Run*>(given))(); }, &run, unsigned(threads), 0);
  else
    run();
  if (failed) throw std::bad_alloc();
}

// The status of a kernel's call: 0 done, 1 the caller's structure has another size, 2 out of memory.
template <class Arguments> int call(const Arguments* arguments) {
  if (arguments->size != int64_t(sizeof(Arguments))) return 1;
  try {
    run(*arguments);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

}  // namespace

// Export run(const Arguments<T>&) for both precisions, and the size of its structure, which the loader compares.
#define ESPALIER_KERNEL(NAME, Arguments)                                                       \
  ESPALIER_API int64_t NAME##_size() { return int64_t(sizeof(Arguments<float>)); }             \
  ESPALIER_API int NAME##_f32(const Arguments<float>* arguments) { return call(arguments); }   \
  ESPALIER_API int NAME##_f64(const Arguments<double>* arguments) { return call(arguments); }
