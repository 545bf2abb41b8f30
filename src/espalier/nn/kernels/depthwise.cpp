// Depthwise convolutions of channels-last maps, stride 1, padded with zeros: forward, input and weight gradients.
//
// x is (B, H, W, C), y (B, P, Q, C) with P = H + top + bottom − R + 1; taps are (R·S, C), row by row. A block of channels
// of one image is copied into rows that lie close together with their padding: at the maps' own stride all its pixels
// would compete for a few places of the first cache. There each tap is one multiplication a pixel. Where the processor
// multiplies pairs of bfloat16 (AVX512-BF16), each pixel stands beside its right neighbour, and two taps are one.

#include "channels.hpp"
#include "gelu.hpp"

namespace {

struct DepthwiseShape {
  int64_t batch, height, width, channels, rows, columns, top, left, out_height, out_width;
};

#ifdef __AVX512F__
constexpr int kTile = 16, kTileStep = 4;  // pixels of a row whose sums stay in registers
#else
constexpr int kTile = 8, kTileStep = 2;
#endif
#ifdef __AVX512BF16__
template <class S> constexpr bool kPairs = std::is_same_v<S, bfloat16>;
#else
template <class S> constexpr bool kPairs = false;
#endif
constexpr int64_t kTogether = 64;  // channels that a piece of work takes: whole cache lines of every precision

// A block of channels of one map inside a frame of zeros, `kTile` pixels longer than needed at its end.
template <class T> struct Frame {
  int64_t height, step;  // rows, and vectors from one to the next
  Room<T> pixels;
  Frame(int64_t h, int64_t w) : height(h), step(w), pixels((h * w + 2 * kTile) * kLanes<T>) {}
  T* at(int64_t y, int64_t x) { return pixels + (y * step + x) * kLanes<T>; }
};

// sum + a·b; of pairs, sum + a₀·b₀ + a₁·b₁, where bfloat16 numbers fill the low and the high half of each lane.
template <class S> inline Vec<Sum<S>> add_product(Vec<Sum<S>> sum, Vec<Sum<S>> a, Vec<Sum<S>> b) {
#ifdef __AVX512BF16__
  if constexpr (kPairs<S>) return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + a * b;
}
// The pair of two bfloat16 numbers that are widened to float.
[[maybe_unused]] inline Vec<float> pair(Vec<float> low, Vec<float> high) {
  return (Vec<float>)((words)low >> 16 | (words)high);
}

// Fill a map's place in its frame, a pixel or a pair of it and its right neighbour a place; what lies outside was zero
// and stays so. Returns the sum over the pixels.
template <class S>
Vec<Sum<S>> fill(Frame<Sum<S>>& frame, int64_t top, int64_t left, const S* map, int64_t h, int64_t w, int64_t channels,
                 int64_t count) {
  using T = Sum<S>;
  Vec<T> sum{};
  for (int64_t y = 0; y < h; y++) {
    T* to = frame.at(top + y, left);
    const S* from = map + y * w * channels;
    [[maybe_unused]] Vec<T> before{};
    for (int64_t x = 0; x < w; x++, from += channels, to += kLanes<T>) {
      __builtin_prefetch(from + 16 * channels);
      const Vec<T> v = read(from, count);
      sum += v;
      if constexpr (!kPairs<S>) {
        store(to, v);
      } else if (x + left > 0) {
        store(to - kLanes<T>, pair(before, v));
      }
      before = v;
    }
    if constexpr (kPairs<S>) store(to - kLanes<T>, pair(before, Vec<T>{}));
  }
  return sum;
}

// sums[t] = Σ over taps of tap · pixel, for N neighbouring pixels of a row.
template <class S, int N, class T = Sum<S>>
inline void row_sums(Frame<T>& frame, int64_t y, int64_t x, const T* taps, int64_t rows, int64_t columns, Vec<T> start,
                     Vec<T> (&sums)[N]) {
  constexpr int64_t step = kPairs<S> ? 2 : 1;
  for (int t = 0; t < N; t++) sums[t] = start;
  for (int64_t r = 0; r < rows; r++) {
    const T* row = frame.at(y + r, x);
    for (int64_t s = 0; s < columns; s += step, taps += kLanes<T>) {
      const T* pixel = row + std::min(s, std::max<int64_t>(columns - step, 0)) * kLanes<T>;
      const Vec<T> tap = load(taps);
#pragma GCC unroll 16
      for (int t = 0; t < N; t++) sums[t] = add_product<S>(sums[t], tap, load(pixel + t * kLanes<T>));
    }
  }
}

// What becomes of a sum: add + sum, or with `norm` add + batch norm of GELU(sum), in evaluation.
template <class T> struct Finish {
  Vec<T> start{};
  Affine<T> to;
  bool norm = false;
  Vec<T> operator()(Vec<T> sum) const { return norm ? sum * normal_cdf(sum) * to.scale + to.shift : sum; }
};

template <class S, int N>
inline void tile(Frame<Sum<S>>& frame, int64_t y, int64_t x, const Sum<S>* taps, int64_t rows, int64_t columns,
                 const Finish<Sum<S>>& finish, const S* add, S* out, int64_t below, int64_t wanted, int64_t channels,
                 int64_t count) {
  using T = Sum<S>;
  // The rows below of what is written and added: they lie too far apart for the processor to guess.
  for (int t = 0; t < N; t++) {
    __builtin_prefetch(out + (below + t) * channels, 1);
    if (add) __builtin_prefetch(add + (below + t) * channels);
  }
  Vec<T> sums[N];
  row_sums<S, N>(frame, y, x, taps, rows, columns, finish.start, sums);
#pragma GCC unroll 16
  for (int t = 0; t < N; t++) {
    if (t >= wanted) break;
    const Vec<T> value = finish(sums[t]);
    write(out + t * channels, add ? value + read(add + t * channels, count) : value, count);
  }
}

// A whole map: out (h, w) = (add +) the finished correlation of the frame with taps.
template <class S>
void correlate(Frame<Sum<S>>& frame, const Sum<S>* taps, int64_t rows, int64_t columns, const Finish<Sum<S>>& finish,
               const S* add, S* out, int64_t h, int64_t w, int64_t channels, int64_t count) {
  const int64_t tiles = (w + kTile - 1) / kTile, even = (w + tiles - 1) / tiles;
  for (int64_t y = 0; y < h; y++)
    for (int64_t x = 0; x < w; x += even) {
      const int64_t wanted = std::min(even, w - x), at = (y * w + x) * channels;
      const S* more = add ? add + at : nullptr;
      const auto run = [&](auto size) {
        tile<S, decltype(size)::value>(frame, y, x, taps, rows, columns, finish, more, out + at, w, wanted, channels,
                                      count);
      };
      switch ((wanted + kTileStep - 1) / kTileStep) {
        case 1: run(std::integral_constant<int, kTileStep>{}); break;
        case 2: run(std::integral_constant<int, 2 * kTileStep>{}); break;
        case 3: run(std::integral_constant<int, 3 * kTileStep>{}); break;
        default: run(std::integral_constant<int, kTile>{});
      }
    }
}

// sums[r·columns + s] += Σ over pixels of dy(y, x) · frame(y + r, x + s), for M neighbouring columns s of one row r.
template <class S, int M, class T = Sum<S>>
void tap_sums(Frame<T>& frame, Frame<T>& dy, int64_t top, int64_t left, int64_t r, int64_t s, int64_t h, int64_t w,
              T* sums) {
  constexpr int kStep = kPairs<S> ? 2 : 1;
  constexpr int kPixels = 4 * kStep;  // that share what they load; those past the row's end are zeros of dy's frame
  Vec<T> total[2][M] = {};
  for (int64_t y = 0; y < h; y++) {
    const T *up = dy.at(top + y, left), *pixel = frame.at(y + r, s);
    for (int64_t x = 0; x < w; x += kPixels, up += kPixels * kLanes<T>, pixel += kPixels * kLanes<T>) {
#pragma GCC unroll 4
      for (int p = 0; p < kPixels; p += kStep) {
        const Vec<T> g = load(up + p * kLanes<T>);
        Vec<T>(&half)[M] = total[p / kStep & 1];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) half[m] = add_product<S>(half[m], g, load(pixel + (p + m) * kLanes<T>));
      }
    }
  }
  for (int m = 0; m < M; m++) store(sums + m * kLanes<T>, load(sums + m * kLanes<T>) + total[0][m] + total[1][m]);
}
template <class S>
void all_tap_sums(Frame<Sum<S>>& frame, Frame<Sum<S>>& dy, int64_t top, int64_t left, const DepthwiseShape& s,
                  Sum<S>* sums) {
  using T = Sum<S>;
  for (int64_t r = 0; r < s.rows; r++)
    for (int64_t c = 0; c < s.columns;) {
      T* to = sums + (r * s.columns + c) * kLanes<T>;
      const auto run = [&](auto m) {
        tap_sums<S, decltype(m)::value>(frame, dy, top, left, r, c, s.out_height, s.out_width, to);
        c += m;
      };
      switch (s.columns - c) {
        case 1: run(std::integral_constant<int, 1>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        case 3: case 6: run(std::integral_constant<int, 3>{}); break;
        case 5: case 9: case 10: run(std::integral_constant<int, 5>{}); break;
        default: run(std::integral_constant<int, 4>{});
      }
    }
}

// One block's taps (rows · columns, lanes), turned by half a turn for the input's gradient. Those of bfloat16 maps are
// rounded to it, as autocast does. Of pairs, the last tap of an odd row stands behind a zero for the pixel before it, so
// that no pixel outside the window is read, which may be infinite; the only tap of a row stands before one.
template <class S>
void block_taps(Sum<S>* to, const Sum<S>* taps, const DepthwiseShape& s, int64_t channel, int64_t count, bool turned) {
  using T = Sum<S>;
  const int64_t all = s.rows * s.columns;
  const auto tap = [&](int64_t i) {
    return rounded<S>(read(taps + (turned ? all - 1 - i : i) * s.channels + channel, count));
  };
  for (int64_t r = 0; r < s.rows; r++)
    for (int64_t c = 0; c < s.columns; c++, to += kLanes<T>) {
      const int64_t at = r * s.columns + c;
      if constexpr (kPairs<S>) {
        const bool last = c + 1 == s.columns && c > 0;
        store(to, pair(last ? Vec<T>{} : tap(at), last ? tap(at) : c + 1 < s.columns ? tap(at + 1) : Vec<T>{}));
        c++;
      } else {
        store(to, tap(at));
      }
    }
}

// y = bias + the correlation of x with the taps; with a variance, y = x + batch norm of GELU(that), for maps that keep
// their size. Taps and what is given by channel are in the precision of sums.
template <class S> struct DepthwiseForward {
  int64_t size, threads;
  const S* x;
  const Sum<S> *taps, *bias, *weight, *shift, *mean, *variance;
  S* y;
  DepthwiseShape shape;
  double eps;
};
template <class S> void run(const DepthwiseForward<S>& a) {
  using T = Sum<S>;
  const DepthwiseShape& s = a.shape;
  const int64_t groups = (s.channels + kTogether - 1) / kTogether;
  parallel(s.batch * groups, a.threads, [&](Items items) {
    Frame<T> frame(s.out_height + s.rows - 1, s.out_width + s.columns - 1);
    Room<T> taps(s.rows * s.columns * kLanes<T>);
    for (int64_t item; items.next(item);) {
      const int64_t image = item % s.batch, first = item / s.batch * kTogether;
      for (int64_t c = first; c < std::min(first + kTogether, s.channels); c += kLanes<T>) {
        const int64_t count = std::min<int64_t>(kLanes<T>, s.channels - c);
        block_taps<S>(taps, a.taps, s, c, count, false);
        fill(frame, s.top, s.left, a.x + image * s.height * s.width * s.channels + c, s.height, s.width, s.channels,
             count);
        Finish<T> finish;
        if (a.bias) finish.start = read(a.bias + c, count);
        if ((finish.norm = a.variance)) finish.to = affine(a, c, count);
        correlate<S>(frame, taps, s.rows, s.columns, finish,
                     a.variance ? a.x + image * s.height * s.width * s.channels + c : nullptr,
                     a.y + image * s.out_height * s.out_width * s.channels + c, s.out_height, s.out_width, s.channels,
                     count);
      }
    }
  });
}

// dx = (add +) the correlation of dy with the turned taps; dtaps (shares, R·S, C), dbias (shares, C). Null pointers
// stand for what is not wanted. dx may be dy if they are as large: a map is in its frame before it is written.
template <class S> struct DepthwiseBackward {
  int64_t size, threads;
  const S *x, *dy, *add;
  const Sum<S>* taps;
  S* dx;
  Sum<S> *dtaps, *dbias;
  DepthwiseShape shape;
  int64_t shares;
};
template <class S> void run(const DepthwiseBackward<S>& a) {
  using T = Sum<S>;
  const DepthwiseShape& s = a.shape;
  const int64_t groups = (s.channels + kTogether - 1) / kTogether, all = s.rows * s.columns;
  const int64_t top = s.rows - 1 - s.top, left = s.columns - 1 - s.left, in = s.height * s.width * s.channels;
  const int64_t out = s.out_height * s.out_width * s.channels;
  parallel(groups * a.shares, a.threads, [&](Items items) {
    Frame<T> frame(s.out_height + s.rows - 1, s.out_width + s.columns - 1);
    Frame<T> up(s.height + s.rows - 1, s.width + s.columns - 1 + kTile);
    Room<T> taps(all * kLanes<T>), sums(all * kLanes<T>);
    for (int64_t item; items.next(item);) {
      const int64_t share = item % a.shares, first = item / a.shares * kTogether;
      for (int64_t c = first; c < std::min(first + kTogether, s.channels); c += kLanes<T>) {
        const int64_t count = std::min<int64_t>(kLanes<T>, s.channels - c);
        if (a.dx) block_taps<S>(taps, a.taps, s, c, count, true);
        std::memset(sums, 0, size_t(all * kLanes<T>) * sizeof(T));
        Vec<T> bias{};
        for (int64_t image = share; image < s.batch; image += a.shares) {
          bias += fill(up, top, left, a.dy + image * out + c, s.out_height, s.out_width, s.channels, count);
          if (a.dx)
            correlate<S>(up, taps, s.rows, s.columns, Finish<T>{}, a.add ? a.add + image * in + c : nullptr,
                         a.dx + image * in + c, s.height, s.width, s.channels, count);
          if (!a.dtaps) continue;
          fill(frame, s.top, s.left, a.x + image * in + c, s.height, s.width, s.channels, count);
          all_tap_sums<S>(frame, up, top, left, s, sums);
        }
        for (int64_t i = 0; a.dtaps && i < all; i++)
          write(a.dtaps + (share * all + i) * s.channels + c, load(sums + i * kLanes<T>), count);
        if (a.dbias) write(a.dbias + share * s.channels + c, bias, count);
      }
    }
  });
}

}  // namespace

ESPALIER_KERNEL(depthwise_forward, DepthwiseForward)
ESPALIER_KERNEL(depthwise_backward, DepthwiseBackward)
ESPALIER_API int depthwise_forward_bf16(const DepthwiseForward<bfloat16>* a) { return call(a); }
ESPALIER_API int depthwise_backward_bf16(const DepthwiseBackward<bfloat16>* a) { return call(a); }
