// The selective scan of Mamba-1, forward and backward, for CPUs.
//
// Layouts are row-major and channel-last: x, delta, y (B, L, E); a (E, N); b, c (B, L, N); states (B, E, N). A block of
// W channels advances together, one vector lane a channel, and all N states of a block stay in the first cache. Time is
// cut into pieces of K steps; the forward pass keeps the state at each piece's start, the backward pass recomputes the
// piece from it. Work is shared out by (batch entry, group of blocks), never by thread, so results do not depend on how
// many threads there are.

#include "parallel.hpp"
#include "vectors.hpp"

namespace {

struct Shape {
  int64_t batch, length, channels, states, piece, groups, gate_stride, softplus;
  int64_t pieces() const { return (length + piece - 1) / piece; }
};

// Copy (steps × channels) out of a plane with rows of `stride` into one tile (K × W) a block, and back: row by row, as
// memory likes it.
template <class T>
void tiles_in(T* tiles, const T* plane, int64_t steps, int64_t K, int64_t stride, int64_t channels) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t t = 0; t < steps; t++)
    for (int64_t e = 0; e < channels; e += W) {
      T* to = tiles + e * K + t * W;
      if (channels - e >= W) std::memcpy(to, plane + t * stride + e, W * sizeof(T));
      else std::memcpy(to, plane + t * stride + e, size_t(channels - e) * sizeof(T));
    }
}
template <class T>
void tiles_out(T* plane, const T* tiles, int64_t steps, int64_t K, int64_t stride, int64_t channels) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t t = 0; t < steps; t++)
    for (int64_t e = 0; e < channels; e += W) {
      const T* from = tiles + e * K + t * W;
      if (channels - e >= W) std::memcpy(plane + t * stride + e, from, W * sizeof(T));
      else std::memcpy(plane + t * stride + e, from, size_t(channels - e) * sizeof(T));
    }
}
// An (E, N) matrix, transposed to (N × width), and back.
template <class T> void state_in(T* tile, const T* rows, int64_t n_states, int64_t width, T scale) {
  for (int64_t n = 0; n < n_states; n++)
    for (int64_t w = 0; w < kWidth<T>; w++) tile[n * kWidth<T> + w] = w < width ? rows[w * n_states + n] * scale : T(0);
}
template <class T> void state_out(T* rows, const T* tile, int64_t n_states, int64_t width) {
  for (int64_t n = 0; n < n_states; n++)
    for (int64_t w = 0; w < width; w++) rows[w * n_states + n] = tile[n * kWidth<T> + w];
}

// What one piece of work owns: some blocks of channels of one batch entry.
struct Work {
  int64_t batch, first, blocks, start, channels;
  Work(const Shape& s, int64_t item, int64_t width) : batch(item / s.groups) {
    const int64_t all = (s.channels + width - 1) / width, g = item % s.groups;
    first = all * g / s.groups;
    blocks = all * (g + 1) / s.groups - first;
    start = first * width;
    channels = std::min(blocks * width, s.channels - start);
  }
};

template <class T> inline Vec<T> sigmoid(Vec<T> v) { return T(1) / (T(1) + exp2v(v * T(-kLog2E))); }

// log(1 + e^v) = max(v, 0) + 2 artanh(e/(2 + e)) with e = e^−|v|: small results keep all their digits.
inline Vec<float> softplus(Vec<float> v) {
  const Vec<float> zero{}, e = exp2v((v > zero ? -v : v) * float(kLog2E)), s = e / (2.f + e), q = s * s;
  Vec<float> series = q * (1.f / 13) + 1.f / 11;
  series = series * q + 1.f / 9;
  series = series * q + 1.f / 7;
  series = series * q + 1.f / 5;
  series = series * q + 1.f / 3;
  series = series * q + 1.f;
  return (v > zero ? v : zero) + 2.f * s * series;
}
inline Vec<double> softplus(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; i++) v[i] = std::max(v[i], 0.0) + std::log1p(std::exp(-std::abs(v[i])));
  return v;
}

// Δ of one tile from what gives it, in place; `slopes`, if given, takes ∂Δ.
template <class T>
void steps_from(T* deltas, const T* bias, T* slopes, int64_t steps) {
  constexpr int64_t W = kWidth<T>, V = kLanes<T>;
  for (int64_t w = 0; w < steps * W; w += V) {
    const Vec<T> v = load(deltas + w) + load(bias + w % W);
    store(deltas + w, softplus(v));
    if (slopes) store(slopes + w, sigmoid<T>(v));
  }
}

