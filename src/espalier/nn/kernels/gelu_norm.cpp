// y = γ·(GELU(u + bias) − μ)/σ + β (+ residual) over the rows of a channels-last map, forward and backward.
//
// u is (rows, C). Every pass goes along the rows as they lie in memory: a walk down the columns reads at a third of the
// speed. Only u is kept; GELU is computed again in every pass, which is cheaper than to fetch it.

#include "batch_norm.hpp"

namespace {

constexpr int64_t kChunk = 64;  // rows whose sums stay in single precision

struct NormSizes {
  int64_t rows, channels, fixed;  // fixed: statistics are given, as in evaluation, and not the rows' own
  int64_t chunks() const { return (rows + kChunk - 1) / kChunk; }
};

// Numbers for each channel in whole vectors, several kinds of them one after the other.
template <class T> class Columns {
 public:
  explicit Columns(int64_t channels, int64_t kinds)
      : width_((channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>), numbers_(kinds * width_) {}
  T* at(int64_t kind, int64_t c) { return numbers_ + kind * width_ + c; }

 private:
  int64_t width_;
  Room<T> numbers_;
};

// Call body(first channel, channels ≤ a vector) for all channels.
template <class T, class Body> void for_each_vector(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + kLanes<T> <= channels; c += kLanes<T>) body(c, int64_t(kLanes<T>));
  if (c < channels) body(c, channels - c);
}

// Call body(columns of `kinds`, first row, end, chunk) for all rows, kChunk at a time.
template <class T, class Body> void for_each_chunk(const NormSizes& s, int64_t kinds, int64_t threads, Body body) {
  parallel(s.chunks(), threads, [&](Items items) {
    Columns<T> columns(s.channels, kinds);
    for (int64_t item; items.next(item);)
      body(columns, item * kChunk, std::min((item + 1) * kChunk, s.rows), item);
  });
}

template <class T> Vec<T> given(const T* bias, int64_t c, int64_t count) {
  return bias ? read(bias + c, count) : Vec<T>{};
}

// mean and variance (biased, as the rows are normalised) are given if fixed, else written. `moments` (parts, 2, C) are
// the mean and the sum of squares about it of every rows/parts rows, where they are known; then no bias may be added.
template <class S> struct GeluNormForward {
  int64_t size, threads;
  const S *u, *residual;
  const Sum<S> *bias, *weight, *shift, *moments;
  S* y;
  Sum<S> *mean, *variance;
  NormSizes shape;
  int64_t parts;
  double eps;
};

// The moments of every chunk of rows.
template <class S, class T = Sum<S>> void gather(const GeluNormForward<S>& a, T* moments) {
  const int64_t channels = a.shape.channels;
  for_each_chunk<T>(a.shape, 3, a.threads, [&](Columns<T>& kept, int64_t begin, int64_t end, int64_t chunk) {
    for (int64_t r = begin; r < end; r++)
      for_each_vector<T>(channels, [&](int64_t c, int64_t count) {
        const Vec<T> x = read(a.u + r * channels + c, count) + given(a.bias, c, count);
        Moments<T> m{load(kept.at(0, c)), load(kept.at(1, c)), load(kept.at(2, c)), r - begin};
        if (r == begin) m = {};
        m.add(x * normal_cdf(x));
        store(kept.at(0, c), m.pivot);
        store(kept.at(1, c), m.sum);
        store(kept.at(2, c), m.square);
      });
    T* to = moments + chunk * 2 * channels;
    for_each_vector<T>(channels, [&](int64_t c, int64_t count) {
      const Moments<T> m{load(kept.at(0, c)), load(kept.at(1, c)), load(kept.at(2, c)), end - begin};
      write(to + c, m.mean(), count);
      write(to + channels + c, m.about(), count);
    });
  });
}

// Write mean and variance of all rows from the moments of every `per` of them.
template <class S, class T = Sum<S>> void bring_together(const GeluNormForward<S>& a, const T* moments, int64_t per) {
  const int64_t channels = a.shape.channels, rows = a.shape.rows;
  for_each_vector<T>(channels, [&](int64_t c, int64_t count) {
    Total<T> total;
    const T* part = moments + c;
    for (int64_t r = 0; r < rows; r += per, part += 2 * channels)
      total.add(std::min(per, rows - r), read(part, count), read(part + channels, count));
    for (int64_t v = 0; v < count; v++) {
      a.mean[c + v] = T(total.mean[v]);
      a.variance[c + v] = T(total.square[v] / double(rows));
    }
  });
}

template <class S> void run(const GeluNormForward<S>& a) {
  using T = Sum<S>;
  const NormSizes& s = a.shape;
  if (!s.fixed && a.moments) bring_together(a, a.moments, s.rows / a.parts);
  if (!s.fixed && !a.moments) {
    Scratch<T> moments(s.chunks() * 2 * s.channels);
    gather(a, moments.data());
    bring_together(a, moments.data(), kChunk);
  }
  Columns<T> affines(s.channels, 2);
  for_each_vector<T>(s.channels, [&](int64_t c, int64_t count) {
    const Affine<T> to = affine(a, c, count);
    store(affines.at(0, c), to.scale);
    store(affines.at(1, c), to.shift);
  });
  for_each_chunk<T>(s, 0, a.threads, [&](Columns<T>&, int64_t begin, int64_t end, int64_t) {
    for (int64_t r = begin; r < end; r++)
      for_each_vector<T>(s.channels, [&](int64_t c, int64_t count) {
        const int64_t at = r * s.channels + c;
        const Vec<T> x = read(a.u + at, count) + given(a.bias, c, count);
        Vec<T> y = x * normal_cdf(x) * load(affines.at(0, c)) + load(affines.at(1, c));
        if (a.residual) y += read(a.residual + at, count);
        write(a.y + at, y, count);
      });
  });
}

// dweight, dshift, and unless du is null, du and dbias: see NormGradient. With g = GELU(u + bias): dshift = Σ dy,
// dweight = Σ dy·(g − μ)/σ, dbias = Σ du.
template <class S> struct GeluNormBackward {
  int64_t size, threads;
  const S *u, *dy;
  const Sum<S> *bias, *weight, *mean, *variance;
  S* du;
  Sum<S> *dbias, *dweight, *dshift;
  NormSizes shape;
  double eps;
};

// Write the sums of all chunks' sums, which lie `step` apart, times a factor.
template <class T> void add_up(const NormSizes& s, const T* sums, int64_t step, T* to, const double* factors) {
  std::vector<double> total(size_t(s.channels));
  for (int64_t chunk = 0; chunk < s.chunks(); chunk++, sums += step)
    for (int64_t c = 0; c < s.channels; c++) total[size_t(c)] += sums[c];
  for (int64_t c = 0; c < s.channels; c++) to[c] = T(total[size_t(c)] * (factors ? factors[c] : 1));
}

template <class S, class T = Sum<S>> void gather(const GeluNormBackward<S>& a, T* sums) {
  const int64_t channels = a.shape.channels;
  for_each_chunk<T>(a.shape, 2, a.threads, [&](Columns<T>& kept, int64_t begin, int64_t end, int64_t chunk) {
    for (int64_t r = begin; r < end; r++)
      for_each_vector<T>(channels, [&](int64_t c, int64_t count) {
        const int64_t at = r * channels + c;
        const Vec<T> x = read(a.u + at, count) + given(a.bias, c, count), dy = read(a.dy + at, count);
        const Vec<T> weighted = dy * (x * normal_cdf(x) - read(a.mean + c, count));
        store(kept.at(0, c), r == begin ? dy : load(kept.at(0, c)) + dy);
        store(kept.at(1, c), r == begin ? weighted : load(kept.at(1, c)) + weighted);
      });
    for (int64_t kind = 0; kind < 2; kind++)
      std::memcpy(sums + (chunk * 2 + kind) * channels, kept.at(kind, 0), size_t(channels) * sizeof(T));
  });
}

template <class S> void run(const GeluNormBackward<S>& a) {
  using T = Sum<S>;
  const NormSizes& s = a.shape;
  Scratch<T> sums(s.chunks() * 2 * s.channels);
  gather(a, sums.data());
  std::vector<double> inverses(size_t(s.channels));
  for (int64_t c = 0; c < s.channels; c++) inverses[size_t(c)] = 1 / std::sqrt(double(a.variance[c]) + a.eps);
  add_up(s, sums.data(), 2 * s.channels, a.dshift, nullptr);
  add_up(s, sums.data() + s.channels, 2 * s.channels, a.dweight, inverses.data());
  if (!a.du) return;

  Columns<T> constants(s.channels, 5);
  for_each_vector<T>(s.channels, [&](int64_t c, int64_t count) {
    const NormGradient<T> g = norm_gradient(a, s.rows, s.fixed, c, count);
    const Vec<T> values[] = {g.scale, g.mean, g.even, g.slope, given(a.bias, c, count)};
    for (int64_t kind = 0; kind < 5; kind++) store(constants.at(kind, c), values[kind]);
  });
  for_each_chunk<T>(s, 1, a.threads, [&](Columns<T>& kept, int64_t begin, int64_t end, int64_t chunk) {
    for (int64_t r = begin; r < end; r++)
      for_each_vector<T>(s.channels, [&](int64_t c, int64_t count) {
        const int64_t at = r * s.channels + c;
        const auto constant = [&](int64_t kind) { return load(constants.at(kind, c)); };
        const NormGradient<T> gradient{constant(0), constant(1), constant(2), constant(3)};
        const Vec<T> du = gradient(read(a.u + at, count) + constant(4), read(a.dy + at, count));
        write(a.du + at, du, count);
        store(kept.at(0, c), r == begin ? du : load(kept.at(0, c)) + du);
      });
    std::memcpy(sums.data() + chunk * s.channels, kept.at(0, 0), size_t(s.channels) * sizeof(T));
  });
  add_up(s, sums.data(), s.channels, a.dbias, nullptr);
}

}  // namespace

ESPALIER_KERNEL(gelu_norm_forward, GeluNormForward)
ESPALIER_KERNEL(gelu_norm_backward, GeluNormBackward)
ESPALIER_API int gelu_norm_forward_bf16(const GeluNormForward<bfloat16>* a) { return call(a); }
ESPALIER_API int gelu_norm_backward_bf16(const GeluNormBackward<bfloat16>* a) { return call(a); }
