// The normal distribution's Φ and φ in vectors: GELU(x) = x·Φ(x), with the slope Φ(x) + x·φ(x).

#pragma once

#include "vectors.hpp"

namespace {

constexpr double kRootHalf = 0.7071067811865476, kRootTwoPi = 0.3989422804014327;

// Φ(x) = ½ + x·P(x²), |error| < 2e-7; a minimax polynomial in x² ∈ [0, 5.2²], mapped to [−1, 1]. Below −5.2 it is 0,
// and above 5.2 it is 1, both to less than that.
inline Vec<float> normal_cdf(Vec<float> x) {
  constexpr float c[] = {1.359499990940094e-1f,  -6.774366647005081e-2f, 5.0024520605802536e-2f, -3.99298220872879e-2f,
                         3.198995813727379e-2f,  -2.472362294793129e-2f, 1.7954792827367783e-2f, -1.2505143880844116e-2f,
                         8.559957146644592e-3f,  -4.788997117429972e-3f, 1.8001332646235824e-3f, -1.2215294409543276e-3f,
                         1.2685072142630816e-3f, -4.812653933186084e-4f};
  const Vec<float> v = within(x, 5.2f);
  const Vec<float> t = v * v * 7.396449704142011e-2f - 1.f;
  // By pairs of powers: one after the other, each step would wait for the one before.
  const Vec<float> t2 = t * t, t4 = t2 * t2, t8 = t4 * t4;
  const auto two = [&](int i) { return t * c[i + 1] + c[i]; };
  const auto four = [&](int i) { return two(i + 2) * t2 + two(i); };
  const Vec<float> low = four(4) * t4 + four(0), high = two(12) * t4 + four(8), p = high * t8 + low;
  const Vec<float> cdf = v * p + 0.5f;
  return x < -5.2f ? Vec<float>{} : cdf;
}
inline Vec<float> normal_density(Vec<float> x) { return exp2v(x * x * float(-0.5 * kLog2E)) * float(kRootTwoPi); }

inline Vec<double> normal_cdf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = 0.5 * std::erfc(-x[i] * kRootHalf);
  return x;
}
inline Vec<double> normal_density(Vec<double> x) { return exp2v(x * x * (-0.5 * kLog2E)) * kRootTwoPi; }

}  // namespace
