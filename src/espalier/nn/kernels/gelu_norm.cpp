// y = γ·(GELU(u + bias) − μ)/σ + β (+ residual) over the rows of a channels-last map, forward and backward.
//
// u is (rows, C). A vector of channels at a time goes through all rows, and what the second pass needs lies densely in
// scratch memory: rows that are C numbers apart would compete for a few places of the second cache. Only u is kept for
// the backward pass, where GELU is computed again.

#include "channels.hpp"
#include "gelu.hpp"

namespace {

constexpr int64_t kChunk = 64;  // rows whose sums stay in single precision

struct NormSizes {
  int64_t rows, channels, fixed;  // fixed: statistics are given, as in evaluation, and not the rows' own
};

// Call body(first channel, channels ≤ a vector, scratch of `per_row` vectors a row) for all channels, by cache lines.
template <class S, class Body> void for_each_vector(const NormSizes& s, int64_t per_row, int64_t threads, Body body) {
  using T = Sum<S>;
  constexpr int64_t V = kLanes<T>, line = std::max<int64_t>(V, 64 / int64_t(sizeof(S)));
  parallel((s.channels + line - 1) / line, threads, [&](Items items) {
    Scratch<T> scratch(std::max<int64_t>(1, s.rows) * per_row * V);
    for (int64_t item; items.next(item);)
      for (int64_t c = item * line; c < std::min((item + 1) * line, s.channels); c += V)
        body(c, std::min(V, s.channels - c), scratch.data());
  });
}

// Mean and sum of squares about it, of chunks of rows, brought together in double precision.
template <class T> struct Moments {
  double count = 0, mean[kLanes<T>] = {}, square[kLanes<T>] = {};
  void add(const T* values, int64_t rows) {
    constexpr int64_t V = kLanes<T>;
    Vec<T> sum{}, about{};
    for (int64_t i = 0; i < rows; i++) sum += load(values + i * V);
    const Vec<T> here = sum / T(rows);
    for (int64_t i = 0; i < rows; i++) {
      const Vec<T> d = load(values + i * V) - here;
      about += d * d;
    }
    const double all = count + double(rows);
    for (int64_t v = 0; v < V; v++) {
      const double d = double(here[v]) - mean[v];
      mean[v] += d * double(rows) / all;
      square[v] += double(about[v]) + d * d * count * double(rows) / all;
    }
    count = all;
  }
};

// mean and variance (biased, as the rows are normalised) are given if fixed, else written.
template <class S> struct GeluNormForward {
  int64_t size, threads;
  const S *u, *residual;
  const Sum<S> *bias, *weight, *shift;
  S* y;
  Sum<S> *mean, *variance;
  NormSizes shape;
  double eps;
};

// With given statistics one pass does, along the rows as they lie.
template <class S> void run_fixed(const GeluNormForward<S>& a) {
  using T = Sum<S>;
  constexpr int64_t V = kLanes<T>;
  const int64_t channels = a.shape.channels, rows = a.shape.rows, blocks = (channels + V - 1) / V;
  Room<T> given(3 * blocks * V);
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t c = b * V, count = std::min(V, channels - c);
    const Affine<T> to = affine(a, c, count);
    store(given + 3 * c, a.bias ? read(a.bias + c, count) : Vec<T>{});
    store(given + 3 * c + V, to.scale);
    store(given + 3 * c + 2 * V, to.shift);
  }
  parallel((rows + kChunk - 1) / kChunk, a.threads, [&](Items items) {
    for (int64_t item; items.next(item);)
      for (int64_t r = item * kChunk; r < std::min((item + 1) * kChunk, rows); r++)
        for (int64_t c = 0; c < channels; c += V) {
          const int64_t at = r * channels + c, count = std::min(V, channels - c);
          const Vec<T> x = read(a.u + at, count) + load(given + 3 * c);
          Vec<T> y = x * normal_cdf(x) * load(given + 3 * c + V) + load(given + 3 * c + 2 * V);
          if (a.residual) y += read(a.residual + at, count);
          write(a.y + at, y, count);
        }
  });
}

