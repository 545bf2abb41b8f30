// The selective scan of Mamba-1, forward and backward, for CPUs.
//
// Layouts are row-major and channel-last: x, delta, y (B, L, E); a (E, N); b, c (B, L, N); states (B, E, N). A block of
// W channels advances together, one vector lane a channel, and all N states of a block stay in the first cache. Time is
// cut into pieces of K steps; the forward pass keeps the state at each piece's start, the backward pass recomputes the
// piece from it. Work is shared out by (batch entry, group of blocks), never by thread, so results do not depend on how
// many threads there are.

#include "vectors.hpp"

namespace {

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
  }

ESPALIER_EXPORT(float, f32)
ESPALIER_EXPORT(double, f64)
