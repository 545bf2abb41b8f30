// The Mamba-2 recurrence by chunks, forward and backward, for CPUs.
//
// Layouts are row-major: x (B, L, H, P), b and c (B, L, G, N) with rows that may lie farther apart; delta (B, L, H);
// states (B, H, N, P). A piece of work is some of the heads of one group of one batch entry; it walks over the chunks
// with its states, each product of Q × P, Q × N, N × P or Q × Q numbers in the caches. Q × Q matrices are kept
// transposed, (j, i) for the effect of token j on token i ≥ j: their rows are then a vector over i, and both passes
// read them without a transposition. Pieces do not depend on the number of threads, so neither do results.
//
// The backward pass uses the states before each chunk, which the forward pass kept, and makes the rest again. Why it
// sums the gradient of the decays term by term is told in ssd.py, Note [Gradient of the decays].

#include "parallel.hpp"
#include "products.hpp"

namespace {

struct SsdShape {
  int64_t batch, length, groups, share, width, states, chunk, parts, x_stride, b_stride, c_stride;
  int64_t heads() const { return groups * share; }
  int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

// What one piece of work owns: heads [first, last) of one group of one batch entry.
struct Work {
  int64_t batch, group, part, first, last;
  Work(const SsdShape& s, int64_t item)
      : batch(item / (s.groups * s.parts)), group(item / s.parts % s.groups), part(item % s.parts),
        first(group * s.share + s.share * part / s.parts), last(group * s.share + s.share * (part + 1) / s.parts) {}
};

// A chunk's B, C and scores, the same for all heads of a group.
template <class T> struct Maps {
  const int64_t N, Q;  // padded
  Room<T> b, c, c_across, scores;
  Maps(int64_t chunk, int64_t states)
      : N(padded<T>(states)), Q(padded<T>(chunk)), b(chunk * N), c(chunk * N), c_across(states * Q),
        scores(chunk * Q) {}

  void fill(const T* b_from, const T* c_from, int64_t q, const SsdShape& s) {
    copy_rows<T>(b, N, b_from, s.b_stride, q, s.states);
    copy_rows<T>(c, N, c_from, s.c_stride, q, s.states);
    transpose<T>(c_across, Q, c, N, q, s.states);
    multiply<T>(q, Q, s.states, {b, N, 1}, c_across, Q, {scores, Q}, Terms::all_where_i_up_to_j);
  }
};

template <class T> struct Wide { typedef double type; };
template <> struct Wide<double> { typedef long double type; };

// Powers of two below this are 0: a decay that is stronger still is the same, and would only cost its chunk digits.
template <class T> constexpr T kVanished = sizeof(T) == 4 ? T(-150) : T(-1076);

// A head's steps and decays in a chunk: from the start to each token, from each token to the end, and between tokens.
// Sums of log-decays are kept in two numbers, the second what the first has lost: else, after one strong decay, the
// differences of later tokens' sums would be its rounding.
template <class T> struct Decays {
  const int64_t Q;  // padded
  Room<T> steps, cumulated, lost, start, end, between, mixing;
  T whole = 0;
  explicit Decays(int64_t chunk)
      : Q(padded<T>(chunk)), steps(Q), cumulated(Q), lost(Q), start(Q), end(Q), between(chunk * Q),
        mixing(chunk * Q) {}

  void fill(const T* delta, int64_t stride, T rate, int64_t q, const T* scores) {
    constexpr int64_t V = kLanes<T>;
    typename Wide<T>::type sum = 0;
    for (int64_t i = 0; i < q; i++) {
      steps[i] = delta[i * stride];
      const T decay = steps[i] * rate * T(kLog2E);
      sum += decay < kVanished<T> ? kVanished<T> : decay;
      cumulated[i] = T(sum);
      lost[i] = T(sum - cumulated[i]);
    }
    for (int64_t i = q; i < Q; i++) steps[i] = 0, cumulated[i] = cumulated[q - 1], lost[i] = lost[q - 1];
    for (int64_t i = 0; i < Q; i += V) {
      store(start + i, exp2v(load(cumulated + i)));
      store(end + i, exp2v((cumulated[q - 1] - load(cumulated + i)) + (lost[q - 1] - load(lost + i))));
    }
    whole = start[q - 1];
    for (int64_t j = 0; j < q; j++) {
      T *decay = between + j * Q, *mix = mixing + j * Q;
      const T* score = scores + j * Q;
      const int64_t diagonal = j / V * V;
      for (int64_t i = diagonal; i < q; i += V) {
        const Vec<T> e = exp2v((load(cumulated + i) - cumulated[j]) + (load(lost + i) - lost[j]));
        store(decay + i, e);
        store(mix + i, e * load(score + i));
      }
      for (int64_t i = diagonal; i < j; i++) decay[i] = mix[i] = T(0);
    }
  }
};

// out(i, ·) = factor(i) · in(i, ·), rows of `step`.
template <class T>
void scale_rows(T* out, int64_t step, const T* in, int64_t in_step, const T* factor, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t p = 0; p < width; p++) out[i * step + p] = factor[i] * in[i * in_step + p];
}

template <class T>
void ssd_forward(const T* x, const T* delta, const T* a, const T* b, const T* c, const T* d, const T* initial, T* y,
                 T* final_state, T* kept, const SsdShape& s, int64_t threads) {
  const int64_t H = s.heads(), P = padded<T>(s.width), N = s.states, size = N * P;
  parallel(s.batch * s.groups * s.parts, threads, [&](Items items) {
    for (int64_t item; items.next(item);) {
      const Work work(s, item);
      Maps<T> maps(s.chunk, N);
      Decays<T> decays(s.chunk);
      Room<T> values(s.chunk * P), into(s.chunk * P), out(s.chunk * P), states((work.last - work.first) * size);
      if (initial)
        for (int64_t h = work.first; h < work.last; h++)
          copy_rows<T>(states + (h - work.first) * size, P, initial + (work.batch * H + h) * N * s.width, s.width, N,
                       s.width);
      for (int64_t k = 0; k < s.chunks(); k++) {
        const int64_t q = std::min(s.chunk, s.length - k * s.chunk), row = work.batch * s.length + k * s.chunk;
        const bool begun = k > 0 || initial, state_needed = final_state || k + 1 < s.chunks();
        maps.fill(b + row * s.b_stride + work.group * N, c + row * s.c_stride + work.group * N, q, s);
        for (int64_t h = work.first; h < work.last; h++) {
          T* state = states + (h - work.first) * size;
          const T* from = x + row * s.x_stride + h * s.width;
          decays.fill(delta + row * H + h, H, a[h], q, maps.scores);
          scale_rows<T>(values, P, from, s.x_stride, decays.steps, q, s.width);
          multiply<T>(q, P, q, {decays.mixing, 1, maps.Q}, values, P, {out, P}, Terms::k_up_to_i);
          if (begun) multiply<T>(q, P, N, {maps.c, maps.N, 1}, state, P, {out, P, T(1), decays.start});
          const T skip = d ? d[h] : T(0);
          for (int64_t i = 0; i < q; i++)
            for (int64_t p = 0; p < s.width; p++)
              y[((row + i) * H + h) * s.width + p] = out[i * P + p] + skip * from[i * s.x_stride + p];
          if (!state_needed) continue;
          scale_rows<T>(into, P, values, P, decays.end, q, P);
          multiply<T>(N, P, q, {maps.b, 1, maps.N}, into, P, {state, P, begun ? decays.whole : T(0)});
          if (kept && k + 1 < s.chunks())
            std::memcpy(kept + ((work.batch * H + h) * (s.chunks() - 1) + k) * size, state, size_t(size) * sizeof(T));
        }
      }
      if (final_state)
        for (int64_t h = work.first; h < work.last; h++)
          copy_rows<T>(final_state + (work.batch * H + h) * N * s.width, s.width, states + (h - work.first) * size, P, N,
                       s.width);
    }
  });
}

template <class T> struct Gradients {
  T *dx, *ddelta, *da, *db, *dc, *dd, *dinitial;
};

template <class T> T dot(const T* one, const T* two, int64_t n) {
  constexpr int64_t V = kLanes<T>;
  Vec<T> sums{};
  int64_t i = 0;
  for (; i + V <= n; i += V) sums += load(one + i) * load(two + i);
  T total = 0;
  for (; i < n; i++) total += one[i] * two[i];
  for (int64_t v = 0; v < V; v++) total += sums[v];
  return total;
}

// The backward pass of one piece of work, chunk by chunk from the last.
template <class T> struct Backward {
  const SsdShape& s;
  const int64_t H, P, N, Q, size;  // P and Q padded
  Maps<T> maps;
  Decays<T> decays;
  Room<T> x, x_across, dy, dy_across, dvalues, from, inside, dscores, dscores_across, db, dc, past, weights;
  Room<T> crossing, leaving, entering, sums;  // see head

  explicit Backward(const SsdShape& shape)
      : s(shape), H(s.heads()), P(padded<T>(s.width)), N(s.states), Q(padded<T>(s.chunk)), size(N * P),
        maps(s.chunk, N), decays(s.chunk), x(s.chunk * P), x_across(P * Q), dy(s.chunk * P), dy_across(P * Q),
        dvalues(s.chunk * P), from(s.chunk * P), inside(s.chunk * Q), dscores(s.chunk * Q), dscores_across(s.chunk * Q),
        db(N * Q), dc(N * Q), past(N * Q), weights(Q), crossing(Q), leaving(Q), entering(Q), sums(Q) {}

  void begin(const T* b, const T* c, int64_t q) {
    maps.fill(b, c, q, s);
    std::fill_n(static_cast<T*>(dscores), s.chunk * Q, T(0));
    std::fill_n(static_cast<T*>(db), N * Q, T(0));
    std::fill_n(static_cast<T*>(dc), N * Q, T(0));
  }

  // One head: x_from and dy_from are its columns. `before` is the state before the chunk and `dstate` the gradient of
  // the one after, each null where there is none; `dstate_out`, if asked for, gets that of the one before and may be
  // `dstate`. What a token hands another is decayed by all tokens after the one up to the other: for each token
  // `crossing` gets what tokens before it hand to it and later ones, times its gradient; `leaving` what a token hands
  // to the state after; `entering` what it has of the state before; and the sum of the latter's way through is returned.
  T head(const T* x_from, const T* dy_from, int64_t q, const T* before, const T* dstate, T* dstate_out) {
    copy_rows<T>(x, P, x_from, s.x_stride, q, s.width);
    copy_rows<T>(dy, P, dy_from, H * s.width, q, s.width);
    transpose<T>(x_across, Q, x, P, q, s.width);
    transpose<T>(dy_across, Q, dy, P, q, s.width);
    multiply<T>(q, Q, s.width, {x, P, 1}, dy_across, Q, {inside, Q, T(0), decays.steps}, Terms::all_where_i_up_to_j);
    between_tokens(q);
    T through = 0;
    std::fill_n(static_cast<T*>(leaving), Q, T(0));
    std::fill_n(static_cast<T*>(entering), Q, T(0));
    if (before) {
      multiply<T>(N, Q, s.width, {before, P, 1}, dy_across, Q, {past, Q, T(0), nullptr, decays.start});
      for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < Q; i += kLanes<T>) {
          const Vec<T> part = load(past + n * Q + i);
          store(dc + n * Q + i, load(dc + n * Q + i) + part);
          store(entering + i, load(entering + i) + part * load(maps.c_across + n * Q + i));
        }
    }
    if (dstate) {
      for (int64_t i = 0; i < Q; i++) weights[i] = decays.steps[i] * decays.end[i];
      multiply<T>(N, Q, s.width, {dstate, P, 1}, x_across, Q, {db, Q, T(1), nullptr, weights});
      multiply<T>(q, P, N, {maps.b, maps.N, 1}, dstate, P, {dvalues, P, T(0), decays.end});
      for (int64_t i = 0; i < q; i++) leaving[i] = decays.steps[i] * dot<T>(x + i * P, dvalues + i * P, P);
      if (before) through = decays.whole * dot(before, dstate, size);
    }
    multiply<T>(q, P, q, {decays.mixing, Q, 1}, dy, P, {dvalues, P, dstate ? T(1) : T(0)}, Terms::k_from_i);
    if (dstate_out) {
      scale_rows<T>(from, P, dy, P, decays.start, q, P);
      multiply<T>(N, P, q, {maps.c, 1, maps.N}, from, P, {dstate_out, P, dstate ? decays.whole : T(0)});
    }
    return through;
  }

