// The real discrete Fourier transform of images over one to three axes, and its transpose, for CPUs.
//
// Columns (one channel of one image each) are taken in blocks of two vectors through all axes before anything is
// written, so memory is read once and written once, whichever of (*S, N) and (N, *S) the images lie in. The first vector
// of a block holds real parts and the second imaginary parts of one complex image: with Z its transform, theirs are
// (Z_f + conj Z_−f)/2 and (Z_f − conj Z_−f)/2i. That rounds each by the size of both, so columns are paired within one
// example only; where channels do not come in whole blocks, a block is one vector of columns and zeros. Axes are halved
// while they are even, the last 16 points in registers; an odd number takes matrices of cosines and sines, halved by
// symmetry.

#ifdef __AVX512F__
#define ESPALIER_VECTOR_BYTES 64
#endif
#include "parallel.hpp"
#include "spectral.hpp"

namespace {

constexpr int kRows = 6;                  // of a tile of `mix`: 12 sums, 2 operands and 2 broadcasts fill 16 registers
constexpr int64_t kTogether = 288 << 10;  // bytes of blocks that stay in the second cache
constexpr int64_t kAhead = 8;             // rows between a call for memory and its use

// One axis of n = 2^a·odd points: e^(−2πik/n) for k < n/2, and for an odd part above 1 the cosines (odd/2 + 1)² and
// sines (odd/2)², packed as (rows/6, columns, 6) with zeros past the end.
template <class T> struct Axis {
  int64_t n, before, after, odd;
  const T *root_cos, *root_sin, *cos, *sin;
};

struct Shape {
  int64_t lead, width, rows, columns, columns_first;  // axes before the last; its points; product of the others'; N
  int64_t size[2], channels, together;  // a bias is one number per channel; columns from one example come in these
  template <class T> int64_t lanes() const { return together % kWidth<T> ? kLanes<T> : kWidth<T>; }
};

// `count` ≤ kWidth numbers and zeros.
template <class T> inline void load_pair(const T* from, Vec<T> (&to)[2], int64_t count) {
  constexpr int L = kLanes<T>;
  to[0] = count >= L ? load(from) : Vec<T>{};
  to[1] = count == 2 * L ? load(from + L) : Vec<T>{};
  for (int64_t i = count / L * L; i < count; i++) to[i / L][i % L] = from[i];
}
template <class T> inline void store_pair(T* to, Vec<T> low, Vec<T> high, int64_t count, bool past = false) {
  constexpr int L = kLanes<T>;
  if (past && count % L == 0) {
    stream(to, low);
    if (count == 2 * L) stream(to + L, high);
    return;
  }
  if (count >= L) store(to, low);
  if (count == 2 * L) store(to + L, high);
  for (int64_t i = count / L * L; i < count; i++) to[i] = i < L ? low[i] : high[i - L];
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

// The transform of `odd` points by matrices: even and odd parts, real and imaginary ones side by side.
template <class T>
void odd_points(const Axis<T>& axis, const T* in, int64_t in_step, T* out, int64_t out_step, T* work) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  const int64_t n = axis.odd, half = n / 2;
  T *even = work, *odd = even + (half + 1) * W, *cos = odd + half * W, *sin = cos + (half + 1) * W;
  store_pair(even, load(in), load(in + L), W);
  for (int64_t t = 1; t <= half; t++)
    for (int lane = 0; lane < W; lane += L) {
      const Vec<T> a = load(in + t * in_step + lane), b = load(in + (n - t) * in_step + lane);
      store(even + t * W + lane, a + b);
      store(odd + (t - 1) * W + lane, a - b);
    }
  mix(axis.cos, half + 1, even, cos, W);
  mix(axis.sin, half, odd, sin, W);
  store_pair(out, load(cos), load(cos + L), W);
  for (int64_t f = 1; f <= half; f++, sin += W) {
    const Vec<T> re = load(cos + f * W), im = load(cos + f * W + L), sin_re = load(sin), sin_im = load(sin + L);
    T *here = out + f * out_step, *mirror = out + (n - f) * out_step;
    store(here, re + sin_im);
    store(here + L, im - sin_re);
    store(mirror, re - sin_im);
    store(mirror + L, im + sin_re);
  }
}

// Halve N points until one is left: X_2g is the transform of z_t + z_{t+N/2}, and X_2g+1 that of
// (z_t − z_{t+N/2})·e^(−iθ_t).
template <class T, int N>
inline void butterflies(Vec<T>* re, Vec<T>* im, const T* cos, const T* sin, int64_t skip) {
  if constexpr (N > 1) {
    constexpr int half = N / 2;
#pragma GCC unroll 16
    for (int t = 0; t < half; t++) {
      const Vec<T> d_re = re[t] - re[t + half], d_im = im[t] - im[t + half];
      re[t] += re[t + half];
      im[t] += im[t + half];
      if (t == 0 || 2 * t == half) {
        re[t + half] = t ? d_im : d_re;
        im[t + half] = t ? -d_re : d_im;
      } else {
        const T c = cos[t * skip], s = sin[t * skip];
        re[t + half] = c * d_re + s * d_im;
        im[t + half] = c * d_im - s * d_re;
      }
    }
    butterflies<T, half>(re, im, cos, sin, 2 * skip);
    butterflies<T, half>(re + half, im + half, cos, sin, 2 * skip);
  }
}
constexpr int reversed(int bits, int n) { return n == 1 ? 0 : bits % 2 * (n / 2) + reversed(bits / 2, n / 2); }

template <class T, int N>
void in_registers(const Axis<T>& axis, int64_t skip, const T* in, int64_t in_step, T* out, int64_t out_step) {
  Vec<T> re[N], im[N];
#pragma GCC unroll 16
  for (int t = 0; t < N; t++) {
    re[t] = load(in + t * in_step);
    im[t] = load(in + t * in_step + kLanes<T>);
  }
  butterflies<T, N>(re, im, axis.root_cos, axis.root_sin, skip);
#pragma GCC unroll 16
  for (int f = 0; f < N; f++) {
    store(out + f * out_step, re[reversed(f, N)]);
    store(out + f * out_step + kLanes<T>, im[reversed(f, N)]);
  }
}

// n = axis.n / skip points, each a block's row of real and imaginary parts; `out` may be `in`.
template <class T>
void line(const Axis<T>& axis, int64_t skip, const T* in, int64_t in_step, T* out, int64_t out_step, T* work) {
  constexpr int64_t W = kWidth<T>, L = kLanes<T>;
  const int64_t n = axis.n / skip, half = n / 2;
  if (axis.odd == 1 && n == 2) return in_registers<T, 2>(axis, skip, in, in_step, out, out_step);
  if (axis.odd == 1 && n == 4) return in_registers<T, 4>(axis, skip, in, in_step, out, out_step);
  if (axis.odd == 1 && n == 8) return in_registers<T, 8>(axis, skip, in, in_step, out, out_step);
  if (axis.odd == 1 && n == 16) return in_registers<T, 16>(axis, skip, in, in_step, out, out_step);
  if (n == axis.odd) return odd_points(axis, in, in_step, out, out_step, work);
  T *even = work, *odd = work + half * W;
  for (int64_t t = 0; t < half; t++) {
    const T *a = in + t * in_step, *b = a + half * in_step;
    const T c = axis.root_cos[t * skip], s = axis.root_sin[t * skip];
    const Vec<T> re = load(a) - load(b), im = load(a + L) - load(b + L);
    store(even + t * W, load(a) + load(b));
    store(even + t * W + L, load(a + L) + load(b + L));
    store(odd + t * W, c * re + s * im);
    store(odd + t * W + L, c * im - s * re);
  }
  line(axis, 2 * skip, even, W, out, 2 * out_step, work + n * W);
  line(axis, 2 * skip, odd, W, out + out_step, 2 * out_step, work + n * W);
}

// All axes of one block of complex images (pixels, kWidth), in place.
template <class T> void transform(const Shape& s, const Axis<T>* axis, T* block, T* work) {
  for (int64_t a = s.lead; a >= 0; a--) {
    const Axis<T>& here = axis[a];
    const int64_t step = here.after * kWidth<T>;
    for (int64_t i = 0; here.n > 1 && i < here.before * here.after; i++) {
      T* first = block + (i / here.after * here.n * here.after + i % here.after) * kWidth<T>;
      line<T>(here, 1, first, step, first, step, work);
    }
  }
}

// Columns that lie one behind the other, `count` ≤ kWidth images of one channel, to one block (pixels, kWidth).
template <class T> void read_columns(const T* from, int64_t pixels, int64_t count, T* to) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  int64_t done = 0;
  for (; count % L == 0 && done + L <= pixels; done += L)
    for (int half = 0; half < W; half += L) {
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) {
        v[i] = half < count ? load(from + (half + i) * pixels + done) : Vec<T>{};
        __builtin_prefetch(from + (count + half + i) * pixels + done, 0, 2);  // of the next block
      }
      transpose<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) store(to + (done + i) * W + half, v[i]);
    }
  for (; done < pixels; done++)
    for (int64_t i = 0; i < W; i++) to[done * W + i] = i < count ? from[i * pixels + done] : T(0);
}
template <class T> void write_columns(const T* from, int64_t pixels, int64_t count, T* to, bool past) {
  constexpr int W = kWidth<T>, L = kLanes<T>;
  int64_t done = 0;
  for (; count % L == 0 && done + L <= pixels; done += L)
    for (int64_t half = 0; half < count; half += L) {
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) v[i] = load(from + (done + i) * W + half);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) {
        T* line = to + (half + i) * pixels + done;
        past ? stream(line, v[i]) : store(line, v[i]);
      }
    }
  for (; done < pixels; done++)
    for (int64_t i = 0; i < count; i++) to[i * pixels + done] = from[done * W + i];
}

