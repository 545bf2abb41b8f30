// The selective scan of Mamba-1, the causal depthwise convolution with SiLU and Mamba-2's gated norm, forward and
// backward, for CPUs.
//
// Layouts are row-major and channel-last: x, delta, y (B, L, E); a (E, N); b, c (B, L, N); states (B, E, N). A block of
// W channels advances together, one vector lane a channel, and all N states of a block stay in the first cache. Time is
// cut into pieces of K steps; the forward pass keeps the state at each piece's start, the backward pass recomputes the
// piece from it. Work is shared out by (batch entry, group of blocks), never by thread, so results do not depend on how
// many threads there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kBytes = 32;  // one vector

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

template <class T> inline Vec<T> splat(T value) { return Vec<T>{} + value; }

// 2^v for float: split off the nearest integer by adding 1.5·2^23, a polynomial for the rest (relative error < 2e-7).
inline Vec<float> exp2v(Vec<float> v) {
  typedef Lanes<float>::ivec ivec;
  v = v < -126.f ? splat<float>(-126.f) : v;
  v = v > 126.f ? splat<float>(126.f) : v;
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

struct Shape {
  int64_t batch, length, channels, states, piece, groups;
  int64_t pieces() const { return (length + piece - 1) / piece; }
};

// Copy a (steps × width) tile out of a (L, E) plane, zeros past the last channel; and back.
template <class T> void tile_in(T* tile, const T* plane, int64_t steps, int64_t stride, int64_t width) {
  for (int64_t t = 0; t < steps; t++)
    for (int64_t w = 0; w < kWidth<T>; w++) tile[t * kWidth<T> + w] = w < width ? plane[t * stride + w] : T(0);
}
template <class T> void tile_out(T* plane, const T* tile, int64_t steps, int64_t stride, int64_t width) {
  for (int64_t t = 0; t < steps; t++) std::memcpy(plane + t * stride, tile + t * kWidth<T>, size_t(width) * sizeof(T));
}
// The same for an (E, N) matrix, transposed to (N × width).
template <class T> void state_in(T* tile, const T* rows, int64_t n_states, int64_t width, T scale) {
  for (int64_t n = 0; n < n_states; n++)
    for (int64_t w = 0; w < kWidth<T>; w++) tile[n * kWidth<T> + w] = w < width ? rows[w * n_states + n] * scale : T(0);
}
template <class T> void state_out(T* rows, const T* tile, int64_t n_states, int64_t width) {
  for (int64_t n = 0; n < n_states; n++)
    for (int64_t w = 0; w < width; w++) rows[w * n_states + n] = tile[n * kWidth<T> + w];
}

constexpr double kLog2E = 1.4426950408889634;

// Channels [first, last) of blocks that group g of the batch entry owns.
inline void group_blocks(const Shape& s, int64_t width, int64_t g, int64_t* first, int64_t* last) {
  int64_t blocks = (s.channels + width - 1) / width;
  *first = blocks * g / s.groups;
  *last = blocks * (g + 1) / s.groups;
}

template <class T>
void scan_forward(const T* x, const T* delta, const T* a, const T* b, const T* c, const T* d, const T* initial, T* y,
                  T* final_state, T* starts, const Shape& s, int threads) {
  constexpr int64_t W = kWidth<T>, V = kLanes<T>;
  const int64_t N = s.states, K = s.piece;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t item = 0; item < s.batch * s.groups; item++) {
    const int64_t batch = item / s.groups;
    int64_t first, last;
    group_blocks(s, W, item % s.groups, &first, &last);
    std::vector<T> rates(N * W), state(N * W), xs(K * W), deltas(K * W), ys(K * W);
    for (int64_t block = first; block < last; block++) {
      const int64_t e = block * W, width = std::min(W, s.channels - e);
      state_in(rates.data(), a + e * N, N, width, T(kLog2E));
      if (initial) state_in(state.data(), initial + (batch * s.channels + e) * N, N, width, T(1));
      else std::fill(state.begin(), state.end(), T(0));
      for (int64_t piece = 0; piece < s.pieces(); piece++) {
        const int64_t t0 = piece * K, steps = std::min(K, s.length - t0);
        const int64_t at = (batch * s.length + t0) * s.channels + e;
        if (starts) {
          T* out = starts + ((batch * s.pieces() + piece) * ((s.channels + W - 1) / W) + block) * N * W;
          std::memcpy(out, state.data(), size_t(N * W) * sizeof(T));
        }
        tile_in(xs.data(), x + at, steps, s.channels, width);
        tile_in(deltas.data(), delta + at, steps, s.channels, width);
        for (int64_t t = 0; t < steps; t++) {
          const T* bt = b + (batch * s.length + t0 + t) * N;
          const T* ct = c + (batch * s.length + t0 + t) * N;
          for (int64_t v = 0; v < W; v += V) {
            const Vec<T> dt = load(&deltas[t * W + v]), u = dt * load(&xs[t * W + v]);
            Vec<T> sum{};
            for (int64_t n = 0; n < N; n++) {
              Vec<T> h = exp2v(dt * load(&rates[n * W + v])) * load(&state[n * W + v]) + u * bt[n];
              store(&state[n * W + v], h);
              sum += h * ct[n];
            }
            store(&ys[t * W + v], sum);
          }
        }
        if (d)
          for (int64_t t = 0; t < steps; t++)
            for (int64_t w = 0; w < width; w++) ys[t * W + w] += d[e + w] * xs[t * W + w];
        tile_out(y + at, ys.data(), steps, s.channels, width);
      }
      state_out(final_state + (batch * s.channels + e) * N, state.data(), N, width);
    }
  }
}

