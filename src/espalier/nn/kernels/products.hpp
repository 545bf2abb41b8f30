// Products of small matrices that stay in the first caches: the right factor's columns in vectors, the left one's
// numbers broadcast, so that the left factor may be transposed for nothing.

#pragma once

#include "vectors.hpp"

namespace {

constexpr int kRows = 6;  // rows times kPair vectors of sums fill the registers

template <class T> constexpr int64_t padded(int64_t n) { return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>; }

// Which terms of Σ_k a(i, k) b(k, j) are not zero, and which entries (i, j) are wanted.
enum class Terms { all, k_up_to_i, k_from_i, k_up_to_j, k_from_j, all_where_i_up_to_j };

template <class T> struct Left {
  const T* at;
  int64_t row_step, k_step;
};

// out = keep · out + rows(i) · columns(j) · sum; a null pointer stands for ones.
template <class T> struct Result {
  T* at;
  int64_t step;
  T keep = 0;
  const T* rows = nullptr;
  const T* columns = nullptr;
};

template <class T, int M>
inline void tile(Left<T> a, const T* b, int64_t b_step, int64_t i, int64_t j, int64_t from, int64_t to, Result<T> out) {
  constexpr int64_t V = kLanes<T>;
  Vec<T> sums[M][kPair] = {};
  const T* left = a.at + i * a.row_step + from * a.k_step;
  const T* right = b + from * b_step + j;
  for (int64_t k = from; k < to; k++, left += a.k_step, right += b_step) {
    const Vec<T> low = load(right), high = load(right + V);
    for (int r = 0; r < M; r++) {
      const Vec<T> factor = splat(left[r * a.row_step]);
      sums[r][0] += factor * low;
      sums[r][1] += factor * high;
    }
  }
  for (int r = 0; r < M; r++)
    for (int p = 0; p < kPair; p++) {
      T* at = out.at + (i + r) * out.step + j + p * V;
      Vec<T> sum = sums[r][p];
      if (out.rows) sum *= splat(out.rows[i + r]);
      if (out.columns) sum *= load(out.columns + j + p * V);
      if (out.keep != T(0)) sum += splat(out.keep) * load(at);
      store(at, sum);
    }
}

// The product of a (m × depth) and b (depth × n), n a multiple of kWidth.
template <class T>
void multiply(int64_t m, int64_t n, int64_t depth, Left<T> a, const T* b, int64_t b_step, Result<T> out,
              Terms terms = Terms::all) {
  for (int64_t j = 0; j < n; j += kWidth<T>)
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, m - i);
      int64_t from = 0, to = depth;
      if (terms == Terms::all_where_i_up_to_j && i >= j + kWidth<T>) break;
      if (terms == Terms::k_up_to_i) to = std::min(to, i + rows);
      if (terms == Terms::k_from_i) from = i;
      if (terms == Terms::k_up_to_j) to = std::min(to, j + kWidth<T>);
      if (terms == Terms::k_from_j) from = std::min(to, j);
      switch (rows) {
        case 1: tile<T, 1>(a, b, b_step, i, j, from, to, out); break;
        case 2: tile<T, 2>(a, b, b_step, i, j, from, to, out); break;
        case 3: tile<T, 3>(a, b, b_step, i, j, from, to, out); break;
        case 4: tile<T, 4>(a, b, b_step, i, j, from, to, out); break;
        case 5: tile<T, 5>(a, b, b_step, i, j, from, to, out); break;
        default: tile<T, kRows>(a, b, b_step, i, j, from, to, out);
      }
    }
}

// to (n × m) = the transpose of from (m × n).
template <class T>
void transpose(T* to, int64_t to_step, const T* from, int64_t from_step, int64_t m, int64_t n) {
  constexpr int64_t side = 8;
  for (int64_t i = 0; i < m; i += side)
    for (int64_t j = 0; j < n; j += side)
      for (int64_t u = j; u < std::min(j + side, n); u++)
        for (int64_t r = i; r < std::min(i + side, m); r++) to[u * to_step + r] = from[r * from_step + u];
}

// Copy a (m × n) matrix into rows of `to_step`, and what lies past n stays as it is.
template <class T>
void copy_rows(T* to, int64_t to_step, const T* from, int64_t from_step, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; i++) std::memcpy(to + i * to_step, from + i * from_step, size_t(n) * sizeof(T));
}

}  // namespace
