// What the kernels of the orthogonal layers share: transposes of square blocks in registers, aligned scratch.

#pragma once

#include <memory>
#include <new>
#include <utility>

#include "vectors.hpp"

namespace {

constexpr int kRows = 6;  // rows of a register tile: 12 accumulators, 2 operands and 2 broadcasts fill 16 registers

// Exchange the off-diagonal quarters of 2·Half rows, then of the halves: log2 steps of two-row shuffles.
template <class T, int Half, int... I> inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  constexpr int L = kLanes<T>;
#if defined(__clang__)
  Vec<T> low = __builtin_shufflevector(a, b, ((I & Half) ? L + I - Half : I)...);
  Vec<T> high = __builtin_shufflevector(a, b, ((I & Half) ? L + I : I + Half)...);
#else
  typedef typename Lanes<T>::ivec ivec;
  Vec<T> low = __builtin_shuffle(a, b, ivec{((I & Half) ? L + I - Half : I)...});
  Vec<T> high = __builtin_shuffle(a, b, ivec{((I & Half) ? L + I : I + Half)...});
#endif
  a = low;
  b = high;
}
template <class T, int Half> inline void transpose_step(Vec<T> (&v)[kLanes<T>]) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes<T>; i++)
    if (!(i & Half)) exchange<T, Half>(v[i], v[i + Half], std::make_integer_sequence<int, kLanes<T>>{});
}
// Transpose a square of vectors in registers.
inline void transpose(Vec<float> (&v)[8]) {
  transpose_step<float, 4>(v);
  transpose_step<float, 2>(v);
  transpose_step<float, 1>(v);
}
inline void transpose(Vec<double> (&v)[4]) {
  transpose_step<double, 2>(v);
  transpose_step<double, 1>(v);
}

// Memory of one thread, aligned to a cache line.
template <class T> class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return memory_; }

 private:
  T* memory_;
};

}  // namespace