// Rows of `count` numbers of the images (pixels, N) to blocks (pixels, kWidth) that lie `apart`, and back. Rows are so
// far apart that they must be called for.
template <class T> void read_rows(const Shape& s, const T* from, int64_t count, T* to, int64_t apart) {
  constexpr int64_t W = kWidth<T>, L = kLanes<T>;
  const int64_t lanes = s.lanes<T>();
  for (int64_t row = 0; row < s.rows * s.width; row++, from += s.columns, to += W) {
    T* block = to;
    for (int64_t i = 0; i < count; i += lanes, block += apart) {
      __builtin_prefetch(from + kAhead * s.columns + i);
      Vec<T> v[2];
      load_pair(from + i, v, std::min(lanes, count - i));
      store(block, v[0]);
      store(block + L, v[1]);
    }
  }
}
template <class T> void write_rows(const Shape& s, const T* from, int64_t apart, int64_t count, T* to, bool past) {
  constexpr int64_t W = kWidth<T>, L = kLanes<T>;
  const int64_t lanes = s.lanes<T>();
  for (int64_t row = 0; row < s.rows * s.width; row++, from += W, to += s.columns) {
    const T* block = from;
    for (int64_t i = 0; i < count; i += lanes, block += apart) {
      if (!past) __builtin_prefetch(to + kAhead * s.columns + i, 1);
      store_pair(to + i, load(block), load(block + L), std::min(lanes, count - i), past);
    }
  }
}