// One piece of one block, backwards: recompute states and decays, then walk back with the state's gradient in `carry`.
template <class T> struct Piece {
  std::vector<T> xs, deltas, dys, dxs, ddeltas, states, decays;
  Piece(int64_t K, int64_t N)
      : xs(K * kWidth<T>), deltas(K * kWidth<T>), dys(K * kWidth<T>), dxs(K * kWidth<T>), ddeltas(K * kWidth<T>),
        states((K + 1) * N * kWidth<T>), decays(K * N * kWidth<T>) {}

  void recompute(const T* rates, const T* start, const T* b, int64_t steps, int64_t N) {
    constexpr int64_t W = kWidth<T>, V = kLanes<T>;
    std::memcpy(states.data(), start, size_t(N * W) * sizeof(T));
    for (int64_t t = 0; t < steps; t++)
      for (int64_t v = 0; v < W; v += V) {
        const Vec<T> dt = load(&deltas[t * W + v]), u = dt * load(&xs[t * W + v]);
        const T *before = &states[t * N * W + v];
        T *after = &states[(t + 1) * N * W + v], *decay = &decays[t * N * W + v];
        for (int64_t n = 0; n < N; n++) {
          Vec<T> q = exp2v(dt * load(rates + n * W + v));
          store(decay + n * W, q);
          store(after + n * W, q * load(before + n * W) + u * b[t * N + n]);
        }
      }
  }

  // rates_grad gathers Σ_t g·q·h·Δ; b_sums and c_sums (K × N × lanes) gather over channels and are reduced by the caller.
  void walk_back(const T* rates, T* carry, T* rates_grad, const T* b, const T* c, T* b_sums, T* c_sums, int64_t steps,
                 int64_t N) {
    constexpr int64_t W = kWidth<T>, V = kLanes<T>;
    for (int64_t t = steps - 1; t >= 0; t--)
      for (int64_t v = 0; v < W; v += V) {
        const Vec<T> dt = load(&deltas[t * W + v]), xt = load(&xs[t * W + v]), dy = load(&dys[t * W + v]), u = dt * xt;
        const T *before = &states[t * N * W + v], *after = &states[(t + 1) * N * W + v];
        const T* decay = &decays[t * N * W + v];
        Vec<T> du{}, ddt{};
        for (int64_t n = 0; n < N; n++) {
          const Vec<T> g = load(carry + n * W + v) + dy * c[t * N + n];
          T *bs = b_sums + (t * N + n) * V, *cs = c_sums + (t * N + n) * V;
          store(cs, load(cs) + dy * load(after + n * W));
          store(bs, load(bs) + g * u);
          du += g * b[t * N + n];
          const Vec<T> gq = g * load(decay + n * W), p = gq * load(before + n * W);
          ddt += p * load(rates + n * W + v);
          store(rates_grad + n * W + v, load(rates_grad + n * W + v) + p * dt);
          store(carry + n * W + v, gq);
        }
        store(&dxs[t * W + v], du * dt);
        store(&ddeltas[t * W + v], ddt * T(1 / kLog2E) + du * xt);
      }
  }
};