// One piece of one block, forwards: ys from the state, which moves on.
template <class T>
inline void advance(const T* xs, const T* deltas, const T* rates, const T* b, const T* c, T* state, T* ys,
                    int64_t steps, int64_t N) {
  constexpr int64_t W = kWidth<T>, V = kLanes<T>;
  for (int64_t t = 0; t < steps; t++)
    for (int64_t v = 0; v < W; v += V) {
      const Vec<T> dt = load(deltas + t * W + v), u = dt * load(xs + t * W + v);
      Vec<T> sum{};
      for (int64_t n = 0; n < N; n++) {
        const Vec<T> h = exp2v(dt * load(rates + n * W + v)) * load(state + n * W + v) + u * b[t * N + n];
        store(state + n * W + v, h);
        sum += h * c[t * N + n];
      }
      store(ys + t * W + v, sum);
    }
}

template <class T>
void scan_forward(const T* x, const T* delta, const T* bias, const T* a, const T* b, const T* c, const T* d,
                  const T* gate, const T* initial, T* y, T* final_state, T* starts, const Shape& s, int64_t threads) {
  constexpr int64_t W = kWidth<T>, V = kLanes<T>;
  const int64_t N = s.states, K = s.piece, all_blocks = (s.channels + W - 1) / W;
  parallel(s.batch * s.groups, threads, [&](Items items) {
    for (int64_t item; items.next(item);) {
      const Work work(s, item, W);
      const int64_t tile = K * W, tiles = work.blocks * tile, block = N * W;
      Room<T> rates(work.blocks * block), state(work.blocks * block), skip(work.blocks * W), shift(work.blocks * W);
      Room<T> xs(tiles), deltas(tiles), gates(tiles), ys(tiles);
      if (d) std::memcpy(skip, d + work.start, size_t(work.channels) * sizeof(T));
      if (bias) std::memcpy(shift, bias + work.start, size_t(work.channels) * sizeof(T));
      for (int64_t i = 0; i < work.blocks; i++) {
        const int64_t e = work.start + i * W, width = std::min(W, s.channels - e);
        state_in(&rates[i * block], a + e * N, N, width, T(kLog2E));
        if (initial) state_in(&state[i * block], initial + (work.batch * s.channels + e) * N, N, width, T(1));
      }
      for (int64_t p = 0; p < s.pieces(); p++) {
        const int64_t t0 = p * K, steps = std::min(K, s.length - t0), row = work.batch * s.length + t0;
        const int64_t at = row * s.channels + work.start;
        if (starts)
          std::memcpy(starts + ((work.batch * s.pieces() + p) * all_blocks + work.first) * block, state,
                      size_t(work.blocks * block) * sizeof(T));
        tiles_in<T>(xs, x + at, steps, K, s.channels, work.channels);
        tiles_in<T>(deltas, delta + at, steps, K, s.channels, work.channels);
        if (gate) tiles_in<T>(gates, gate + row * s.gate_stride + work.start, steps, K, s.gate_stride, work.channels);
        for (int64_t i = 0; i < work.blocks; i++) {
          const int64_t next = std::min(K, s.length - t0 - steps), there = at + steps * s.channels + i * W;
          fetch<W>(x + there, next, s.channels);
          fetch<W>(delta + there, next, s.channels);
          if (gate) fetch<W>(gate + (row + steps) * s.gate_stride + work.start + i * W, next, s.gate_stride);
          if (s.softplus) steps_from<T>(&deltas[i * tile], &shift[i * W], nullptr, steps);
          advance(&xs[i * tile], &deltas[i * tile], &rates[i * block], b + row * N, c + row * N, &state[i * block],
                  &ys[i * tile], steps, N);
          for (int64_t w = 0; w < steps * W; w += V) {
            T* out = &ys[i * tile + w];
            Vec<T> value = load(out) + load(&skip[i * W + w % W]) * load(&xs[i * tile + w]);
            if (gate) value *= load(&gates[i * tile + w]) * sigmoid<T>(load(&gates[i * tile + w]));
            store(out, value);
          }
        }
        tiles_out<T>(y + at, ys, steps, K, s.channels, work.channels);
      }
      for (int64_t i = 0; i < work.blocks; i++) {
        const int64_t e = work.start + i * W;
        state_out(final_state + (work.batch * s.channels + e) * N, &state[i * block], N, std::min(W, s.channels - e));
      }
    }
  });
}

