// Mamba-2's gated norm, forward and backward, for CPUs.

#include "parallel.hpp"
#include "vectors.hpp"

namespace {

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
void norm_forward(const T* y, const T* z, const T* weight, T eps, T* out, const NormShape& s, int64_t threads) {
  parallel(s.items, threads, [&](Items items) {
    for (int64_t item; items.next(item);) {
      NormRow<T> row(s.width);
      for (int64_t r = s.first(item); r < s.first(item + 1); r++)
        for (int64_t group = 0; group < s.groups; group++) {
          const int64_t at = (r * s.groups + group) * s.width;
          row.fill(row.y, y + at);
          row.fill(row.z, z + r * s.stride + group * s.width);
          const T scale = row.gate(eps);
          for (int64_t i = 0; i < s.width; i++) out[at + i] = row.v[i] * scale * weight[group * s.width + i];
        }
    }
  });
}

template <class T>
void norm_backward(const T* y, const T* z, const T* weight, T eps, const T* dout, T* dy, T* dz, T* dweight,
                   const NormShape& s, int64_t threads) {
  parallel(s.items, threads, [&](Items items) {
    for (int64_t item; items.next(item);) {
      NormRow<T> row(s.width);
      T* dw = dweight + item * s.groups * s.width;
      for (int64_t r = s.first(item); r < s.first(item + 1); r++)
        for (int64_t group = 0; group < s.groups; group++) {
          const int64_t at = (r * s.groups + group) * s.width;
          row.fill(row.y, y + at);
          row.fill(row.z, z + r * s.stride + group * s.width);
          row.fill(row.w, weight + group * s.width);
          row.fill(row.g, dout + at);
          const T scale = row.gate(eps);
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
  });
}

template <class T> struct NormForward {
  int64_t size, threads;
  const T *y, *z, *weight;
  T* out;
  NormShape shape;
  double eps;
};
template <class T> void run(const NormForward<T>& a) {
  norm_forward(a.y, a.z, a.weight, T(a.eps), a.out, a.shape, a.threads);
}

template <class T> struct NormBackward {
  int64_t size, threads;
  const T *y, *z, *weight, *dout;
  T *dy, *dz, *dweight;
  NormShape shape;
  double eps;
};
template <class T> void run(const NormBackward<T>& a) {
  norm_backward(a.y, a.z, a.weight, T(a.eps), a.dout, a.dy, a.dz, a.dweight, a.shape, a.threads);
}

}  // namespace

ESPALIER_KERNEL(norm_forward, NormForward)
ESPALIER_KERNEL(norm_backward, NormBackward)