template <class T>
void scan_backward(const T* x, const T* delta, const T* a, const T* b, const T* c, const T* d, const T* starts,
                   const T* dy, const T* dfinal, T* dx, T* ddelta, T* da, T* db, T* dc, T* dd, T* dinitial,
                   const Shape& s, int threads) {
  constexpr int64_t W = kWidth<T>, V = kLanes<T>;
  const int64_t N = s.states, K = s.piece, all_blocks = (s.channels + W - 1) / W;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t item = 0; item < s.batch * s.groups; item++) {
    const int64_t batch = item / s.groups;
    int64_t first, last;
    group_blocks(s, W, item % s.groups, &first, &last);
    const int64_t blocks = last - first;
    std::vector<T> rates(blocks * N * W), carry(blocks * N * W), rates_grad(blocks * N * W), skip(blocks * W);
    std::vector<T> b_sums(K * N * V), c_sums(K * N * V);
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t e = (first + i) * W, width = std::min(W, s.channels - e);
      state_in(&rates[i * N * W], a + e * N, N, width, T(kLog2E));
      if (dfinal) state_in(&carry[i * N * W], dfinal + (batch * s.channels + e) * N, N, width, T(1));
    }
    Piece<T> piece(K, N);
    for (int64_t p = s.pieces() - 1; p >= 0; p--) {
      const int64_t t0 = p * K, steps = std::min(K, s.length - t0);
      const T *bt = b + (batch * s.length + t0) * N, *ct = c + (batch * s.length + t0) * N;
      std::fill(b_sums.begin(), b_sums.end(), T(0));
      std::fill(c_sums.begin(), c_sums.end(), T(0));
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t e = (first + i) * W, width = std::min(W, s.channels - e);
        const int64_t at = (batch * s.length + t0) * s.channels + e;
        tile_in(piece.xs.data(), x + at, steps, s.channels, width);
        tile_in(piece.deltas.data(), delta + at, steps, s.channels, width);
        tile_in(piece.dys.data(), dy + at, steps, s.channels, width);
        const T* start = starts + ((batch * s.pieces() + p) * all_blocks + first + i) * N * W;
        piece.recompute(&rates[i * N * W], start, bt, steps, N);
        piece.walk_back(&rates[i * N * W], &carry[i * N * W], &rates_grad[i * N * W], bt, ct, b_sums.data(),
                        c_sums.data(), steps, N);
        if (d)
          for (int64_t t = 0; t < steps; t++)
            for (int64_t w = 0; w < width; w++) {
              piece.dxs[t * W + w] += d[e + w] * piece.dys[t * W + w];
              skip[i * W + w] += piece.xs[t * W + w] * piece.dys[t * W + w];
            }
        tile_out(dx + at, piece.dxs.data(), steps, s.channels, width);
        tile_out(ddelta + at, piece.ddeltas.data(), steps, s.channels, width);
      }
      const int64_t out = (item * s.length + t0) * N;
      for (int64_t tn = 0; tn < steps * N; tn++) {
        T sum_b = 0, sum_c = 0;
        for (int64_t v = 0; v < V; v++) sum_b += b_sums[tn * V + v], sum_c += c_sums[tn * V + v];
        db[out + tn] = sum_b;
        dc[out + tn] = sum_c;
      }
    }
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t e = (first + i) * W, width = std::min(W, s.channels - e);
      state_out(da + (batch * s.channels + e) * N, &rates_grad[i * N * W], N, width);
      state_out(dinitial + (batch * s.channels + e) * N, &carry[i * N * W], N, width);
      if (d) std::memcpy(dd + batch * s.channels + e, &skip[i * W], size_t(width) * sizeof(T));
    }
  }
}

// The convolution. x (B, L, C) may have rows farther apart than C (a slice of a wider tensor); taps (C, K), oldest
// first. Blocks of channels in one vectorised inner loop.
constexpr int64_t kConvBlock = 64;
constexpr int64_t kConvPiece = 64;

