// Short vectors in the compilers' own extension, so that one source serves every processor, and a fast exponential.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif

// Bytes of the last cache, as far as a core can count on it; 0 if they are unknown. Visible: tests may say less.
extern "C" __attribute__((visibility("default"))) int64_t espalier_last_cache;

namespace {

#ifndef ESPALIER_VECTOR_BYTES
#define ESPALIER_VECTOR_BYTES 32
#endif
constexpr int kBytes = ESPALIER_VECTOR_BYTES;  // one vector

template <class T> struct Lanes;
template <> struct Lanes<float> {
  typedef float vec __attribute__((vector_size(kBytes)));
  typedef int32_t ivec __attribute__((vector_size(kBytes)));
};
template <> struct Lanes<double> {
  typedef double vec __attribute__((vector_size(kBytes)));
  typedef int64_t ivec __attribute__((vector_size(kBytes)));
};
template <class T> using Vec = typename Lanes<T>::vec;
template <class T> constexpr int kLanes = kBytes / int(sizeof(T));
constexpr int kPair = 2;  // vectors a block
template <class T> constexpr int kWidth = kPair * kLanes<T>;

// Less zero, not plus zero: that leaves −0 as it is, so that compilers drop it.
template <class T> inline Vec<T> splat(T value) { return value - Vec<T>{}; }

// v within [−limit, limit]; NaN stays NaN. Compilers make two instructions of each comparison where the processor has one.
inline Vec<float> within(Vec<float> v, float limit) {
#if ESPALIER_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(limit), _mm512_max_ps(_mm512_set1_ps(-limit), (__m512)v));
#elif defined(__AVX__)
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(limit), _mm256_max_ps(_mm256_set1_ps(-limit), (__m256)v));
#else
  v = v < -limit ? splat<float>(-limit) : v;
  return v > limit ? splat<float>(limit) : v;
#endif
}

// 2^v for float: split off the nearest integer by adding 1.5·2^23, a polynomial for the rest (relative error < 2e-7).
inline Vec<float> exp2v(Vec<float> v) {
  typedef Lanes<float>::ivec ivec;
  v = within(v, 126.f);
  const Vec<float> magic = splat<float>(12582912.f);
  Vec<float> shifted = v + magic;
  Vec<float> f = v - (shifted - magic);
  Vec<float> p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  ivec exponent = ((ivec)shifted << 23) + (127 << 23);  // the integer's low bits; the magic's high bits shift out
  return p * (Vec<float>)exponent;
}
inline Vec<double> exp2v(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; i++) v[i] = std::exp2(v[i]);
  return v;
}

template <class T> inline Vec<T> load(const T* p) { Vec<T> v; std::memcpy(&v, p, kBytes); return v; }
template <class T> inline void store(T* p, Vec<T> v) { std::memcpy(p, &v, kBytes); }

// Whether a result of `bytes` at p is stored past the caches: where it and what else is under way do not fit the last
// one, it would be gone before it is read, and drive out what is needed; and a line that is written whole need not be
// read first. Only where vectors are cache lines, and rows `step` bytes apart start on one.
inline bool streams(const void* p, int64_t bytes, int64_t step) {
  const int64_t last = espalier_last_cache;
  return kBytes == 64 && last && 8 * bytes > last && reinterpret_cast<uintptr_t>(p) % 64 == 0 && step % 64 == 0;
}
template <class T> inline void stream(T* p, Vec<T> v) {
#if ESPALIER_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#else
  store(p, v);
#endif
}
// Other threads see what this one has streamed.
inline void end_streams() {
#if ESPALIER_VECTOR_BYTES == 64
  _mm_sfence();
#endif
}

// Room for n numbers, zeros at first, from the start of a cache line: a vector across two lines is slow to load, and to
// load again after it was stored.
template <class T> class Room {
  std::vector<T> memory;
  T* first;

 public:
  explicit Room(int64_t n) : memory(size_t(n) + 64 / sizeof(T)) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    first = memory.data() + (64 - address % 64) % 64 / sizeof(T);
  }
  Room(const Room&) = delete;
  operator T*() { return first; }
};

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

// Ask for the next rows of a block of channels before their turn: rows that lie far apart escape the processor's guess.
template <int64_t width, class T> inline void fetch(const T* rows, int64_t count, int64_t stride) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t w = 0; w < width; w += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows + t * stride + w);
}

constexpr double kLog2E = 1.4426950408889634;

}  // namespace