// Call `visit(row of the planes, pixel of f, pixel of −f, weight)` for every frequency that is kept.
template <class T, class Visit> inline void each_frequency(const Shape& s, const T* weights, Visit visit) {
  const int64_t n = s.lead > 1 ? s.size[1] : s.rows;
  for (int64_t row = 0, kept = 0; row < s.rows; row++) {
    const int64_t slab = row / n, image = (s.rows / n - slab) % (s.rows / n) * n + (n - row % n) % n;
    for (int64_t f = 0; f <= s.width / 2; f++, weights++)
      if (*weights != T(0)) visit(kept++, row * s.width + f, image * s.width + (s.width - f) % s.width, *weights);
  }
}

// The transforms of `count` columns from those of their blocks, and back (f and −f exchanged: `transform` inverts it).
template <class T>
void separate(const Shape& s, const T* weights, const T* blocks, int64_t apart, int64_t count, T* out_re, T* out_im) {
  constexpr int64_t W = kWidth<T>, L = kLanes<T>;
  const int64_t step = s.columns * int64_t(sizeof(T)), bytes = s.rows * (s.width / 2 + 1) * step;
  const bool past = streams(out_re, bytes, step) && streams(out_im, bytes, step);
  const int64_t lanes = s.lanes<T>();
  each_frequency(s, weights, [&](int64_t kept, int64_t pixel, int64_t mirror, T weight) {
    T *to_re = out_re + kept * s.columns, *to_im = out_im + kept * s.columns;
    const T *here = blocks + pixel * W, *there = blocks + mirror * W;
    for (int64_t i = 0; i < count; i += lanes, here += apart, there += apart) {
      if (!past) {
        __builtin_prefetch(to_re + kAhead * s.columns + i, 1);
        __builtin_prefetch(to_im + kAhead * s.columns + i, 1);
      }
      const Vec<T> re = load(here), im = load(here + L), mirror_re = load(there), mirror_im = load(there + L);
      const T half = weight / 2;
      store_pair(to_re + i, half * (re + mirror_re), half * (im + mirror_im), std::min(lanes, count - i), past);
      store_pair(to_im + i, half * (im - mirror_im), half * (mirror_re - re), std::min(lanes, count - i), past);
    }
  });
}
template <class T>
void combine(const Shape& s, const T* weights, const T* in_re, const T* in_im, int64_t count, T* blocks,
             int64_t apart) {
  constexpr int64_t W = kWidth<T>, L = kLanes<T>;
  const int64_t lanes = s.lanes<T>();
  each_frequency(s, weights, [&](int64_t kept, int64_t pixel, int64_t mirror, T weight) {
    const T *from_re = in_re + kept * s.columns, *from_im = in_im + kept * s.columns;
    T *here = blocks + pixel * W, *there = blocks + mirror * W;
    for (int64_t i = 0; i < count; i += lanes, here += apart, there += apart) {
      __builtin_prefetch(from_re + kAhead * s.columns + i);
      __builtin_prefetch(from_im + kAhead * s.columns + i);
      Vec<T> re[2], im[2];
      load_pair(from_re + i, re, std::min(lanes, count - i));
      load_pair(from_im + i, im, std::min(lanes, count - i));
      // A frequency that is its own image has no imaginary part.
      const T share = mirror == pixel ? weight : weight / 2, other = mirror == pixel ? T(0) : share;
      store(here, share * re[0] + other * im[1]);
      store(here + L, share * re[1] - other * im[0]);
      store(there, share * re[0] - other * im[1]);
      store(there + L, share * re[1] + other * im[0]);
    }
  });
}