template <class T> inline T sigmoid(T v) {
  return T(1) / (T(1) + std::exp(-v));
}
inline void sigmoid_row(const float* in, float* out) {
  for (int64_t w = 0; w < kConvBlock; w += 8) {
    Vec<float> v = load(in + w);
    store(out + w, 1.f / (1.f + exp2v(v * float(-kLog2E))));
  }
}
inline void sigmoid_row(const double* in, double* out) {
  for (int64_t w = 0; w < kConvBlock; w++) out[w] = sigmoid(in[w]);
}

struct ConvShape { int64_t batch, length, channels, taps, stride; };

// pre[t] = bias + Σ_k taps[k] x[t − K + 1 + k], for one block of channels at one t.
template <class T>
inline void conv_row(T* pre, const T* x, const T* taps, const T* bias, int64_t t, int64_t width, const ConvShape& s) {
  for (int64_t w = 0; w < kConvBlock; w++) pre[w] = w < width && bias ? bias[w] : T(0);
  for (int64_t k = 0; k < s.taps; k++) {
    const int64_t from = t - s.taps + 1 + k;
    if (from < 0) continue;
    const T *row = x + from * s.stride, *tap = taps + k * kConvBlock;
    for (int64_t w = 0; w < width; w++) pre[w] += tap[w] * row[w];
  }
}

template <class T> std::vector<T> pack_taps(const T* taps, int64_t width, int64_t count) {
  std::vector<T> packed(count * kConvBlock);
  for (int64_t k = 0; k < count; k++)
    for (int64_t w = 0; w < width; w++) packed[k * kConvBlock + w] = taps[w * count + k];
  return packed;
}

template <class T>
void conv_forward(const T* x, const T* taps, const T* bias, T* y, const ConvShape& s, int threads) {
  const int64_t blocks = (s.channels + kConvBlock - 1) / kConvBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < s.batch * blocks; item++) {
    const int64_t batch = item / blocks, ch = item % blocks * kConvBlock, width = std::min(kConvBlock, s.channels - ch);
    const std::vector<T> packed = pack_taps(taps + ch * s.taps, width, s.taps);
    const T* plane = x + batch * s.length * s.stride + ch;
    T pre[kConvBlock], gate[kConvBlock];
    for (int64_t t = 0; t < s.length; t++) {
      conv_row(pre, plane, packed.data(), bias ? bias + ch : nullptr, t, width, s);
      sigmoid_row(pre, gate);
      T* out = y + (batch * s.length + t) * s.channels + ch;
      for (int64_t w = 0; w < width; w++) out[w] = pre[w] * gate[w];
    }
  }
}

template <class T>
void conv_backward(const T* x, const T* taps, const T* bias, const T* dy, T* dx, T* dtaps, T* dbias,
                   const ConvShape& s, int threads) {
  const int64_t blocks = (s.channels + kConvBlock - 1) / kConvBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < s.batch * blocks; item++) {
    const int64_t batch = item / blocks, ch = item % blocks * kConvBlock, width = std::min(kConvBlock, s.channels - ch);
    const std::vector<T> packed = pack_taps(taps + ch * s.taps, width, s.taps);
    std::vector<T> dpre((kConvPiece + s.taps - 1) * kConvBlock), sums(s.taps * kConvBlock), bias_sums(kConvBlock);
    const T* plane = x + batch * s.length * s.stride + ch;
    for (int64_t t0 = 0; t0 < s.length; t0 += kConvPiece) {
      const int64_t end = std::min(t0 + kConvPiece, s.length), reach = std::min(end + s.taps - 1, s.length);
      for (int64_t t = t0; t < reach; t++) {  // the rows past the piece's end reach back into it
        T pre[kConvBlock], gate[kConvBlock];
        T* g = &dpre[(t - t0) * kConvBlock];
        conv_row(pre, plane, packed.data(), bias ? bias + ch : nullptr, t, width, s);
        sigmoid_row(pre, gate);
        const T* up = dy + (batch * s.length + t) * s.channels + ch;
        for (int64_t w = 0; w < width; w++) g[w] = up[w] * gate[w] * (T(1) + pre[w] * (T(1) - gate[w]));
      }
      for (int64_t t = t0; t < end; t++) {
        const T* g = &dpre[(t - t0) * kConvBlock];
        T* out = dx + (batch * s.length + t) * s.channels + ch;
        for (int64_t w = 0; w < width; w++) bias_sums[w] += g[w], out[w] = T(0);
        for (int64_t k = 0; k < s.taps; k++) {
          const int64_t ahead = t + s.taps - 1 - k, from = t - s.taps + 1 + k;
          const T* tap = &packed[k * kConvBlock];
          if (ahead < reach) {
            const T* later = &dpre[(ahead - t0) * kConvBlock];
            for (int64_t w = 0; w < width; w++) out[w] += tap[w] * later[w];
          }
          if (from >= 0) {
            const T* row = plane + from * s.stride;
            for (int64_t w = 0; w < width; w++) sums[k * kConvBlock + w] += g[w] * row[w];
          }
        }
      }
    }
    for (int64_t w = 0; w < width; w++) {
      for (int64_t k = 0; k < s.taps; k++) dtaps[(batch * s.channels + ch + w) * s.taps + k] = sums[k * kConvBlock + w];
      dbias[batch * s.channels + ch + w] = bias_sums[w];
    }
  }
}