// One piece of one block, backwards: recompute states and decays, then walk back with the state's gradient in `carry`.
template <class T> struct Piece {
  Room<T> states, decays;
  Piece(int64_t K, int64_t N) : states((K + 1) * N * kWidth<T>), decays(K * N * kWidth<T>) {}

  void recompute(const T* xs, const T* deltas, const T* rates, const T* start, const T* b, int64_t steps, int64_t N) {
    constexpr int64_t W = kWidth<T>, V = kLanes<T>;
    std::memcpy(states, start, size_t(N * W) * sizeof(T));
    for (int64_t t = 0; t < steps; t++)
      for (int64_t v = 0; v < W; v += V) {
        const Vec<T> dt = load(deltas + t * W + v), u = dt * load(xs + t * W + v);
        const T *before = &states[t * N * W + v];
        T *after = &states[(t + 1) * N * W + v], *decay = &decays[t * N * W + v];
        for (int64_t n = 0; n < N; n++) {
          Vec<T> q = exp2v(dt * load(rates + n * W + v));
          store(decay + n * W, q);
          store(after + n * W, q * load(before + n * W) + u * b[t * N + n]);
        }
      }
  }

  // The gradients of x and delta replace them in `xs` and `deltas`; with a gate, `dys` come in as those of the gated
  // outputs and the gate's gradients replace it in `gates`. rates_grad gathers Σ_t g·q·h·Δ and skip_grad Σ_t x·∂y;
  // b_sums and c_sums (K × N × lanes) gather over channels and are reduced by the caller.
  void walk_back(T* xs, T* deltas, T* gates, const T* dys, const T* rates, const T* skip, T* carry, T* rates_grad,
                 T* skip_grad, const T* b, const T* c, T* b_sums, T* c_sums, int64_t steps, int64_t N) {
    constexpr int64_t W = kWidth<T>, V = kLanes<T>;
    for (int64_t t = steps - 1; t >= 0; t--)
      for (int64_t v = 0; v < W; v += V) {
        const Vec<T> dt = load(deltas + t * W + v), xt = load(xs + t * W + v), u = dt * xt, out = load(dys + t * W + v);
        const T *before = &states[t * N * W + v], *after = &states[(t + 1) * N * W + v];
        const T* decay = &decays[t * N * W + v];
        Vec<T> dy = out, s{}, z{};
        if (gates) z = load(gates + t * W + v), s = sigmoid<T>(z), dy = out * z * s;
        Vec<T> du{}, ddt{}, y = load(skip + v) * xt;
        for (int64_t n = 0; n < N; n++) {
          const Vec<T> h = load(after + n * W), g = load(carry + n * W + v) + dy * c[t * N + n];
          T *bs = b_sums + (t * N + n) * V, *cs = c_sums + (t * N + n) * V;
          y += h * c[t * N + n];
          store(cs, load(cs) + dy * h);
          store(bs, load(bs) + g * u);
          du += g * b[t * N + n];
          const Vec<T> gq = g * load(decay + n * W), p = gq * load(before + n * W);
          ddt += p * load(rates + n * W + v);
          store(rates_grad + n * W + v, load(rates_grad + n * W + v) + p * dt);
          store(carry + n * W + v, gq);
        }
        store(skip_grad + v, load(skip_grad + v) + xt * dy);
        store(xs + t * W + v, du * dt + load(skip + v) * dy);
        store(deltas + t * W + v, ddt * T(1 / kLog2E) + du * xt);
        if (gates) store(gates + t * W + v, out * y * s * (T(1) + z * (T(1) - s)));
      }
  }
};

template <class T> void sum_lanes(T* out, const T* sums, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    Vec<T> v = load(&sums[i * kLanes<T>]);
    T total = 0;
    for (int64_t lane = 0; lane < kLanes<T>; lane++) total += v[lane];
    out[i] = total;
  }
}

template <class T> struct Gradients {
  T *dx, *ddelta, *dbias, *da, *db, *dc, *dd, *dgate, *dinitial;
};

