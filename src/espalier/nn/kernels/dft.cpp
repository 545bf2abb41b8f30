// The real discrete Fourier transform of images over one to three axes, and its transpose, for CPUs.
//
// Columns (one channel of one image each) are taken in blocks of 16 floats through all axes before anything is written,
// so memory is read once and written once, whichever of (*S, N) and (N, *S) the images lie in. Every axis is folded into
// its even and odd parts, which halves the cosine and sine matrices that are left in both directions.

#include "spectral.hpp"

namespace {

constexpr int64_t kTogether = 288 << 10;  // bytes of blocks that stay in the second cache
constexpr int64_t kAhead = 8;             // rows between a call for memory and its use

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

// Columns that lie one behind the other, `count` ≤ kWidth images of one channel, to one block (pixels, kWidth).
template <class T> void read_columns(const T* from, int64_t pixels, int64_t count, T* to) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  int64_t done = 0;
  for (; count == W && done + L <= pixels; done += L)
    for (int half = 0; half < W; half += L) {
      Vec<T> v[L];
#pragma GCC unroll 8
      for (int i = 0; i < L; i++) v[i] = load(from + (half + i) * pixels + done);
      transpose(v);
#pragma GCC unroll 8
      for (int i = 0; i < L; i++) store(to + (done + i) * W + half, v[i]);
    }
  for (; done < pixels; done++)
    for (int64_t i = 0; i < W; i++) to[done * W + i] = i < count ? from[i * pixels + done] : T(0);
}
template <class T> void write_columns(const T* from, int64_t pixels, int64_t count, T* to) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  int64_t done = 0;
  for (; count == W && done + L <= pixels; done += L)
    for (int half = 0; half < W; half += L) {
      Vec<T> v[L];
#pragma GCC unroll 8
      for (int i = 0; i < L; i++) v[i] = load(from + (done + i) * W + half);
      transpose(v);
#pragma GCC unroll 8
      for (int i = 0; i < L; i++) store(to + (half + i) * pixels + done, v[i]);
    }
  for (; done < pixels; done++)
    for (int64_t i = 0; i < count; i++) to[i * pixels + done] = from[done * W + i];
}

// Rows of `count` numbers, `step` apart, times their weights, to blocks (rows, kWidth) that lie `apart`, and back. Where
// the weight is 0, blocks have a row (of zeros) and memory has none. Rows are so far apart that they must be called for.
template <class T>
void read_rows(const T* from, int64_t step, int64_t rows, int64_t count, const T* weights, T* to, int64_t apart) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t row = 0; row < rows; row++, to += W) {
    const T weight = weights ? weights[row] : T(1);
    for (int64_t i = 0; i < count; i += W) {
      T* block = to + i / W * apart;
      if (weight == T(0) || count - i < W) std::fill(block, block + W, T(0));
      if (weight == T(0)) continue;
      __builtin_prefetch(from + kAhead * step + i);
      scale(block, from + i, weight, std::min(W, count - i));
    }
    if (weight != T(0)) from += step;
  }
}
template <class T>
void write_rows(const T* from, int64_t apart, int64_t rows, int64_t count, const T* weights, T* to, int64_t step) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t row = 0; row < rows; row++, from += W) {
    const T weight = weights ? weights[row] : T(1);
    if (weight == T(0)) continue;
    for (int64_t i = 0; i < count; i += W) {
      __builtin_prefetch(to + kAhead * step + i, 1);
      scale(to + i, from + i / W * apart, weight, std::min(W, count - i));
    }
    to += step;
  }
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

// Blocks that are read and written together, so that their rows fill neighbouring cache lines.
template <class T> struct Group {
  Group(const Shape& s, int threads)
      : half(s.width / 2 + 1), pixels(s.rows * s.width * kWidth<T>), plane(s.rows * half * kWidth<T>),
        longest(std::max({s.width, s.lead > 0 ? s.size[0] : 1, s.lead > 1 ? s.size[1] : 1})),
        blocks(std::clamp<int64_t>(std::min(kTogether / int64_t(sizeof(T)) / (pixels + 2 * plane),
                                            s.columns / (kWidth<T> * threads)), 1, 4)),
        memory(blocks * (pixels + 2 * plane) + 6 * (longest / 2 + 1) * kWidth<T>),
        images(memory.data()), re(images + blocks * pixels), im(re + blocks * plane), work(im + blocks * plane) {}
  int64_t columns() const { return blocks * kWidth<T>; }
  int64_t half, pixels, plane, longest, blocks;
  Scratch<T> memory;
  T *images, *re, *im, *work;
};