// The gated norm: out = weight · v / √(mean(v²) + eps), v = y · SiLU(z), the mean over each of `groups` parts of a row.
// y and out are (rows, groups · width), z has rows `stride` apart. Rows are shared out in `items` parts; each gathers its
// own share of the weight's gradient.
struct NormShape {
  int64_t rows, groups, width, stride, items;
  int64_t first(int64_t item) const { return rows * item / items; }
};

// One group of one row, padded with zeros to whole vectors.
template <class T> struct NormRow {
  int64_t width, padded;
  std::vector<T> y, z, w, g, s, v;
  explicit NormRow(int64_t n)
      : width(n), padded((n + kLanes<T> - 1) / kLanes<T> * kLanes<T>), y(padded), z(padded), w(padded), g(padded),
        s(padded), v(padded) {}
  void fill(std::vector<T>& to, const T* from) { std::memcpy(to.data(), from, size_t(width) * sizeof(T)); }
  // Fill s = sigmoid(z) and v = y z s, and return 1/√(mean(v²) + eps).
  T gate(T eps) {
    Vec<T> sum{};
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      const Vec<T> zi = load(&z[i]), si = T(1) / (T(1) + exp2v(zi * T(-kLog2E))), vi = load(&y[i]) * zi * si;
      store(&s[i], si);
      store(&v[i], vi);
      sum += vi * vi;
    }
    T total = 0;
    for (int64_t i = 0; i < kLanes<T>; i++) total += sum[i];
    return T(1) / std::sqrt(total / T(width) + eps);
  }
};

template <class T>
void norm_forward(const T* y, const T* z, const T* weight, const T* eps, T* out, const NormShape& s, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < s.items; item++) {
    NormRow<T> row(s.width);
    for (int64_t r = s.first(item); r < s.first(item + 1); r++)
      for (int64_t group = 0; group < s.groups; group++) {
        const int64_t at = (r * s.groups + group) * s.width;
        row.fill(row.y, y + at);
        row.fill(row.z, z + r * s.stride + group * s.width);
        const T scale = row.gate(*eps);
        for (int64_t i = 0; i < s.width; i++) out[at + i] = row.v[i] * scale * weight[group * s.width + i];
      }
  }
}

