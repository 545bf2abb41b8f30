// Blocks of channels of channels-last maps: one vector a block, in the widest registers there are, whatever the maps are
// stored as.

#pragma once

#ifdef __AVX512F__
#define ESPALIER_VECTOR_BYTES 64
#endif
#include "parallel.hpp"
#include "vectors.hpp"

namespace {

struct bfloat16 { uint16_t bits; };

// What sums and products are made in.
template <class S> struct Compute { using type = S; };
template <> struct Compute<bfloat16> { using type = float; };
template <class S> using Sum = typename Compute<S>::type;

template <class S> inline Vec<S> read(const S* from) { return load(from); }
template <class S> inline void write(S* to, Vec<S> v) { store(to, v); }

typedef uint16_t halves __attribute__((vector_size(kBytes / 2)));
typedef uint32_t words __attribute__((vector_size(kBytes)));

inline Vec<float> read(const bfloat16* from) {
  halves h;
  std::memcpy(&h, from, sizeof h);
  return (Vec<float>)(__builtin_convertvector(h, words) << 16);
}
// The bits of bfloat16 numbers: to the nearest, ties to even; a NaN stays one.
inline words narrowed(Vec<float> v) {
  const words bits = (words)v;
  return v == v ? (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16 : (bits >> 16 | 0x40u);
}
inline void write(bfloat16* to, Vec<float> v) {
#ifdef __AVX512BF16__
  const halves h = (halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const halves h = __builtin_convertvector(narrowed(v), halves);
#endif
  std::memcpy(to, &h, sizeof h);
}
// v as S would keep it.
template <class S> inline Vec<Sum<S>> rounded(Vec<Sum<S>> v) {
  if constexpr (std::is_same_v<S, bfloat16>) return (Vec<float>)(narrowed(v) << 16);
  return v;
}

// The first `count` lanes; the others read as zero and are not written.
template <class S> inline Vec<Sum<S>> read(const S* from, int64_t count) {
  if (count >= kLanes<Sum<S>>) return read(from);
  S part[kLanes<Sum<S>>] = {};
  std::memcpy(part, from, size_t(count) * sizeof(S));
  return read(part);
}
template <class S> inline void write(S* to, Vec<Sum<S>> v, int64_t count) {
  if (count >= kLanes<Sum<S>>) return write(to, v);
  S part[kLanes<Sum<S>>];
  write(part, v);
  std::memcpy(to, part, size_t(count) * sizeof(S));
}

}  // namespace