// The axes from the tables, which follow each other: the last one, then the others in order. Returns what stands behind
// them, the weights of the half spectrum's frequencies, 0 for those that are left out.
template <class T> const T* axes(const Shape& s, const T* tables, Axis<T>* out) {
  const auto packed = [](int64_t size) { return (size + kRows - 1) / kRows * kRows * size; };
  const auto make = [&](int64_t n, int64_t before, int64_t after) {
    const int64_t odd = n / (n & -n);
    const T *root_sin = tables + n / 2, *cos = root_sin + n / 2, *sin = odd > 1 ? cos + packed(odd / 2 + 1) : cos;
    const Axis<T> axis{n, before, after, odd, tables, root_sin, cos, sin};
    tables = odd > 1 ? sin + packed(odd / 2) : sin;
    return axis;
  };
  out[0] = make(s.width, s.rows, 1);
  if (s.lead > 0) out[1] = make(s.size[0], 1, s.rows / s.size[0] * s.width);
  if (s.lead > 1) out[2] = make(s.size[1], s.size[0], s.width);
  return tables;
}

// Blocks that are read and written together, so that their rows fill neighbouring cache lines.
template <class T> struct Group {
  Group(const Shape& s, int64_t threads)
      : lanes(s.lanes<T>()), pixels(s.rows * s.width), block(pixels * kWidth<T>),
        longest(std::max({s.width, s.lead > 0 ? s.size[0] : 1, s.lead > 1 ? s.size[1] : 1})),
        count(std::clamp<int64_t>(std::min(kTogether / int64_t(sizeof(T)) / block, s.columns / (lanes * threads)),
                                  1, 8)),
        memory(count * block + 4 * (longest + 1) * kWidth<T>), blocks(memory.data()), work(blocks + count * block) {}
  int64_t columns() const { return count * lanes; }
  int64_t lanes, pixels, block, longest, count;
  Scratch<T> memory;
  T *blocks, *work;
};