template <class T>
void norm_backward(const T* y, const T* z, const T* weight, const T* eps, const T* dout, T* dy, T* dz, T* dweight,
                   const NormShape& s, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < s.items; item++) {
    NormRow<T> row(s.width);
    T* dw = dweight + item * s.groups * s.width;
    for (int64_t r = s.first(item); r < s.first(item + 1); r++)
      for (int64_t group = 0; group < s.groups; group++) {
        const int64_t at = (r * s.groups + group) * s.width;
        row.fill(row.y, y + at);
        row.fill(row.z, z + r * s.stride + group * s.width);
        row.fill(row.w, weight + group * s.width);
        row.fill(row.g, dout + at);
        const T scale = row.gate(*eps);
        Vec<T> sum{};
        for (int64_t i = 0; i < row.padded; i += kLanes<T>) sum += load(&row.g[i]) * load(&row.w[i]) * load(&row.v[i]);
        T total = 0;
        for (int64_t i = 0; i < kLanes<T>; i++) total += sum[i];
        const T shift = scale * scale * scale * total / T(s.width);
        for (int64_t i = 0; i < s.width; i++) {
          const T g = row.g[i], silu = row.z[i] * row.s[i], dv = g * row.w[i] * scale - shift * row.v[i];
          dw[group * s.width + i] += g * row.v[i] * scale;
          dy[at + i] = dv * silu;
          dz[at + i] = dv * row.y[i] * (row.s[i] + silu * (T(1) - row.s[i]));
        }
      }
  }
}

}  // namespace

#define ESPALIER_EXPORT(T, SUFFIX)                                                                                     \
  extern "C" int64_t scan_width_##SUFFIX() { return kWidth<T>; }                                                       \
  extern "C" void scan_forward_##SUFFIX(const T* x, const T* delta, const T* a, const T* b, const T* c, const T* d,    \
                                        const T* initial, T* y, T* final_state, T* starts, const int64_t* shape,       \
                                        int threads) {                                                                 \
    Shape s;                                                                                                           \
    std::memcpy(&s, shape, sizeof s);                                                                                  \
    scan_forward(x, delta, a, b, c, d, initial, y, final_state, starts, s, threads);                                   \
  }                                                                                                                    \
  extern "C" void scan_backward_##SUFFIX(const T* x, const T* delta, const T* a, const T* b, const T* c, const T* d,   \
                                         const T* starts, const T* dy, const T* dfinal, T* dx, T* ddelta, T* da,       \
                                         T* db, T* dc, T* dd, T* dinitial, const int64_t* shape, int threads) {        \
    Shape s;                                                                                                           \
    std::memcpy(&s, shape, sizeof s);                                                                                  \
    scan_backward(x, delta, a, b, c, d, starts, dy, dfinal, dx, ddelta, da, db, dc, dd, dinitial, s, threads);         \
  }                                                                                                                    \
  extern "C" void conv_forward_##SUFFIX(const T* x, const T* taps, const T* bias, T* y, const int64_t* shape,          \
                                        int threads) {                                                                 \
    ConvShape s;                                                                                                       \
    std::memcpy(&s, shape, sizeof s);                                                                                  \
    conv_forward(x, taps, bias, y, s, threads);                                                                        \
  }                                                                                                                    \
  extern "C" void conv_backward_##SUFFIX(const T* x, const T* taps, const T* bias, const T* dy, T* dx, T* dtaps,       \
                                         T* dbias, const int64_t* shape, int threads) {                                \
    ConvShape s;                                                                                                       \
    std::memcpy(&s, shape, sizeof s);                                                                                  \
    conv_backward(x, taps, bias, dy, dx, dtaps, dbias, s, threads);                                                    \
  }

#define ESPALIER_EXPORT_NORM(T, SUFFIX)                                                                                \
  extern "C" void norm_forward_##SUFFIX(const T* y, const T* z, const T* weight, const T* eps, T* out,                 \
                                        const int64_t* shape, int threads) {                                           \
    NormShape s;                                                                                                       \
    std::memcpy(&s, shape, sizeof s);                                                                                  \
    norm_forward(y, z, weight, eps, out, s, threads);                                                                  \
  }                                                                                                                    \
  extern "C" void norm_backward_##SUFFIX(const T* y, const T* z, const T* weight, const T* eps, const T* dout, T* dy,  \
                                         T* dz, T* dweight, const int64_t* shape, int threads) {                       \
    NormShape s;                                                                                                       \
    std::memcpy(&s, shape, sizeof s);                                                                                  \
    norm_backward(y, z, weight, eps, dout, dy, dz, dweight, s, threads);                                               \
  }

ESPALIER_EXPORT_NORM(float, f32)
ESPALIER_EXPORT_NORM(double, f64)
ESPALIER_EXPORT(float, f32)
ESPALIER_EXPORT(double, f64)
