// Depthwise convolutions of channels-last maps, stride 1, padded with zeros: forward, input and weight gradients.
//
// x is (B, H, W, C), y (B, P, Q, C) with P = H + top + bottom − R + 1; filters are (C, R, S). A block of channels
// of one image is copied into rows that lie close together with their padding: at the maps' own stride all its pixels
// would compete for a few places of the first cache. There each tap is one multiplication a pixel. Where the processor
// multiplies pairs of bfloat16 (AVX512-BF16), each pixel stands beside its right neighbour, and two taps are one.

#include "batch_norm.hpp"

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
constexpr int64_t kShares = 8;  // of the batch, whose filters' gradients are summed apart: results depend on no threads
constexpr int64_t kFrames = 1 << 18;  // bytes of frames that are filled at once

template <class T> struct Frame {
  T* first;
  int64_t step;  // numbers from a row to the next
  T* at(int64_t y, int64_t x) const { return first + y * step + x * kLanes<T>; }
};

// Blocks of channels of one map, each inside a frame of zeros, `kTile` pixels longer than needed at its end. Several are
// filled at once: a walk over pixels that reads one line of each takes three times as long as one that reads all.
template <class T> struct Frames {
  int64_t step, size, count;  // size: numbers from a frame to the next
  Room<T> pixels;
  Frames(int64_t h, int64_t w, int64_t channels)
      : step(w * kLanes<T>),
        size((h * w + 2 * kTile) * kLanes<T>),
        count(std::clamp<int64_t>(kFrames / int64_t(size * sizeof(T)), 1,
                                  (std::min(channels, kTogether) + kLanes<T> - 1) / kLanes<T>)),
        pixels(size * count) {}
  Frame<T> frame(int64_t number) { return {pixels + number * size, step}; }
  // How many of the piece of work that begins with channel `first` are filled from channel c on.
  int64_t blocks(int64_t first, int64_t c, int64_t channels) const {
    return std::min(count, (std::min(first + kTogether, channels) - c + kLanes<T> - 1) / kLanes<T>);
  }
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

// A block of channels at a place of a map, while those 16 pixels on are fetched.
template <class S> inline Vec<Sum<S>> ahead(const S* at, int64_t channels, int64_t count) {
  __builtin_prefetch(at + 16 * channels);
  return read(at, count);
}

// Fill the first `blocks` frames with value(block, where the pixel lies), a pixel or a pair of it and its right neighbour
// a place; what lies outside was zero and stays so. The sums over the pixels are added to `sums`, unless that is null.
template <class S, class Value>
void fill(Frames<Sum<S>>& frames, int64_t blocks, int64_t top, int64_t left, int64_t h, int64_t w, int64_t channels,
          Sum<S>* sums, Value value) {
  using T = Sum<S>;
  constexpr int64_t V = kLanes<T>;
  for (int64_t y = 0, at = 0; y < h; y++) {
    [[maybe_unused]] Vec<T> before[kTogether / V] = {};
    for (int64_t x = 0; x < w; x++, at += channels)
      for (int64_t b = 0; b < blocks; b++) {
        T* to = frames.frame(b).at(top + y, left + x);
        const Vec<T> v = value(b, at + b * V);
        if (sums) store(sums + b * V, load(sums + b * V) + v);
        if constexpr (!kPairs<S>) {
          store(to, v);
        } else {
          if (x + left > 0) store(to - V, pair(before[b], v));
          before[b] = v;
          if (x + 1 == w) store(to, pair(v, Vec<T>{}));
        }
      }
  }
}

// sums[t] = Σ over taps of tap · pixel, for N neighbouring pixels of a row.
template <class S, int N, class T = Sum<S>>
inline void row_sums(Frame<T> frame, int64_t y, int64_t x, const T* taps, int64_t rows, int64_t columns, Vec<T> start,
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

// The moments of GELU over a map.
template <class T> struct Gathered {
  Moments<T> few;
  Total<T> all;
  // A row at least stays in single precision.
  void end_row(bool last) {
    if (!last && few.count < 64) return;
    all.add(few.count, few.mean(), few.about());
    few = {};
  }
};

// What becomes of a sum: add + sum, or with `norm` add + batch norm of GELU(sum), in evaluation; `gathered` if not null.
template <class T> struct Finish {
  Vec<T> start{};
  Affine<T> to;
  bool norm = false;
  Gathered<T>* gathered = nullptr;
  Vec<T> operator()(Vec<T> sum) const { return norm ? sum * normal_cdf(sum) * to.scale + to.shift : sum; }
};

template <class S, int N>
inline void tile(Frame<Sum<S>> frame, int64_t y, int64_t x, const Sum<S>* taps, int64_t rows, int64_t columns,
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
  if (!finish.gathered) return;
  Vec<T> kept[N];  // and not the sums themselves, which must stay in registers
#pragma GCC unroll 16
  for (int t = 0; t < N; t++) kept[t] = rounded<S>(sums[t]);
  Moments<T> few = finish.gathered->few;
  for (int t = 0; t < wanted; t++) few.add(kept[t] * normal_cdf(kept[t]));
  finish.gathered->few = few;
}

// A whole map: out (h, w) = (add +) the finished correlation of the frame with taps.
template <class S>
void correlate(Frame<Sum<S>> frame, const Sum<S>* taps, int64_t rows, int64_t columns, const Finish<Sum<S>>& finish,
               const S* add, S* out, int64_t h, int64_t w, int64_t channels, int64_t count) {
  const int64_t tiles = (w + kTile - 1) / kTile, even = (w + tiles - 1) / tiles;
  for (int64_t y = 0; y < h; y++) {
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
    if (finish.gathered) finish.gathered->end_row(y + 1 == h);
  }
}

// sums[r·columns + s] += Σ over pixels of dy(y, x) · frame(y + r, x + s), for M neighbouring columns s of one row r.
template <class S, int M, class T = Sum<S>>
void tap_sums(Frame<T> frame, Frame<T> dy, int64_t top, int64_t left, int64_t r, int64_t s, int64_t h, int64_t w,
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
void all_tap_sums(Frame<Sum<S>> frame, Frame<Sum<S>> dy, int64_t top, int64_t left, const DepthwiseShape& s,
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

// The transpose (columns, rows) of a matrix (rows, columns).
template <class T> void transpose(const T* from, T* to, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) to[c * rows + r] = from[r * columns + c];
}

// y = bias + the correlation of x with the filters; with a variance, y = x + batch norm of GELU(that), for maps that keep
// their size. Filters and what is given by channel are in the precision of sums. `moments` (B, 2, C), unless null: of GELU
// of what was written, the mean over each image and the sum of squares about it.
template <class S> struct DepthwiseForward {
  int64_t size, threads;
  const S* x;
  const Sum<S> *filters, *bias, *weight, *shift, *mean, *variance;
  S* y;
  Sum<S>* moments;
  DepthwiseShape shape;
  double eps;
};
template <class S> void run(const DepthwiseForward<S>& a) {
  using T = Sum<S>;
  constexpr int64_t V = kLanes<T>;
  const DepthwiseShape& s = a.shape;
  const int64_t groups = (s.channels + kTogether - 1) / kTogether, all = s.rows * s.columns;
  Scratch<T> by_tap(all * s.channels);
  transpose(a.filters, by_tap.data(), s.channels, all);
  parallel(s.batch * groups, a.threads, [&](Items items) {
    Frames<T> frames(s.out_height + s.rows - 1, s.out_width + s.columns - 1, s.channels);
    Room<T> taps(all * V);
    for (int64_t item; items.next(item);) {
      const int64_t image = item % s.batch, first = item / s.batch * kTogether;
      const S* x = a.x + image * s.height * s.width * s.channels;
      for (int64_t c = first, block = 0, blocks = 0; c < std::min(first + kTogether, s.channels); c += V, block++) {
        const int64_t count = std::min(V, s.channels - c);
        if (block == blocks) {
          block = 0;
          blocks = frames.blocks(first, c, s.channels);
          fill<S>(frames, blocks, s.top, s.left, s.height, s.width, s.channels, nullptr, [&](int64_t b, int64_t at) {
            return ahead(x + c + at, s.channels, std::min(V, s.channels - c - b * V));
          });
        }
        block_taps<S>(taps, by_tap.data(), s, c, count, false);
        Finish<T> finish;
        Gathered<T> gathered;
        if (a.moments) finish.gathered = &gathered;
        if (a.bias) finish.start = read(a.bias + c, count);
        if ((finish.norm = a.variance)) finish.to = affine(a, c, count);
        correlate<S>(frames.frame(block), taps, s.rows, s.columns, finish, a.variance ? x + c : nullptr,
                     a.y + image * s.out_height * s.out_width * s.channels + c, s.out_height, s.out_width, s.channels,
                     count);
        T* moments = a.moments ? a.moments + image * 2 * s.channels + c : nullptr;
        for (int64_t v = 0; moments && v < count; v++) {
          moments[v] = T(gathered.all.mean[v]);
          moments[s.channels + v] = T(gathered.all.square[v]);
        }
      }
    }
  });
}

// The gradients dx (the correlation of g with the turned filters), dfilters and dbias. Without u, g is dy. With u,
// the convolution whose bias was added, for maps that keep their size, y was x + batch norm of GELU(u): then g is the
// gradient of u, and dx has dy added. Null pointers stand for what is not wanted.
template <class S> struct DepthwiseBackward {
  int64_t size, threads;
  const S *x, *dy, *u;
  const Sum<S> *weight, *mean, *variance, *dweight, *dshift, *filters;
  S* dx;
  Sum<S> *dfilters, *dbias;
  DepthwiseShape shape;
  int64_t fixed;
  double eps;
};
template <class S> void run(const DepthwiseBackward<S>& a) {
  using T = Sum<S>;
  constexpr int64_t V = kLanes<T>;
  const DepthwiseShape& s = a.shape;
  const int64_t groups = (s.channels + kTogether - 1) / kTogether, all = s.rows * s.columns;
  const int64_t top = s.rows - 1 - s.top, left = s.columns - 1 - s.left, in = s.height * s.width * s.channels;
  const int64_t out = s.out_height * s.out_width * s.channels, shares = std::clamp<int64_t>(s.batch, 1, kShares);
  Scratch<T> by_tap(all * s.channels), dtaps(shares * all * s.channels), dbias(shares * s.channels);
  transpose(a.filters, by_tap.data(), s.channels, all);
  parallel(groups * shares, a.threads, [&](Items items) {
    Frames<T> frames(s.out_height + s.rows - 1, s.out_width + s.columns - 1, s.channels);
    Frames<T> ups(s.height + s.rows - 1, s.width + s.columns - 1 + kTile, s.channels);
    ups.count = frames.count = std::min(ups.count, frames.count);
    Room<T> taps(ups.count * all * V), sums(ups.count * all * V), bias(kTogether), of_image(kTogether);
    std::vector<NormGradient<T>> norms(size_t(ups.count));
    for (int64_t item; items.next(item);) {
      const int64_t share = item % shares, first = item / shares * kTogether;
      for (int64_t c = first, blocks; c < std::min(first + kTogether, s.channels); c += blocks * V) {
        const auto count = [&](int64_t b) { return std::min(V, s.channels - c - b * V); };
        blocks = frames.blocks(first, c, s.channels);
        for (int64_t b = 0; b < blocks; b++) {
          if (a.dx) block_taps<S>(taps + b * all * V, by_tap.data(), s, c + b * V, count(b), true);
          if (a.u) norms[size_t(b)] = norm_gradient(a, s.batch * s.height * s.width, a.fixed, c + b * V, count(b));
        }
        std::memset(sums, 0, size_t(blocks * all * V) * sizeof(T));
        std::memset(bias, 0, size_t(kTogether) * sizeof(T));
        for (int64_t image = share; image < s.batch; image += shares) {
          const S *x = a.x + image * in + c, *dy = a.dy + image * out + c, *u = a.u ? a.u + image * out + c : nullptr;
          std::memset(of_image, 0, size_t(kTogether) * sizeof(T));
          fill<S>(ups, blocks, top, left, s.out_height, s.out_width, s.channels, of_image, [&](int64_t b, int64_t at) {
            const Vec<T> g = ahead(dy + at, s.channels, count(b));
            return u ? rounded<S>(norms[size_t(b)](ahead(u + at, s.channels, count(b)), g)) : g;
          });
          for (int64_t v = 0; v < blocks * V; v++) bias[v] += of_image[v];
          if (a.dfilters)
            fill<S>(frames, blocks, s.top, s.left, s.height, s.width, s.channels, nullptr,
                    [&](int64_t b, int64_t at) { return ahead(x + at, s.channels, count(b)); });
          for (int64_t b = 0; b < blocks; b++) {
            if (a.dx)
              correlate<S>(ups.frame(b), taps + b * all * V, s.rows, s.columns, Finish<T>{}, u ? dy + b * V : nullptr,
                           a.dx + image * in + c + b * V, s.height, s.width, s.channels, count(b));
            if (a.dfilters) all_tap_sums<S>(frames.frame(b), ups.frame(b), top, left, s, sums + b * all * V);
          }
        }
        for (int64_t b = 0; b < blocks; b++) {
          for (int64_t i = 0; i < all; i++)
            write(dtaps.data() + (share * all + i) * s.channels + c + b * V, load(sums + (b * all + i) * V), count(b));
          write(dbias.data() + share * s.channels + c + b * V, load(bias + b * V), count(b));
        }
      }
    }
  });
  const auto add_up = [&](T* parts, int64_t size) {
    for (int64_t i = size; i < shares * size; i++) parts[i % size] += parts[i];
    return parts;
  };
  if (a.dfilters) transpose(add_up(dtaps.data(), all * s.channels), a.dfilters, all, s.channels);
  if (a.dbias) std::copy_n(add_up(dbias.data(), s.channels), s.channels, a.dbias);
}

}  // namespace

ESPALIER_KERNEL(depthwise_forward, DepthwiseForward)
ESPALIER_KERNEL(depthwise_backward, DepthwiseBackward)
ESPALIER_API int depthwise_forward_bf16(const DepthwiseForward<bfloat16>* a) { return call(a); }
ESPALIER_API int depthwise_backward_bf16(const DepthwiseBackward<bfloat16>* a) { return call(a); }
