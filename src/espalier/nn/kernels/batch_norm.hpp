// Batch norm after GELU, by blocks of channels: statistics, and what they make of values and of gradients.

#pragma once

#include "channels.hpp"
#include "gelu.hpp"

namespace {

// What batch norm with given statistics does to a block of channels: scale·value + shift. `a` holds γ, β, the mean, the
// variance and ε by those names of its kernel.
template <class T> struct Affine { Vec<T> scale{}, shift{}; };
template <class A> auto affine(const A& a, int64_t c, int64_t count) {
  using Value = std::remove_cv_t<std::remove_pointer_t<decltype(a.weight)>>;
  Affine<Value> to;
  for (int64_t v = 0; v < kLanes<Value>; v++) {
    const int64_t at = c + std::min(v, count - 1);
    const double scale = double(a.weight[at]) / std::sqrt(double(a.variance[at]) + a.eps);
    to.scale[v] = Value(scale);
    to.shift[v] = Value(double(a.shift[at]) - scale * double(a.mean[at]));
  }
  return to;
}

// The mean, and the sum of squares about it, of few values. Sums are taken about the first of them: it belongs to them,
// so that its distance from their mean costs their number in accuracy at most.
template <class T> struct Moments {
  Vec<T> pivot{}, sum{}, square{};
  int64_t count = 0;
  void add(Vec<T> value) {
    if (!count++) pivot = value;
    const Vec<T> d = value - pivot;
    sum += d;
    square += d * d;
  }
  Vec<T> mean() const { return pivot + sum / T(count); }
  Vec<T> about() const { return square - sum * sum / T(count); }
};

// The same of many, which are brought together from those of few in double precision.
template <class T> struct Total {
  double count = 0, mean[kLanes<T>] = {}, square[kLanes<T>] = {};
  void add(int64_t values, Vec<T> their_mean, Vec<T> about) {
    const double all = count + double(values), share = double(values) / all;
    for (int64_t v = 0; v < kLanes<T>; v++) {
      const double d = double(their_mean[v]) - mean[v];
      mean[v] += d * share;
      square[v] += double(about[v]) + d * d * count * share;
    }
    count = all;
  }
};

// The gradient of u for y = batch norm of g, g = GELU(u), by channels: γ/σ·(dy − dshift/rows − ĝ·dweight/rows)·(Φ + u·φ)
// with ĝ = (g − mean)/σ, where the terms in the middle are left out if the statistics were given. `a` holds γ, the mean,
// the variance, dshift, dweight and ε by those names of its kernel.
template <class T> struct NormGradient {
  Vec<T> scale{}, mean{}, even{}, slope{};
  Vec<T> operator()(Vec<T> u, Vec<T> dy) const {
    const Vec<T> cdf = normal_cdf(u);
    return scale * (dy - even - slope * (u * cdf - mean)) * (cdf + u * normal_density(u));
  }
};
template <class A> auto norm_gradient(const A& a, int64_t rows, bool fixed, int64_t c, int64_t count) {
  using Value = std::remove_cv_t<std::remove_pointer_t<decltype(a.weight)>>;
  NormGradient<Value> to;
  for (int64_t v = 0; v < kLanes<Value>; v++) {
    const int64_t at = c + std::min(v, count - 1);
    const double inverse = 1 / std::sqrt(double(a.variance[at]) + a.eps);
    to.scale[v] = Value(double(a.weight[at]) * inverse);
    to.mean[v] = a.mean[at];
    to.even[v] = fixed ? 0 : Value(double(a.dshift[at]) / double(rows));
    to.slope[v] = fixed ? 0 : Value(double(a.dweight[at]) / double(rows) * inverse);
  }
  return to;
}

}  // namespace