  // Add a head's share to the gradient of the scores, and fill `crossing`.
  void between_tokens(int64_t q) {
    constexpr int64_t V = kLanes<T>;
    std::fill_n(static_cast<T*>(sums), Q, T(0));
    crossing[0] = T(0);
    for (int64_t j = 0; j + 1 < q; j++) {
      // sums(i), i > j: what tokens up to j hand to i. A token's own share of itself is decayed by none.
      sums[j] = T(0);
      Vec<T> all{};
      const int64_t diagonal = j / V * V;
      for (int64_t i = diagonal; i < q; i += V) {
        const int64_t at = j * Q + i;
        const Vec<T> product = load(inside + at);
        store(dscores + at, load(dscores + at) + load(decays.between + at) * product);
        Vec<T> handed = load(decays.mixing + at) * product;
        if (i == diagonal)
          for (int64_t v = 0; v <= j - diagonal; v++) handed[v] = T(0);
        for (int64_t v = q - i; v < V; v++) handed[v] = T(0);
        const Vec<T> sum = load(sums + i) + handed;
        store(sums + i, sum);
        all += sum;
      }
      T total = 0;
      for (int64_t v = 0; v < V; v++) total += all[v];
      crossing[j + 1] = total;
    }
    dscores[(q - 1) * Q + q - 1] += decays.between[(q - 1) * Q + q - 1] * inside[(q - 1) * Q + q - 1];
  }