// One block of images to its spectrum.
template <class T> void forth(const Shape& s, const Axis<T>* axis, const T* image, T* re, T* im, T* work) {
  constexpr int W = kWidth<T>;
  const int64_t even = axis[0].even(), odd = axis[0].odd(), half = even;
  T *e = work, *o = e + even * W;
  for (int64_t row = 0; row < s.rows; row++) {
    T *to_re = re + row * half * W, *to_im = im + row * half * W;
    fold(image + row * s.width * W, W, s.width, e, o);
    mix(axis[0].cos, even, e, to_re, W);
    mix(axis[0].sin, odd, o, to_im + W, W);
    for (int64_t i = W; i < (odd + 1) * W; i++) to_im[i] = -to_im[i];
    std::fill(to_im, to_im + W, T(0));
    if (s.width % 2 == 0) std::fill(to_im + s.width / 2 * W, to_im + half * W, T(0));
  }
  for (int64_t a = s.lead; a > 0; a--) mix_axis(re, im, axis[a], false, work);
}

// The transpose of `forth`, plus the bias of each column; the spectrum is overwritten.
template <class T>
void back(const Shape& s, const Axis<T>* axis, T* re, T* im, const T* bias, int64_t column, T* image, T* work) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  const int64_t even = axis[0].even(), odd = axis[0].odd(), half = even;
  T *e = work, *o = e + even * W;
  T shift[W] = {};
  for (int64_t i = 0; bias && i < W; i++) shift[i] = bias[(column + i) % s.channels];
  const Vec<T> low = load(shift), high = load(shift + L);
  for (int64_t a = 1; a <= s.lead; a++) mix_axis(re, im, axis[a], true, work);
  for (int64_t row = 0; row < s.rows; row++) {
    mix(axis[0].cos, even, re + row * half * W, e, W);
    mix(axis[0].sin, odd, im + (row * half + 1) * W, o, W);
    for (int64_t i = 0; i < odd * W; i++) o[i] = -o[i];
    for (int64_t t = 0; bias && t < even; t++) {
      store(e + t * W, load(e + t * W) + low);
      store(e + t * W + L, load(e + t * W + L) + high);
    }
    unfold(e, o, image + row * s.width * W, W, s.width);
  }
}

template <class T> void analyse(const T* x, const T* tables, T* out_re, T* out_im, const Shape& s, int threads) {
  constexpr int64_t W = kWidth<T>;
  Axis<T> axis[3];
  const T* weights = axes(s, tables, axis);
  const int64_t pixels = s.rows * s.width, frequencies = s.rows * (s.width / 2 + 1);
#pragma omp parallel num_threads(threads)
  {
    Group<T> group(s, threads);
#pragma omp for schedule(static)
    for (int64_t column = 0; column < s.columns; column += group.columns()) {
      const int64_t count = std::min(group.columns(), s.columns - column);
      if (!s.columns_first) read_rows<T>(x + column, s.columns, pixels, count, nullptr, group.images, group.pixels);
      for (int64_t i = 0; i < count; i += W) {
        T* image = group.images + i / W * group.pixels;
        if (s.columns_first) read_columns(x + (column + i) * pixels, pixels, std::min(W, count - i), image);
        forth(s, axis, image, group.re + i / W * group.plane, group.im + i / W * group.plane, group.work);
      }
      write_rows(group.re, group.plane, frequencies, count, weights, out_re + column, s.columns);
      write_rows(group.im, group.plane, frequencies, count, weights, out_im + column, s.columns);
    }
  }
}

template <class T>
void synthesise(const T* in_re, const T* in_im, const T* tables, const T* bias, T* x, const Shape& s, int threads) {
  constexpr int64_t W = kWidth<T>;
  Axis<T> axis[3];
  const T* weights = axes(s, tables, axis);
  const int64_t pixels = s.rows * s.width, frequencies = s.rows * (s.width / 2 + 1);
#pragma omp parallel num_threads(threads)
  {
    Group<T> group(s, threads);
#pragma omp for schedule(static)
    for (int64_t column = 0; column < s.columns; column += group.columns()) {
      const int64_t count = std::min(group.columns(), s.columns - column);
      read_rows(in_re + column, s.columns, frequencies, count, weights, group.re, group.plane);
      read_rows(in_im + column, s.columns, frequencies, count, weights, group.im, group.plane);
      for (int64_t i = 0; i < count; i += W) {
        T* image = group.images + i / W * group.pixels;
        back(s, axis, group.re + i / W * group.plane, group.im + i / W * group.plane, bias, column + i, image,
             group.work);
        if (s.columns_first) write_columns(image, pixels, std::min(W, count - i), x + (column + i) * pixels);
      }
      if (!s.columns_first) write_rows<T>(group.images, group.pixels, pixels, count, nullptr, x + column, s.columns);
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
