// What the kernels of the orthogonal layers share: transposes of square blocks in registers.

#pragma once

#include <array>
#include <utility>

#include "vectors.hpp"

namespace {

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
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; i++)
    if (!(i & Half)) exchange<T, Half>(v[i], v[i + Half], std::make_integer_sequence<int, kLanes<T>>{});
}
// Transpose a square of vectors in registers.
template <class T, int Half = kLanes<T> / 2> inline void transpose(Vec<T> (&v)[kLanes<T>]) {
  transpose_step<T, Half>(v);
  if constexpr (Half > 1) transpose<T, Half / 2>(v);
}

}  // namespace