  // Write the head's gradients of x and delta, and add to those of its rate and skip weight.
  void finish_head(T skip, T rate, T through, int64_t q, T* dx, T* ddelta, T* drate, T* dskip) {
    T left = through;
    for (int64_t i = 0; i < q; i++) {
      *dskip += dot<T>(dy + i * P, x + i * P, P);
      for (int64_t p = 0; p < s.width; p++)
        dx[i * H * s.width + p] = decays.steps[i] * dvalues[i * P + p] + skip * dy[i * P + p];
      crossing[i] += left;
      left += leaving[i];
    }
    T entered = 0;
    for (int64_t i = q - 1; i >= 0; i--) {
      entered += entering[i];
      const T dlog = crossing[i] + entered;
      ddelta[i * H] = dot<T>(x + i * P, dvalues + i * P, P) + rate * dlog;
      *drate += decays.steps[i] * dlog;
    }
  }

  // What the scores pass on, and the chunk's gradients of B and C out to rows of `stride`.
  void end(int64_t q, T* db_to, T* dc_to, int64_t stride) {
    multiply<T>(N, Q, q, {maps.b, 1, maps.N}, dscores, Q, {dc, Q, T(1)}, Terms::k_up_to_j);
    transpose<T>(dscores_across, Q, dscores, Q, q, q);
    multiply<T>(N, Q, q, {maps.c, 1, maps.N}, dscores_across, Q, {db, Q, T(1)}, Terms::k_from_j);
    transpose<T>(db_to, stride, db, Q, N, q);
    transpose<T>(dc_to, stride, dc, Q, N, q);
  }
};

