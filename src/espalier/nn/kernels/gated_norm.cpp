// Mamba-2's gated norm, forward and backward, for CPUs.

#include "channels.hpp"

namespace {

// The gated norm: out = weight · v / √(mean(v²) + eps), v = y · SiLU(z), the mean over each of `groups` parts of a row.
// y and out are (rows, groups · width), z has rows `stride` apart. Rows are shared out in `items` parts; each gathers its
// own share of the weight's gradient.
struct NormShape {
  int64_t rows, groups, width, stride, items;
  int64_t first(int64_t item) const { return rows * item / items; }
};

template <class T> inline T total(Vec<T> v) {
  T sum = 0;
  for (int64_t i = 0; i < kLanes<T>; i++) sum += v[i];
  return sum;
}

// Call body(where it begins, numbers ≤ a vector) along a group of a row.
template <class T, class Body> inline void along(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= width; i += kLanes<T>) body(i, kLanes<T>);
  if (i < width) body(i, width - i);
}

// Call body(y, z, weight's group, offset in y) for every group of every row of a piece of work.
template <class T, class Body> void for_each_group(const NormShape& s, int64_t item, const T* y, const T* z, Body body) {
  for (int64_t r = s.first(item); r < s.first(item + 1); r++)
    for (int64_t group = 0; group < s.groups; group++) {
      const int64_t at = (r * s.groups + group) * s.width;
      body(y + at, z + r * s.stride + group * s.width, group * s.width, at);
    }
}

template <class T>
void norm_forward(const T* y, const T* z, const T* weight, T eps, T* out, const NormShape& s, int64_t threads) {
  parallel(s.items, threads, [&](Items items) {
    Room<T> gated(s.width + kLanes<T>);
    for (int64_t item; items.next(item);)
      for_each_group(s, item, y, z, [&](const T* yr, const T* zr, int64_t group, int64_t at) {
        Vec<T> squares{};
        along<T>(s.width, [&](int64_t i, int64_t n) {
          const Vec<T> zi = read(zr + i, n), v = read(yr + i, n) * zi / (T(1) + exp2v(zi * T(-kLog2E)));
          store(gated + i, v);
          squares += v * v;
        });
        const T scale = T(1) / std::sqrt(total<T>(squares) / T(s.width) + eps);
        along<T>(s.width, [&](int64_t i, int64_t n) {
          write(out + at + i, load(gated + i) * read(weight + group + i, n) * scale, n);
        });
      });
  });
}

template <class T>
void norm_backward(const T* y, const T* z, const T* weight, T eps, const T* dout, T* dy, T* dz, T* dweight,
                   const NormShape& s, int64_t threads) {
  parallel(s.items, threads, [&](Items items) {
    Room<T> sigmoids(s.width + kLanes<T>);
    for (int64_t item; items.next(item);) {
      T* dw = dweight + item * s.groups * s.width;
      for_each_group(s, item, y, z, [&](const T* yr, const T* zr, int64_t group, int64_t at) {
        Vec<T> squares{}, along_v{};
        along<T>(s.width, [&](int64_t i, int64_t n) {
          const Vec<T> zi = read(zr + i, n), si = T(1) / (T(1) + exp2v(zi * T(-kLog2E))), v = read(yr + i, n) * zi * si;
          store(sigmoids + i, si);
          squares += v * v;
          along_v += read(dout + at + i, n) * read(weight + group + i, n) * v;
        });
        const T scale = T(1) / std::sqrt(total<T>(squares) / T(s.width) + eps);
        const T shift = scale * scale * scale * total<T>(along_v) / T(s.width);
        along<T>(s.width, [&](int64_t i, int64_t n) {
          const Vec<T> yi = read(yr + i, n), zi = read(zr + i, n), si = load(sigmoids + i), silu = zi * si, v = yi * silu;
          const Vec<T> g = read(dout + at + i, n), dv = g * read(weight + group + i, n) * scale - shift * v;
          write(dw + group + i, read(dw + group + i, n) + g * v * scale, n);
          write(dy + at + i, dv * silu, n);
          write(dz + at + i, dv * yi * (si + silu * (T(1) - si)), n);
        });
      });
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