template <class S> void run(const GeluNormForward<S>& a) {
  using T = Sum<S>;
  constexpr int64_t V = kLanes<T>;
  const NormSizes& s = a.shape;
  if (s.fixed) return run_fixed(a);
  for_each_vector<S>(s, 1, a.threads, [&](int64_t c, int64_t count, T* values) {
    const Vec<T> bias = a.bias ? read(a.bias + c, count) : Vec<T>{};
    Moments<T> moments;
    for (int64_t r0 = 0; r0 < s.rows; r0 += kChunk) {
      const int64_t rows = std::min(kChunk, s.rows - r0);
      for (int64_t r = r0; r < r0 + rows; r++) {
        __builtin_prefetch(a.u + (r + 16) * s.channels + c);
        const Vec<T> x = read(a.u + r * s.channels + c, count) + bias;
        store(values + r * V, x * normal_cdf(x));
      }
      moments.add(values + r0 * V, rows);
    }
    for (int64_t v = 0; v < count; v++) {
      a.mean[c + v] = T(moments.mean[v]);
      a.variance[c + v] = T(moments.square[v] / double(s.rows));
    }
    const Affine<T> to = affine(a, c, count);
    for (int64_t r = 0; r < s.rows; r++) {
      const int64_t at = r * s.channels + c;
      if (a.residual) __builtin_prefetch(a.residual + at + 16 * s.channels);
      Vec<T> y = load(values + r * V) * to.scale + to.shift;
      if (a.residual) y += read(a.residual + at, count);
      write(a.y + at, y, count);
    }
  });
}

// du, and per channel the gradients of bias, weight and shift. With g = GELU(u + bias) and ĝ = (g − μ)/σ:
// dshift = Σ dy, dweight = Σ dy·ĝ, dg = γ/σ·(dy − dshift/rows − ĝ·dweight/rows), the last two terms only if μ and σ are
// the rows' own, and du = dg·(Φ + u·φ).
template <class S> struct GeluNormBackward {
  int64_t size, threads;
  const S *u, *dy;
  const Sum<S> *bias, *weight, *mean, *variance;
  S* du;
  Sum<S> *dbias, *dweight, *dshift;
  NormSizes shape;
  double eps;
};
template <class S> void run(const GeluNormBackward<S>& a) {
  using T = Sum<S>;
  constexpr int64_t V = kLanes<T>;
  const NormSizes& s = a.shape;
  for_each_vector<S>(s, 3, a.threads, [&](int64_t c, int64_t count, T* scratch) {
    const Vec<T> bias = a.bias ? read(a.bias + c, count) : Vec<T>{};
    const Vec<T> mean = read(a.mean + c, count), weight = read(a.weight + c, count);
    Vec<T> inverse;
    for (int64_t v = 0; v < V; v++)
      inverse[v] = T(1 / std::sqrt(double(a.variance[c + std::min(v, count - 1)]) + a.eps));
    double shift_sum[V] = {}, weight_sum[V] = {}, bias_sum[V] = {};
    T* kept = scratch;  // of every row dy, GELU − μ, and the slope of GELU
    for (int64_t r0 = 0; r0 < s.rows; r0 += kChunk) {
      Vec<T> plain{}, weighted{};
      for (int64_t r = r0; r < std::min(r0 + kChunk, s.rows); r++, kept += 3 * V) {
        const int64_t at = r * s.channels + c;
        __builtin_prefetch(a.u + at + 16 * s.channels);
        __builtin_prefetch(a.dy + at + 16 * s.channels);
        const Vec<T> x = read(a.u + at, count) + bias, dy = read(a.dy + at, count), cdf = normal_cdf(x);
        const Vec<T> centred = x * cdf - mean;
        store(kept, dy);
        store(kept + V, centred);
        store(kept + 2 * V, cdf + x * normal_density(x));
        plain += dy;
        weighted += dy * centred;
      }
      for (int64_t v = 0; v < V; v++) shift_sum[v] += plain[v], weight_sum[v] += weighted[v] * inverse[v];
    }
    Vec<T> even{}, slope{};
    for (int64_t v = 0; v < V && !s.fixed; v++) {
      even[v] = T(shift_sum[v] / double(s.rows));
      slope[v] = T(weight_sum[v] / double(s.rows)) * inverse[v];
    }
    const Vec<T> scale = weight * inverse;
    kept = scratch;
    for (int64_t r0 = 0; r0 < s.rows; r0 += kChunk) {
      Vec<T> total{};
      for (int64_t r = r0; r < std::min(r0 + kChunk, s.rows); r++, kept += 3 * V) {
        const Vec<T> du = scale * (load(kept) - even - slope * load(kept + V)) * load(kept + 2 * V);
        total += du;
        write(a.du + r * s.channels + c, du, count);
      }
      for (int64_t v = 0; v < V; v++) bias_sum[v] += total[v];
    }
    for (int64_t v = 0; v < count; v++) {
      a.dshift[c + v] = T(shift_sum[v]);
      a.dweight[c + v] = T(weight_sum[v]);
      a.dbias[c + v] = T(bias_sum[v]);
    }
  });
}

}  // namespace

ESPALIER_KERNEL(gelu_norm_forward, GeluNormForward)
ESPALIER_KERNEL(gelu_norm_backward, GeluNormBackward)
ESPALIER_API int gelu_norm_forward_bf16(const GeluNormForward<bfloat16>* a) { return call(a); }
ESPALIER_API int gelu_norm_backward_bf16(const GeluNormBackward<bfloat16>* a) { return call(a); }
