// The real discrete Fourier transform of images over one to three axes, and its transpose, for CPUs.
//
// Columns (one channel of one image each) are taken 16 floats at a time through all axes before anything is written, so
// memory is read once and written once, whichever of (*S, N) and (N, *S) the images lie in. Every axis is folded into
// its even and odd parts, which halves the cosine and sine matrices that are left in both directions.

#include "spectral.hpp"

namespace {

// One axis of n points: cosines (n/2 + 1)², sines ((n−1)/2)², packed as (rows/6, columns, 6) with zeros past the end.
template <class T> struct Axis {
  int64_t n, before, after;
  const T *cos, *sin;
  int64_t even() const { return n / 2 + 1; }
  int64_t odd() const { return (n - 1) / 2; }
};

struct Shape {
  int64_t lead, width, rows, columns, columns_first;  // axes before the last; its points; product of the others'; N
  int64_t size[2], channels;
};

template <class T> inline void copy(T* to, const T* from) {
  store(to, load(from));
  store(to + kLanes<T>, load(from + kLanes<T>));
}

template <class T> inline void scale(T* to, const T* from, T weight, int64_t count) {
  constexpr int L = kLanes<T>;
  if (count < kWidth<T>) {
    for (int64_t i = 0; i < count; i++) to[i] = weight * from[i];
    return;
  }
  store(to, weight * load(from));
  store(to + L, weight * load(from + L));
}

// out (rows, at `step`) = table (rows, columns) · in (columns), each element kWidth lanes wide.
template <class T, int M> void mix_tile(const T* table, int64_t columns, const T* in, T* out, int64_t step) {
  constexpr int L = kLanes<T>;
  Vec<T> left[M], right[M];
#pragma GCC unroll 6
  for (int i = 0; i < M; i++) left[i] = right[i] = Vec<T>{};
  for (int64_t p = 0; p < columns; p++, table += kRows, in += kWidth<T>) {
    const Vec<T> a = load(in), b = load(in + L);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
      left[i] += table[i] * a;
      right[i] += table[i] * b;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; i++) {
    store(out + i * step, left[i]);
    store(out + i * step + L, right[i]);
  }
}
template <class T> void mix(const T* table, int64_t size, const T* in, T* out, int64_t step) {
  for (int64_t first = 0; first < size; first += kRows, table += kRows * size, out += kRows * step) switch (size - first) {
      case 1: mix_tile<T, 1>(table, size, in, out, step); break;
      case 2: mix_tile<T, 2>(table, size, in, out, step); break;
      case 3: mix_tile<T, 3>(table, size, in, out, step); break;
      case 4: mix_tile<T, 4>(table, size, in, out, step); break;
      case 5: mix_tile<T, 5>(table, size, in, out, step); break;
      default: mix_tile<T, 6>(table, size, in, out, step);
    }
}

// even_t = x_t + x_{n−t} (t ≤ n/2, the fixed points alone), odd_t = x_t − x_{n−t} (0 < t < n/2).
template <class T> void fold(const T* x, int64_t step, int64_t n, T* even, T* odd) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  copy(even, x);
  for (int64_t t = 1; t <= (n - 1) / 2; t++)
    for (int lane = 0; lane < W; lane += L) {
      const Vec<T> a = load(x + t * step + lane), b = load(x + (n - t) * step + lane);
      store(even + t * W + lane, a + b);
      store(odd + (t - 1) * W + lane, a - b);
    }
  if (n % 2 == 0 && n > 1) copy(even + n / 2 * W, x + n / 2 * step);
}
// x_t = even_t + odd_t, x_{n−t} = even_t − odd_t: the transpose of `fold`.
template <class T> void unfold(const T* even, const T* odd, T* x, int64_t step, int64_t n) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  copy(x, even);
  for (int64_t t = 1; t <= (n - 1) / 2; t++)
    for (int lane = 0; lane < W; lane += L) {
      const Vec<T> a = load(even + t * W + lane), b = load(odd + (t - 1) * W + lane);
      store(x + t * step + lane, a + b);
      store(x + (n - t) * step + lane, a - b);
    }
  if (n % 2 == 0 && n > 1) copy(x + n / 2 * step, even + n / 2 * W);
}