template <class T>
void scan_backward(const T* x, const T* delta, const T* bias, const T* a, const T* b, const T* c, const T* d,
                   const T* gate, const T* starts, const T* dy, const T* dfinal, Gradients<T> to, const Shape& s, int64_t threads) {
  constexpr int64_t W = kWidth<T>, V = kLanes<T>;
  const int64_t N = s.states, K = s.piece, all_blocks = (s.channels + W - 1) / W;
  parallel(s.batch * s.groups, threads, [&](Items items) {
    for (int64_t item; items.next(item);) {
      const Work work(s, item, W);
      const int64_t tile = K * W, tiles = work.blocks * tile, block = N * W;
      Room<T> rates(work.blocks * block), carry(work.blocks * block), rates_grad(work.blocks * block);
      Room<T> skip(work.blocks * W), shift(work.blocks * W), skip_grad(work.blocks * W), shift_grad(work.blocks * W);
      Room<T> xs(tiles), deltas(tiles), slopes(tile), dys(tiles), gates(tiles), b_sums(K * N * V), c_sums(K * N * V);
      if (d) std::memcpy(skip, d + work.start, size_t(work.channels) * sizeof(T));
      if (bias) std::memcpy(shift, bias + work.start, size_t(work.channels) * sizeof(T));
      for (int64_t i = 0; i < work.blocks; i++) {
        const int64_t e = work.start + i * W, width = std::min(W, s.channels - e);
        state_in(&rates[i * block], a + e * N, N, width, T(kLog2E));
        if (dfinal) state_in(&carry[i * block], dfinal + (work.batch * s.channels + e) * N, N, width, T(1));
      }
      Piece<T> piece(K, N);
      for (int64_t p = s.pieces() - 1; p >= 0; p--) {
        const int64_t t0 = p * K, steps = std::min(K, s.length - t0), row = work.batch * s.length + t0;
        const int64_t at = row * s.channels + work.start;
        std::memset(b_sums, 0, size_t(K * N * V) * sizeof(T));
        std::memset(c_sums, 0, size_t(K * N * V) * sizeof(T));
        tiles_in<T>(xs, x + at, steps, K, s.channels, work.channels);
        tiles_in<T>(deltas, delta + at, steps, K, s.channels, work.channels);
        tiles_in<T>(dys, dy + at, steps, K, s.channels, work.channels);
        if (gate) tiles_in<T>(gates, gate + row * s.gate_stride + work.start, steps, K, s.gate_stride, work.channels);
        const T* start = starts + ((work.batch * s.pieces() + p) * all_blocks + work.first) * block;
        for (int64_t i = 0; i < work.blocks; i++) {
          T *xi = &xs[i * tile], *di = &deltas[i * tile], *ri = &rates[i * block];
          const int64_t next = std::min(K, t0), there = at - next * s.channels + i * W;
          fetch<W>(x + there, next, s.channels);
          fetch<W>(delta + there, next, s.channels);
          fetch<W>(dy + there, next, s.channels);
          if (gate) fetch<W>(gate + (row - next) * s.gate_stride + work.start + i * W, next, s.gate_stride);
          if (s.softplus) steps_from<T>(di, &shift[i * W], slopes, steps);
          piece.recompute(xi, di, ri, start + i * block, b + row * N, steps, N);
          piece.walk_back(xi, di, gate ? &gates[i * tile] : nullptr, &dys[i * tile], ri, &skip[i * W], &carry[i * block],
                          &rates_grad[i * block], &skip_grad[i * W], b + row * N, c + row * N, b_sums,
                          c_sums, steps, N);
          for (int64_t w = 0; s.softplus && w < steps * W; w += V) {
            T* sum = &shift_grad[i * W + w % W];
            const Vec<T> gradient = load(di + w) * load(&slopes[w]);
            store(di + w, gradient);
            store(sum, load(sum) + gradient);
          }
        }
        tiles_out<T>(to.dx + at, xs, steps, K, s.channels, work.channels);
        tiles_out<T>(to.ddelta + at, deltas, steps, K, s.channels, work.channels);
        if (gate) tiles_out<T>(to.dgate + at, gates, steps, K, s.channels, work.channels);
        sum_lanes<T>(to.db + (item * s.length + t0) * N, b_sums, steps * N);
        sum_lanes<T>(to.dc + (item * s.length + t0) * N, c_sums, steps * N);
      }
      for (int64_t i = 0; i < work.blocks; i++) {
        const int64_t e = work.start + i * W, at = work.batch * s.channels + e, width = std::min(W, s.channels - e);
        state_out(to.da + at * N, &rates_grad[i * block], N, width);
        state_out(to.dinitial + at * N, &carry[i * block], N, width);
        std::memcpy(to.dd + at, &skip_grad[i * W], size_t(width) * sizeof(T));
        std::memcpy(to.dbias + at, &shift_grad[i * W], size_t(width) * sizeof(T));
      }
    }
  });
}

template <class T> struct ScanForward {
  int64_t size, threads;
  const T *x, *delta, *bias, *a, *b, *c, *d, *gate, *initial;
  T *y, *final_state, *starts;
  Shape shape;
};
template <class T> void run(const ScanForward<T>& a) {
  scan_forward(a.x, a.delta, a.bias, a.a, a.b, a.c, a.d, a.gate, a.initial, a.y, a.final_state, a.starts, a.shape,
               a.threads);
}

template <class T> struct ScanBackward {
  int64_t size, threads;
  const T *x, *delta, *bias, *a, *b, *c, *d, *gate, *starts, *dy, *dfinal;
  Gradients<T> to;
  Shape shape;
};
template <class T> void run(const ScanBackward<T>& a) {
  scan_backward(a.x, a.delta, a.bias, a.a, a.b, a.c, a.d, a.gate, a.starts, a.dy, a.dfinal, a.to, a.shape, a.threads);
}

}  // namespace

ESPALIER_KERNEL(scan_forward, ScanForward)
ESPALIER_KERNEL(scan_backward, ScanBackward)