// db and dc are (B, parts, L, G, N), one share for each piece of work; da and dd are (B, H).
template <class T>
void ssd_backward(const T* x, const T* delta, const T* a, const T* b, const T* c, const T* d, const T* initial,
                  const T* kept, const T* dy, const T* dfinal, Gradients<T> to, const SsdShape& s, int64_t threads) {
  const int64_t H = s.heads(), N = s.states, plain = N * s.width, last = s.chunks() - 1;
  parallel(s.batch * s.groups * s.parts, threads, [&](Items items) {
    for (int64_t item; items.next(item);) {
      const Work work(s, item);
      Backward<T> pass(s);
      const int64_t size = pass.size, count = work.last - work.first, state_at = work.batch * H + work.first;
      Room<T> starts(count * size), dstates(count * size);
      for (int64_t i = 0; i < count; i++) {
        const int64_t at = (state_at + i) * plain;
        if (initial) copy_rows<T>(starts + i * size, pass.P, initial + at, s.width, N, s.width);
        if (dfinal) copy_rows<T>(dstates + i * size, pass.P, dfinal + at, s.width, N, s.width);
        to.da[state_at + i] = to.dd[state_at + i] = T(0);
      }
      for (int64_t k = last; k >= 0; k--) {
        const int64_t q = std::min(s.chunk, s.length - k * s.chunk), row = work.batch * s.length + k * s.chunk;
        pass.begin(b + row * s.b_stride + work.group * N, c + row * s.c_stride + work.group * N, q);
        for (int64_t i = 0; i < count; i++) {
          const int64_t h = work.first + i, at = row * H + h;
          const T* states = kept + (state_at + i) * last * size;
          const T* before = k > 0 ? states + (k - 1) * size : initial ? starts + i * size : nullptr;
          T* dstate = dstates + i * size;
          pass.decays.fill(delta + at, H, a[h], q, pass.maps.scores);
          const T through = pass.head(x + row * s.x_stride + h * s.width, dy + at * s.width, q, before,
                                      k < last || dfinal ? dstate : nullptr, before ? dstate : nullptr);
          pass.finish_head(d ? d[h] : T(0), a[h], through, q, to.dx + at * s.width, to.ddelta + at,
                           to.da + work.batch * H + h, to.dd + work.batch * H + h);
        }
        const int64_t out = ((work.batch * s.parts + work.part) * s.length + k * s.chunk) * s.groups + work.group;
        pass.end(q, to.db + out * N, to.dc + out * N, s.groups * N);
      }
      if (initial)
        for (int64_t i = 0; i < count; i++)
          copy_rows<T>(to.dinitial + (state_at + i) * plain, s.width, dstates + i * size, pass.P, N, s.width);
    }
  });
}

template <class T> struct SsdForward {
  int64_t size, threads;
  const T *x, *delta, *a, *b, *c, *d, *initial;
  T *y, *final_state, *kept;
  SsdShape shape;
};
template <class T> void run(const SsdForward<T>& a) {
  ssd_forward(a.x, a.delta, a.a, a.b, a.c, a.d, a.initial, a.y, a.final_state, a.kept, a.shape, a.threads);
}

template <class T> struct SsdBackward {
  int64_t size, threads;
  const T *x, *delta, *a, *b, *c, *d, *initial, *kept, *dy, *dfinal;
  Gradients<T> to;
  SsdShape shape;
};
template <class T> void run(const SsdBackward<T>& a) {
  ssd_backward(a.x, a.delta, a.a, a.b, a.c, a.d, a.initial, a.kept, a.dy, a.dfinal, a.to, a.shape, a.threads);
}

}  // namespace

ESPALIER_KERNEL(ssd_forward, SsdForward)
ESPALIER_KERNEL(ssd_backward, SsdBackward)