// Mix one complex axis of the planes in place by e^(−iθ), or by its conjugate.
template <class T> void mix_axis(T* re, T* im, const Axis<T>& axis, bool conjugate, T* work) {
  constexpr int W = kWidth<T>;
  const int64_t even = axis.even(), odd = axis.odd(), part = (axis.n / 2 + 1) * W, step = axis.after * W;
  T *e = work, *o = e + part, *cos_re = o + part, *sin_re = cos_re + part, *cos_im = sin_re + part;
  T* sin_im = cos_im + part;
  for (int64_t b = 0; b < axis.before; b++)
    for (int64_t a = 0; a < axis.after; a++) {
      const int64_t at = (b * axis.n * axis.after + a) * W;
      fold(re + at, step, axis.n, e, o);
      mix(axis.cos, even, e, cos_re, W);
      mix(axis.sin, odd, o, sin_re, W);
      fold(im + at, step, axis.n, e, o);
      mix(axis.cos, even, e, cos_im, W);
      mix(axis.sin, odd, o, sin_im, W);
      // Times e^(−iθ): the real part gains sin·im, the imaginary part loses sin·re; both are odd in the frequency.
      const T sign = conjugate ? T(-1) : T(1);
      for (int64_t i = 0; i < odd * W; i += kLanes<T>) {
        store(sin_im + i, sign * load(sin_im + i));
        store(sin_re + i, -sign * load(sin_re + i));
      }
      unfold(cos_re, sin_im, re + at, step, axis.n);
      unfold(cos_im, sin_re, im + at, step, axis.n);
    }
}

// Read or write `count` ≤ kWidth columns of one row of pixels, as (width, kWidth).
template <class T> void read_row(const Shape& s, const T* x, int64_t row, int64_t column, int64_t count, T* to) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  const int64_t pixels = s.rows * s.width, first = row * s.width;
  const int64_t step = s.columns_first ? 1 : s.columns, across = s.columns_first ? pixels : 1;
  const T* from = x + first * step + column * across;
  int64_t done = 0;
  if (count == W && !s.columns_first)
    for (; done < s.width; done++) copy(to + done * W, from + done * step);
  else if (count == W)
    for (; done + L <= s.width; done += L)
      for (int half = 0; half < W; half += L) {
        Vec<T> v[L];
#pragma GCC unroll 8
        for (int i = 0; i < L; i++) v[i] = load(from + (half + i) * across + done);
        transpose(v);
#pragma GCC unroll 8
        for (int i = 0; i < L; i++) store(to + (done + i) * W + half, v[i]);
      }
  for (int64_t t = done; t < s.width; t++)
    for (int64_t i = 0; i < W; i++) to[t * W + i] = i < count ? from[t * step + i * across] : T(0);
}
template <class T> void write_row(const Shape& s, T* x, int64_t row, int64_t column, int64_t count, const T* from) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  const int64_t pixels = s.rows * s.width, first = row * s.width;
  const int64_t step = s.columns_first ? 1 : s.columns, across = s.columns_first ? pixels : 1;
  T* to = x + first * step + column * across;
  int64_t done = 0;
  if (count == W && !s.columns_first)
    for (; done < s.width; done++) copy(to + done * step, from + done * W);
  else if (count == W)
    for (; done + L <= s.width; done += L)
      for (int half = 0; half < W; half += L) {
        Vec<T> v[L];
#pragma GCC unroll 8
        for (int i = 0; i < L; i++) v[i] = load(from + (done + i) * W + half);
        transpose(v);
#pragma GCC unroll 8
        for (int i = 0; i < L; i++) store(to + (half + i) * across + done, v[i]);
      }
  for (int64_t t = done; t < s.width; t++)
    for (int64_t i = 0; i < count; i++) to[t * step + i * across] = from[t * W + i];
}

// The axes from the tables, which follow each other: cosines and sines of the last axis, then of the others in order.
// Returns what stands behind them, the weights of the frequencies, 0 for those that are left out.
template <class T> const T* axes(const Shape& s, const T* tables, Axis<T>* out) {
  const auto packed = [](int64_t size) { return (size + kRows - 1) / kRows * kRows * size; };
  const auto make = [&](int64_t n, int64_t before, int64_t after) {
    const T *cos = tables, *sin = cos + packed(n / 2 + 1);
    tables = sin + packed((n - 1) / 2);
    return Axis<T>{n, before, after, cos, sin};
  };
  const int64_t half = s.width / 2 + 1;
  out[0] = make(s.width, s.rows, 1);
  if (s.lead > 0) out[1] = make(s.size[0], 1, s.rows / s.size[0] * half);
  if (s.lead > 1) out[2] = make(s.size[1], s.size[0], half);
  return tables;
}

template <class T> struct Block {
  explicit Block(const Shape& s)
      : half(s.width / 2 + 1),
        plane(s.rows * half * kWidth<T>),
        longest(std::max({s.width, s.lead > 0 ? s.size[0] : 1, s.lead > 1 ? s.size[1] : 1})),
        memory(2 * plane + (s.width + 6 * (longest / 2 + 1)) * kWidth<T>),
        re(memory.data()), im(re + plane), row(im + plane), work(row + s.width * kWidth<T>) {}
  int64_t half, plane, longest;
  Scratch<T> memory;
  T *re, *im, *row, *work;
};

