// The causal depthwise convolution with SiLU, forward and backward, channel-last, for CPUs.
//
// x (B, L, C) may have rows farther apart than C (a slice of a wider tensor); taps (C, K), oldest first. A vector of
// channels walks through the tokens with its taps and the last K inputs in registers; on the way back the last K
// gradients stand beside them, as that of token t reaches the inputs t − K + 1 … t.

#include "channels.hpp"

namespace {

constexpr int64_t kConvBlock = 64;  // channels of a piece of work: whole pages are visited seldom
constexpr int64_t kConvPiece = 64;  // tokens that a vector walks before the next one does, and asks for in advance

struct ConvShape { int64_t batch, length, channels, taps, stride; };

// One vector for each tap: in registers where the number K is known, in memory for K = 0.
template <class T, int K> class Rows {
  Vec<T> rows_[K] = {};

 public:
  explicit Rows(int64_t) {}
  Vec<T> get(int64_t k) const { return rows_[k]; }
  void set(int64_t k, Vec<T> v) { rows_[k] = v; }
};
template <class T> class Rows<T, 0> {
  std::vector<T> rows_;

 public:
  explicit Rows(int64_t count) : rows_(count * kLanes<T>) {}
  Vec<T> get(int64_t k) const { return load(&rows_[k * kLanes<T>]); }
  void set(int64_t k, Vec<T> v) { store(&rows_[k * kLanes<T>], v); }
};

// What a vector of channels takes from token to token.
template <class T, int K> struct Column {
  int64_t given, count;  // taps and channels
  Rows<T, K> tap, seen, gradients, sums;
  Vec<T> bias{}, bias_sum{};

  Column(const T* taps_CK, const T* bias_C, int64_t channels, int64_t k)
      : given(k), count(channels), tap(k), seen(k), gradients(k), sums(k) {
    for (int64_t i = 0; i < taps(); i++) {
      Vec<T> row{};
      for (int64_t c = 0; c < count; c++) row[c] = taps_CK[c * k + i];
      tap.set(i, row);
    }
    if (bias_C) bias = read(bias_C, count);
  }
  int64_t taps() const { return K ? K : given; }
  void push(Rows<T, K>& rows, Vec<T> newest) const {
    for (int64_t i = 0; i + 1 < taps(); i++) rows.set(i, rows.get(i + 1));
    rows.set(taps() - 1, newest);
  }
  // Take the next input, and return what goes into SiLU.
  Vec<T> next(const T* x) {
    push(seen, read(x, count));
    Vec<T> sum = bias;
    for (int64_t i = 0; i < taps(); i++) sum += tap.get(i) * seen.get(i);
    return sum;
  }
  // Take the gradient of the next sum, and return that of the input K − 1 tokens earlier.
  Vec<T> back(Vec<T> gradient) {
    push(gradients, gradient);
    Vec<T> sum{};
    for (int64_t i = 0; i < taps(); i++) sum += tap.get(i) * gradients.get(taps() - 1 - i);
    return sum;
  }
};

template <class T> inline Vec<T> sigmoid(Vec<T> v) { return T(1) / (T(1) + exp2v(v * T(-kLog2E))); }

// For every vector of channels call walk(column, first channel, batch, t0, end) along the tokens, and
// finish(column, first channel, batch) after the last.
template <class T, int K, class Walk, class Finish>
void for_each_column(const T* taps, const T* bias, const ConvShape& s, int64_t threads, Walk walk, Finish finish) {
  constexpr int64_t V = kLanes<T>;
  const int64_t blocks = (s.channels + kConvBlock - 1) / kConvBlock;
  parallel(s.batch * blocks, threads, [&](Items items) {
    for (int64_t item; items.next(item);) {
      const int64_t batch = item / blocks, first = item % blocks * kConvBlock;
      std::vector<Column<T, K>> columns;
      for (int64_t c = first; c < std::min(first + kConvBlock, s.channels); c += V)
        columns.emplace_back(taps + c * s.taps, bias ? bias + c : nullptr, std::min(V, s.channels - c), s.taps);
      for (int64_t t = 0; t < s.length; t += kConvPiece)
        for (size_t i = 0; i < columns.size(); i++) {
          Column<T, K> column = std::move(columns[i]);  // a local one stays in registers
          walk(column, first + int64_t(i) * V, batch, t, std::min(t + kConvPiece, s.length));
          columns[i] = std::move(column);
        }
      for (size_t i = 0; i < columns.size(); i++) finish(columns[i], first + int64_t(i) * V, batch);
    }
  });
}

template <class T> struct ConvForward {
  int64_t size, threads;
  const T *x, *taps, *bias;
  T* y;
  ConvShape shape;
};
template <int K, class T> void convolve(const ConvForward<T>& a) {
  const ConvShape& s = a.shape;
  const auto walk = [&](Column<T, K>& column, int64_t c, int64_t batch, int64_t t0, int64_t end) {
    const T* x = a.x + batch * s.length * s.stride + c;
    T* y = a.y + batch * s.length * s.channels + c;
    for (int64_t t = t0; t < end; t++) {
      __builtin_prefetch(x + (t + kConvPiece) * s.stride);
      __builtin_prefetch(y + (t + kConvPiece) * s.channels, 1);
      const Vec<T> sum = column.next(x + t * s.stride);
      write(y + t * s.channels, sum * sigmoid<T>(sum), column.count);
    }
  };
  for_each_column<T, K>(a.taps, a.bias, s, a.threads, walk, [](Column<T, K>&, int64_t, int64_t) {});
}

template <class T> struct ConvBackward {
  int64_t size, threads;
  const T *x, *taps, *bias, *dy;
  T *dx, *dtaps, *dbias;
  ConvShape shape;
};
template <int K, class T> void convolve(const ConvBackward<T>& a) {
  const ConvShape& s = a.shape;
  const auto row = [&](int64_t batch, int64_t t, int64_t c) { return (batch * s.length + t) * s.channels + c; };
  const auto walk = [&](Column<T, K>& column, int64_t c, int64_t batch, int64_t t0, int64_t end) {
    const T *x = a.x + batch * s.length * s.stride + c, *dy = a.dy + row(batch, 0, c);
    T* dx = a.dx + row(batch, 0, c);
    for (int64_t t = t0; t < end; t++) {
      __builtin_prefetch(x + (t + kConvPiece) * s.stride);
      __builtin_prefetch(dx + (t + kConvPiece) * s.channels, 1);
      __builtin_prefetch(dy + (t + kConvPiece) * s.channels);
      const Vec<T> sum = column.next(x + t * s.stride), gate = sigmoid<T>(sum);
      const Vec<T> g = read(dy + t * s.channels, column.count) * gate * (T(1) + sum * (T(1) - gate));
      column.bias_sum += g;
      for (int64_t i = 0; i < column.taps(); i++) column.sums.set(i, column.sums.get(i) + g * column.seen.get(i));
      const Vec<T> earlier = column.back(g);
      const int64_t at = t - column.taps() + 1;
      if (at >= 0) write(dx + at * s.channels, earlier, column.count);
    }
  };
  const auto finish = [&](Column<T, K>& column, int64_t c, int64_t batch) {
    for (int64_t at = s.length - column.taps() + 1; at < s.length; at++) {  // no tokens come after the last
      const Vec<T> earlier = column.back(Vec<T>{});
      if (at >= 0) write(a.dx + row(batch, at, c), earlier, column.count);
    }
    for (int64_t v = 0; v < column.count; v++) {
      for (int64_t i = 0; i < column.taps(); i++) a.dtaps[(batch * s.channels + c + v) * s.taps + i] = column.sums.get(i)[v];
      a.dbias[batch * s.channels + c + v] = column.bias_sum[v];
    }
  };
  for_each_column<T, K>(a.taps, a.bias, s, a.threads, walk, finish);
}

template <class A> void run_for_taps(const A& a) {
  switch (a.shape.taps) {
    case 2: return convolve<2>(a);
    case 3: return convolve<3>(a);
    case 4: return convolve<4>(a);
    default: convolve<0>(a);
  }
}
template <class T> void run(const ConvForward<T>& a) { run_for_taps(a); }
template <class T> void run(const ConvBackward<T>& a) { run_for_taps(a); }

}  // namespace

ESPALIER_KERNEL(conv_forward, ConvForward)
ESPALIER_KERNEL(conv_backward, ConvBackward)
