// The causal depthwise convolution with SiLU, forward and backward, channel-last, for CPUs.

#include "parallel.hpp"
#include "vectors.hpp"

namespace {

// The convolution. x (B, L, C) may have rows farther apart than C (a slice of a wider tensor); taps (C, K), oldest
// first. Blocks of channels in one vectorised inner loop.
constexpr int64_t kConvBlock = 64;
constexpr int64_t kConvPiece = 64;
constexpr int64_t kAhead = 12;  // rows to ask for in advance

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
void conv_forward(const T* x, const T* taps, const T* bias, T* y, const ConvShape& s, int64_t threads) {
  const int64_t blocks = (s.channels + kConvBlock - 1) / kConvBlock;
  parallel(s.batch * blocks, threads, [&](Items items) {
    for (int64_t item; items.next(item);) {
      const int64_t batch = item / blocks, ch = item % blocks * kConvBlock, width = std::min(kConvBlock, s.channels - ch);
      const std::vector<T> packed = pack_taps(taps + ch * s.taps, width, s.taps);
      const T* plane = x + batch * s.length * s.stride + ch;
      T pre[kConvBlock], gate[kConvBlock];
      for (int64_t t = 0; t < s.length; t++) {
        if (t + kAhead < s.length) fetch<kConvBlock>(plane + (t + kAhead) * s.stride, 1, s.stride);
        conv_row(pre, plane, packed.data(), bias ? bias + ch : nullptr, t, width, s);
        sigmoid_row(pre, gate);
        T* out = y + (batch * s.length + t) * s.channels + ch;
        for (int64_t w = 0; w < width; w++) out[w] = pre[w] * gate[w];
      }
    }
  });
}

template <class T>
void conv_backward(const T* x, const T* taps, const T* bias, const T* dy, T* dx, T* dtaps, T* dbias,
                   const ConvShape& s, int64_t threads) {
  const int64_t blocks = (s.channels + kConvBlock - 1) / kConvBlock;
  parallel(s.batch * blocks, threads, [&](Items items) {
    for (int64_t item; items.next(item);) {
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
          if (t + kAhead < s.length) {
            fetch<kConvBlock>(plane + (t + kAhead) * s.stride, 1, s.stride);
            fetch<kConvBlock>(up + kAhead * s.channels, 1, s.channels);
          }
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
  });
}

// What the library is called with; the same structure stands in arguments.py.
template <class T> struct ConvForward {
  int64_t size, threads;
  const T *x, *taps, *bias;
  T* y;
  ConvShape shape;
};
template <class T> void run(const ConvForward<T>& a) {
  conv_forward(a.x, a.taps, a.bias, a.y, a.shape, a.threads);
}

template <class T> struct ConvBackward {
  int64_t size, threads;
  const T *x, *taps, *bias, *dy;
  T *dx, *dtaps, *dbias;
  ConvShape shape;
};
template <class T> void run(const ConvBackward<T>& a) {
  conv_backward(a.x, a.taps, a.bias, a.dy, a.dx, a.dtaps, a.dbias, a.shape, a.threads);
}

}  // namespace

ESPALIER_KERNEL(conv_forward, ConvForward)
ESPALIER_KERNEL(conv_backward, ConvBackward)