template <class T> void analyse(const T* x, const T* tables, T* out_re, T* out_im, const Shape& s, int threads) {
  constexpr int W = kWidth<T>;
  Axis<T> axis[3];
  const T* weights = axes(s, tables, axis);
  const int64_t even = axis[0].even(), odd = axis[0].odd();
#pragma omp parallel num_threads(threads)
  {
    Block<T> block(s);
    T *e = block.work, *o = e + even * W;
#pragma omp for schedule(static)
    for (int64_t column = 0; column < s.columns; column += W) {
      const int64_t count = std::min<int64_t>(W, s.columns - column);
      for (int64_t row = 0; row < s.rows; row++) {
        T *re = block.re + row * block.half * W, *im = block.im + row * block.half * W;
        read_row(s, x, row, column, count, block.row);
        fold(block.row, W, s.width, e, o);
        mix(axis[0].cos, even, e, re, W);
        mix(axis[0].sin, odd, o, im + W, W);
        for (int64_t i = 0; i < odd * W; i++) im[W + i] = -im[W + i];
        std::fill(im, im + W, T(0));
        if (s.width % 2 == 0) std::fill(im + s.width / 2 * W, im + block.half * W, T(0));
      }
      for (int64_t a = s.lead; a > 0; a--) mix_axis(block.re, block.im, axis[a], false, block.work);
      for (int plane = 0; plane < 2; plane++) {
        const T* from = plane ? block.im : block.re;
        T* to = (plane ? out_im : out_re) + column;
        for (int64_t f = 0; f < s.rows * block.half; f++, from += W) {
          if (weights[f] == T(0)) continue;
          scale(to, from, weights[f], count);
          to += s.columns;
        }
      }
    }
  }
}

template <class T>
void synthesise(const T* in_re, const T* in_im, const T* tables, const T* bias, T* x, const Shape& s, int threads) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  Axis<T> axis[3];
  const T* weights = axes(s, tables, axis);
  const int64_t even = axis[0].even(), odd = axis[0].odd();
#pragma omp parallel num_threads(threads)
  {
    Block<T> block(s);
    T *e = block.work, *o = e + even * W;
#pragma omp for schedule(static)
    for (int64_t column = 0; column < s.columns; column += W) {
      const int64_t count = std::min<int64_t>(W, s.columns - column);
      for (int plane = 0; plane < 2; plane++) {
        T* to = plane ? block.im : block.re;
        const T* from = (plane ? in_im : in_re) + column;
        for (int64_t f = 0; f < s.rows * block.half; f++, to += W) {
          if (weights[f] == T(0) || count < W) std::fill(to, to + W, T(0));
          if (weights[f] == T(0)) continue;
          scale(to, from, weights[f], count);
          from += s.columns;
        }
      }
      T shift[W] = {};
      for (int64_t i = 0; bias && i < count; i++) shift[i] = bias[(column + i) % s.channels];
      const Vec<T> low = load(shift), high = load(shift + L);
      for (int64_t a = 1; a <= s.lead; a++) mix_axis(block.re, block.im, axis[a], true, block.work);
      for (int64_t row = 0; row < s.rows; row++) {
        mix(axis[0].cos, even, block.re + row * block.half * W, e, W);
        mix(axis[0].sin, odd, block.im + (row * block.half + 1) * W, o, W);
        for (int64_t i = 0; i < odd * W; i++) o[i] = -o[i];
        for (int64_t t = 0; bias && t < even; t++) {
          store(e + t * W, load(e + t * W) + low);
          store(e + t * W + L, load(e + t * W + L) + high);
        }
        unfold(e, o, block.row, W, s.width);
        write_row(s, x, row, column, count, block.row);
      }
    }
  }
}

}  // namespace

#define ESPALIER_EXPORT(T, SUFFIX)                                                                                     \
  extern "C" void dft_analyse_##SUFFIX(const T* x, const T* tables, T* re, T* im, const int64_t* shape, int threads) { \
    Shape s;                                                                                                           \
    std::memcpy(&s, shape, sizeof s);                                                                                  \
    analyse(x, tables, re, im, s, threads);                                                                            \
  }                                                                                                                    \
  extern "C" void dft_synthesise_##SUFFIX(const T* re, const T* im, const T* tables, const T* bias, T* x,              \
                                          const int64_t* shape, int threads) {                                         \
    Shape s;                                                                                                           \
    std::memcpy(&s, shape, sizeof s);                                                                                  \
    synthesise(re, im, tables, bias, x, s, threads);                                                                   \
  }

ESPALIER_EXPORT(float, f32)
ESPALIER_EXPORT(double, f64)