template <class T> void analyse(const T* x, const T* tables, T* out_re, T* out_im, const Shape& s, int64_t threads) {
  Axis<T> axis[3];
  const T* weights = axes(s, tables, axis);
  const int64_t step = Group<T>(s, threads).columns();
  parallel((s.columns + step - 1) / step, threads, [&](Items items) {
    Group<T> group(s, threads);
    for (int64_t item; items.next(item);) {
      const int64_t column = item * step;
      const int64_t count = std::min(group.columns(), s.columns - column);
      if (!s.columns_first) read_rows(s, x + column, count, group.blocks, group.block);
      T* block = group.blocks;
      for (int64_t i = 0; i < count; i += group.lanes, block += group.block) {
        const int64_t here = std::min(group.lanes, count - i);
        if (s.columns_first) read_columns(x + (column + i) * group.pixels, group.pixels, here, block);
        transform(s, axis, block, group.work);
      }
      separate(s, weights, group.blocks, group.block, count, out_re + column, out_im + column);
    }
    end_streams();
  });
}

template <class T>
void synthesise(const T* in_re, const T* in_im, const T* tables, const T* bias, T* x, const Shape& s, int64_t threads) {
  Axis<T> axis[3];
  const T* weights = axes(s, tables, axis);
  const int64_t step = Group<T>(s, threads).columns();
  parallel((s.columns + step - 1) / step, threads, [&](Items items) {
    Group<T> group(s, threads);
    const int64_t line = (s.columns_first ? group.pixels : s.columns) * int64_t(sizeof(T));
    const bool past = streams(x, s.columns * group.pixels * int64_t(sizeof(T)), line);
    for (int64_t item; items.next(item);) {
      const int64_t column = item * step;
      const int64_t count = std::min(group.columns(), s.columns - column);
      combine(s, weights, in_re + column, in_im + column, count, group.blocks, group.block);
      T* block = group.blocks;
      for (int64_t i = 0; i < count; i += group.lanes, block += group.block) {
        const int64_t here = std::min(group.lanes, count - i);
        for (int64_t lane = 0; bias && lane < here; lane++) block[lane] += bias[(column + i + lane) % s.channels];
        transform(s, axis, block, group.work);
        if (s.columns_first) write_columns(block, group.pixels, here, x + (column + i) * group.pixels, past);
      }
      if (!s.columns_first) write_rows(s, group.blocks, group.block, count, x + column, past);
    }
    end_streams();
  });
}

template <class T> struct DftAnalyse {
  int64_t size, threads;
  const T *x, *tables;
  T *re, *im;
  Shape shape;
};
template <class T> void run(const DftAnalyse<T>& a) { analyse(a.x, a.tables, a.re, a.im, a.shape, a.threads); }

template <class T> struct DftSynthesise {
  int64_t size, threads;
  const T *re, *im, *tables, *bias;
  T* x;
  Shape shape;
};
template <class T> void run(const DftSynthesise<T>& a) {
  synthesise(a.re, a.im, a.tables, a.bias, a.x, a.shape, a.threads);
}

}  // namespace

ESPALIER_KERNEL(dft_analyse, DftAnalyse)
ESPALIER_KERNEL(dft_synthesise, DftSynthesise)
