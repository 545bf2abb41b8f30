// Batched complex matrices as real and imaginary planes: products of views, their factorisation by blocks (or inversion,
// with one block), and solutions with many right-hand sides.
//
// A register tile is 6 rows by one vector of columns of a complex result, or 12 rows where there are 32 registers.
// Columns of b are packed first as (k, plane, vector), and rows of a as (k, plane, 8 or 16) unless they lie as rows, so
// that transposes cost little more than plain views.
// One pass over k makes all four real products: an operand is loaded once for two of them. Panels are packed by the
// cache line, and while they are multiplied the lines of those that come next are fetched: their rows lie too far apart
// for a processor to see them coming.

#ifdef __AVX512F__
#define ESPALIER_VECTOR_BYTES 64
#endif
#include "parallel.hpp"
#include "spectral.hpp"

namespace {

// Rows of a register tile: two sums each, and beside them two operands and two broadcasts, fill 16 or 32 registers.
constexpr int kRows = kBytes == 64 ? 12 : 6;
constexpr int kPad = kBytes == 64 ? 16 : 8;  // rows a packed tile has room for
constexpr int64_t kDepth = 128;  // of one pass over k: a panel and the rows of a tile stay in the first cache
constexpr int64_t kTall = 72;    // rows of a packed together
constexpr int kPanels = 128 / kBytes;  // columns of b packed together fill two cache lines: Intel fetches pairs
constexpr int64_t kLeaf = 16;

template <class T> struct View {
  T *re, *im;
  int64_t row, column;  // steps
  View block(int64_t i, int64_t j) const { return {re + i * row + j * column, im + i * row + j * column, row, column}; }
};

template <class T> View<const T> constant(View<T> v) { return {v.re, v.im, v.row, v.column}; }

// Pack `count` ≤ width lines of length k as (k, plane, width): element (line, p) stands at line·across + p·along.
template <class T, int width>
void pack(T* out, const T* re, const T* im, int64_t across, int64_t along, int64_t count, int64_t k) {
  constexpr int L = kLanes<T>;
  if (across == 1 && count == width) {
    for (int64_t p = 0; p < k; p++, out += 2 * width) {
      std::memcpy(out, re + p * along, sizeof(T) * width);
      std::memcpy(out + width, im + p * along, sizeof(T) * width);
    }
    return;
  }
  if (across == 1 && width == kPad && count <= kRows) {
    for (int64_t p = 0; p < k; p++, out += 2 * width)
      for (int64_t i = 0; i < count; i++) {
        out[i] = re[i + p * along];
        out[width + i] = im[i + p * along];
      }
    return;
  }
  int64_t done = 0;
  if (along == 1) {
    for (; done + L <= k; done += L)
      for (int plane = 0; plane < 2; plane++) {
        const T* source = (plane ? im : re) + done;
#pragma GCC unroll 2
        for (int first = 0; first < width; first += L) {
          Vec<T> v[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; i++) v[i] = first + i < count ? load(source + (first + i) * across) : Vec<T>{};
          transpose<T>(v);
#pragma GCC unroll 16
          for (int i = 0; i < L; i++) store(out + (2 * (done + i) + plane) * width + first, v[i]);
        }
      }
  }
  for (int64_t p = done; p < k; p++)
    for (int64_t i = 0; i < width; i++) {
      out[2 * p * width + i] = i < count ? re[i * across + p * along] : T(0);
      out[(2 * p + 1) * width + i] = i < count ? im[i * across + p * along] : T(0);
    }
}

struct Signs {
  bool same;    // a and b are both conjugated, or neither
  bool conj_b;
};

// What becomes of what stood in a result's place; `past` it is stored past the caches.
enum class Into { place, sum, past };

// What to fetch while a tile is multiplied: one line a step.
template <class T> struct Ahead {
  const T* line;
  int64_t step;
};

// The first `width` lanes; apart from the tiles, of which there are so many that they would double a build's time.
template <class T> __attribute__((noinline)) void store_part(T* to, Vec<T> v, int64_t width, bool add) {
  for (int64_t j = 0; j < width; j++) to[j] = (add ? to[j] : T(0)) + v[j];
}

// Rows of a lie `row` apart with neighbouring columns, or are packed if `row` is 0.
template <class T, int M, bool Same, bool Packed>
void tile(View<const T> a, const T* b, int64_t k, View<T> c, int64_t width, T alpha, T alpha_im, Into into,
          Ahead<T> ahead) {
  constexpr int L = kLanes<T>;
  Vec<T> re[M], im[M];
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    re[i] = im[i] = Vec<T>{};
    if (into == Into::past) continue;
    __builtin_prefetch(c.re + i * c.row, 1);
    __builtin_prefetch(c.im + i * c.row, 1);
  }
  for (int64_t p = 0; p < k; p++, b += 2 * L) {
    const Vec<T> b_re = load(b), b_im = load(b + L);
    __builtin_prefetch(ahead.line, 0, 2);
    ahead.line += ahead.step;
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      const int64_t at = Packed ? 2 * kPad * p + i : i * a.row + p;
      const T a_re = a.re[at], a_im = a.im[at];  // times a vector this is a broadcast alone, without splat's sum
      re[i] += a_re * b_re;
      im[i] += a_re * b_im;
      if (Same) re[i] -= a_im * b_im;
      else re[i] += a_im * b_im;
      if (Same) im[i] += a_im * b_re;
      else im[i] -= a_im * b_re;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    T *to_re = c.re + i * c.row, *to_im = c.im + i * c.row;
    if (into == Into::past) {
      stream(to_re, alpha * re[i]);
      stream(to_im, alpha_im * im[i]);
    } else if (width == L) {
      store(to_re, (into == Into::sum ? load(to_re) : Vec<T>{}) + alpha * re[i]);
      store(to_im, (into == Into::sum ? load(to_im) : Vec<T>{}) + alpha_im * im[i]);
    } else {
      store_part<T>(to_re, alpha * re[i], width, into == Into::sum);
      store_part<T>(to_im, alpha_im * im[i], width, into == Into::sum);
    }
  }
}

// The tiles of 1 to kRows rows.
template <class T, bool Same, bool Packed, int... M> constexpr auto tiles(std::integer_sequence<int, M...>) {
  return std::array{tile<T, M + 1, Same, Packed>...};
}

template <class T> constexpr int64_t scratch_size() {
  return kDepth * (kTall / kRows * 2 * kPad + kPanels * 2 * kLanes<T>);
}

// c = alpha·a·b, or c += alpha·a·b; a (m, k), b (k, n), c with columns one apart. The next product of this shape, if
// any, starts `a_next` and `b_next` further. It is stored past the caches only if k takes one pass.
template <class T, bool Same, bool Packed>
void multiply_with(View<const T> a, View<const T> b, View<T> c, int64_t m, int64_t k, int64_t n, T alpha, T alpha_im,
                   Into into, T* scratch, int64_t a_next, int64_t b_next) {
  constexpr int L = kLanes<T>, together = kPanels * L;
  T *rows = scratch, *panels = scratch + kDepth * (kTall / kRows * 2 * kPad);
  constexpr auto by_rows = tiles<T, Same, Packed>(std::make_integer_sequence<int, kRows>{});
  const int64_t tall = Packed ? kTall : m;
  const int64_t step = b.column == 1 ? b.row : together;
  for (int64_t p = 0; p < k; p += kDepth, into = Into::sum) {
    const int64_t depth = std::min(kDepth, k - p);
    for (int64_t i0 = 0; i0 < m; i0 += tall) {
      const int64_t i1 = std::min(m, i0 + tall), count = (i1 - i0 + kRows - 1) / kRows;
      const auto start = [&](int64_t t) { return i0 + (i1 - i0) * t / count; };  // rows in even shares
      const auto packed = [&](int64_t t) { return rows + t * depth * 2 * kPad; };
      for (int64_t t = 0; Packed && t < count; t++) {
        const View<const T> from = a.block(start(t), p);
        pack<T, kPad>(packed(t), from.re, from.im, from.row, from.column, start(t + 1) - start(t), depth);
      }
      for (int64_t j0 = 0; j0 < n; j0 += together) {
        const int64_t j1 = std::min(n, j0 + together);
        const auto panel = [&](int64_t j) { return panels + (j - j0) / L * depth * 2 * L; };
        for (int64_t j = j0; j < j1; j += L) {
          const View<const T> from = b.block(p, j);
          pack<T, L>(panel(j), from.re, from.im, from.column, from.row, std::min<int64_t>(L, j1 - j), depth);
        }
        const bool last = j1 == n && p + depth == k;
        const View<const T> next = last      ? View<const T>{b.re + b_next, b.im + b_next, 0, 0}
                                   : j1 == n ? b.block(p + depth, 0)
                                             : b.block(p, j1);
        constexpr int64_t line = 64 / int64_t(sizeof(T)), lines = together / line;
        const int64_t chunk = depth * line, chunks = (m * k + chunk - 1) / chunk;
        // The tiles fetch in turn the next lines of b's real and imaginary parts, and the next a as if in one piece.
        const auto fetched = [&](int64_t turn) {
          if (turn < 2 * lines) return Ahead<T>{(turn % 2 ? next.im : next.re) + turn / 2 * line, step};
          turn -= 2 * lines;
          if (!last || turn >= 2 * chunks) return Ahead<T>{panels, 0};
          return Ahead<T>{(turn < chunks ? a.re : a.im) + a_next + turn % chunks * chunk, line};
        };
        int64_t turn = 0;
        for (int64_t j = j0; j < j1; j += L)
          for (int64_t t = 0; t < count; t++, turn++) {
            const int64_t i = start(t);
            const View<const T> from = Packed ? View<const T>{packed(t), packed(t) + kPad, 0, 0} : a.block(i, p);
            by_rows[size_t(start(t + 1) - i - 1)](from, panel(j), depth, c.block(i, j), std::min<int64_t>(L, j1 - j),
                                                  alpha, alpha_im, into, fetched(turn));
          }
      }
    }
  }
}

template <class T>
void multiply(View<const T> a, View<const T> b, View<T> c, int64_t m, int64_t k, int64_t n, Signs signs, T alpha,
              Into into, T* scratch, int64_t a_next = 0, int64_t b_next = 0) {
  // conj(a)·conj(b) is the conjugate of a·b: a common conjugation is a sign of the result's imaginary part.
  const T alpha_im = signs.conj_b ? -alpha : alpha;
  const bool rows = a.column == 1;
  const auto with = signs.same ? (rows ? multiply_with<T, true, false> : multiply_with<T, true, true>)
                               : (rows ? multiply_with<T, false, false> : multiply_with<T, false, true>);
  with(a, b, c, m, k, n, alpha, alpha_im, into, scratch, a_next, b_next);
}

struct Product {
  int64_t count, m, k, n, a[3], b[3], c[2];  // steps: batch, row, column
  int64_t conj_a, conj_b, add, alpha;
};

// Gauss-Jordan with row pivots on at most kLeaf rows.
template <class T> void invert_leaf(View<T> a, int64_t n) {
  alignas(64) T re[kLeaf][kLeaf] = {}, im[kLeaf][kLeaf] = {};
  int64_t pivot[kLeaf];
  for (int64_t i = 0; i < n; i++) {
    std::memcpy(re[i], a.re + i * a.row, sizeof(T) * size_t(n));
    std::memcpy(im[i], a.im + i * a.row, sizeof(T) * size_t(n));
  }
  const auto size = [&](int64_t i, int64_t p) { return re[i][p] * re[i][p] + im[i][p] * im[i][p]; };
  for (int64_t p = 0; p < n; p++) {
    pivot[p] = p;
    for (int64_t i = p + 1; i < n; i++)
      if (size(i, p) > size(pivot[p], p)) pivot[p] = i;
    if (pivot[p] != p) {
      std::swap(re[p], re[pivot[p]]);
      std::swap(im[p], im[pivot[p]]);
    }
    const T d_re = re[p][p] / size(p, p), d_im = -im[p][p] / size(p, p);
    for (int64_t j = 0; j < kLeaf; j++) {
      const T x = re[p][j], y = im[p][j];
      re[p][j] = x * d_re - y * d_im;
      im[p][j] = x * d_im + y * d_re;
    }
    re[p][p] = d_re;
    im[p][p] = d_im;
    for (int64_t i = 0; i < n; i++) {
      if (i == p) continue;
      const T x = re[i][p], y = im[i][p];
      for (int64_t j = 0; j < kLeaf; j++) {
        re[i][j] -= x * re[p][j] - y * im[p][j];
        im[i][j] -= x * im[p][j] + y * re[p][j];
      }
      re[i][p] = y * d_im - x * d_re;
      im[i][p] = -x * d_im - y * d_re;
    }
  }
  for (int64_t p = n - 1; p >= 0; p--)
    for (int64_t i = 0; pivot[p] != p && i < n; i++) {
      std::swap(re[i][p], re[i][pivot[p]]);
      std::swap(im[i][p], im[i][pivot[p]]);
    }
  for (int64_t i = 0; i < n; i++) {
    std::memcpy(a.re + i * a.row, re[i], sizeof(T) * size_t(n));
    std::memcpy(a.im + i * a.row, im[i], sizeof(T) * size_t(n));
  }
}

// Invert in place by halves: with X = A⁻¹B, S = D − CX and Y = CA⁻¹,
// [A B; C D]⁻¹ = [A⁻¹ + XS⁻¹Y, −XS⁻¹; −S⁻¹Y, S⁻¹].
template <class T> void invert(View<T> a, int64_t n, T* temporary, T* scratch) {
  if (n <= kLeaf) return invert_leaf(a, n);
  const int64_t half = (n / 2 + kLeaf - 1) / kLeaf * kLeaf, rest = n - half;
  const Signs plain{true, false};
  const View<T> b = a.block(0, half), c = a.block(half, 0), d = a.block(half, half);
  const View<T> x{temporary, temporary + half * rest, rest, 1};
  const View<T> y{temporary + 2 * half * rest, temporary + 3 * half * rest, half, 1};
  T* below = temporary + 4 * half * rest;
  invert(a, half, below, scratch);
  multiply<T>(constant(a), constant(b), x, half, half, rest, plain, T(1), Into::place, scratch);
  multiply<T>(constant(c), constant(x), d, rest, half, rest, plain, T(-1), Into::sum, scratch);
  multiply<T>(constant(c), constant(a), y, rest, half, half, plain, T(1), Into::place, scratch);
  invert(d, rest, below, scratch);
  multiply<T>(constant(d), constant(y), c, rest, rest, half, plain, T(-1), Into::place, scratch);
  multiply<T>(constant(x), constant(d), b, half, rest, rest, plain, T(-1), Into::place, scratch);
  multiply<T>(constant(x), constant(c), a, half, rest, half, plain, T(-1), Into::sum, scratch);
}

template <class T> View<T> dense(T* memory, int64_t rows, int64_t columns) {
  return {memory, memory + rows * columns, columns, 1};
}
template <class T> void copy(View<const T> from, View<T> to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++) {
    std::memcpy(to.re + i * to.row, from.re + i * from.row, sizeof(T) * size_t(columns));
    std::memcpy(to.im + i * to.row, from.im + i * from.row, sizeof(T) * size_t(columns));
  }
}

// N = L·U by blocks of `width` in place (Crout's order): below the block diagonal L, whose diagonal blocks are ones;
// above it U; on it the inverses of U's diagonal blocks.
template <class T> void factor(View<T> a, int64_t n, int64_t width, T* temporary, T* scratch) {
  const Signs plain{true, false};
  for (int64_t start = 0; start < n; start += width) {
    const int64_t here = std::min(width, n - start), stop = start + here, rest = n - stop;
    const View<T> diagonal = a.block(start, start), below = a.block(stop, start), right = a.block(start, stop);
    const View<const T> left = constant(a.block(start, 0)), above = constant(a.block(0, start));
    multiply<T>(left, above, diagonal, n - start, start, here, plain, T(-1), Into::sum, scratch);
    multiply<T>(left, constant(a.block(0, stop)), right, here, start, rest, plain, T(-1), Into::sum, scratch);
    invert(diagonal, here, temporary, scratch);
    const View<T> scaled = dense(temporary, rest, here);
    multiply<T>(constant(below), constant(diagonal), scaled, rest, here, here, plain, T(1), Into::place, scratch);
    copy(constant(scaled), below, rest, here);
  }
}

// z = x·N⁻¹ for rows x, from `factor`'s blocks of N, or of Nᵀ. Of the two substitutions the first goes through the
// blocks in order and the second backwards; those of U end with a product with the inverse of a diagonal block.
template <class T>
void solve(View<const T> x, View<const T> f, View<T> z, int64_t rows, int64_t n, int64_t width, bool transposed,
           Signs signs, T* temporary, T* scratch, int64_t x_next, int64_t f_next) {
  const auto block = [&](int64_t i, int64_t j) {
    const View<const T> v = transposed ? f.block(j, i) : f.block(i, j);
    return transposed ? View<const T>{v.re, v.im, 1, v.row} : v;
  };
  if (width >= n)
    return multiply<T>(x, block(0, 0), z, rows, n, n, signs, T(1), Into::place, scratch, x_next, f_next);
  for (const bool second : {false, true})
    for (int64_t i = 0, count = (n + width - 1) / width; i < count; i++) {
      const int64_t start = (second ? count - 1 - i : i) * width, stop = std::min(start + width, n);
      const int64_t from = second ? stop : 0, known = second ? n - stop : start, here = stop - start;
      const View<T> part = z.block(0, start);
      const bool scale = second == transposed;
      const View<T> sum = scale ? dense(temporary, rows, here) : part;
      if (scale || !second) copy(second ? constant(part) : x.block(0, start), sum, rows, here);
      multiply<T>(constant(z.block(0, from)), block(from, start), sum, rows, known, here, signs, T(-1), Into::sum, scratch);
      if (scale)
        multiply<T>(constant(sum), block(start, start), part, rows, here, here, signs, T(1), Into::place, scratch);
    }
}

struct Steps { int64_t batch, row; };  // from one matrix to the next and from one row to the next
template <class T> View<T> at(T* re, T* im, Steps s, int64_t i) { return {re + i * s.batch, im + i * s.batch, s.row, 1}; }

template <class T> struct PlanesSolve {
  int64_t size, threads;
  const T *f_re, *f_im, *x_re, *x_im, *less_re, *less_im;
  T *z_re, *z_im, *y_re, *y_im;
  int64_t count, rows, n, width;
  Steps f, x, less, z, y;
  int64_t transposed, conj;
};
// z as `solve` makes it, and y = 2z − less while z is at hand, unless y is null.
template <class T> void run(const PlanesSolve<T>& a) {
  const Signs signs{a.conj == 0, a.conj != 0};
  parallel(a.count, a.threads, [&](Items items) {
    Scratch<T> scratch(scratch_size<T>()), temporary(2 * a.rows * std::min(a.width, a.n));
    for (int64_t i; items.next(i);) {
      const View<T> z = at(a.z_re, a.z_im, a.z, i);
      solve<T>(at(a.x_re, a.x_im, a.x, i), at(a.f_re, a.f_im, a.f, i), z, a.rows, a.n, a.width, a.transposed != 0,
               signs, temporary.data(), scratch.data(), a.x.batch, a.f.batch);
      if (!a.y_re) continue;
      const View<const T> less = at(a.less_re, a.less_im, a.less, i);
      const View<T> y = at(a.y_re, a.y_im, a.y, i);
      const int64_t step = y.row * int64_t(sizeof(T)), bytes = a.count * a.rows * step;
      const bool past = a.n % kLanes<T> == 0 && streams(y.re, bytes, step) && streams(y.im, bytes, step);
      for (int64_t r = 0; r < a.rows; r++)
        for (const bool imaginary : {false, true}) {
          const T* from = (imaginary ? z.im : z.re) + r * z.row;
          const T* minus = (imaginary ? less.im : less.re) + r * less.row;
          T* to = (imaginary ? y.im : y.re) + r * y.row;
          if (past)
            for (int64_t j = 0; j < a.n; j += kLanes<T>) stream(to + j, T(2) * load(from + j) - load(minus + j));
          else
            for (int64_t j = 0; j < a.n; j++) to[j] = 2 * from[j] - minus[j];
        }
    }
    end_streams();
  });
}

template <class T> struct PlanesProduct {
  int64_t size, threads;
  const T *a_re, *a_im, *b_re, *b_im;
  T *c_re, *c_im;
  Product shape;
};
template <class T> void run(const PlanesProduct<T>& a) {
  const Product& s = a.shape;
  const Signs signs{s.conj_a == s.conj_b, s.conj_b != 0};
  parallel(s.count, a.threads, [&](Items items) {
    Scratch<T> scratch(scratch_size<T>());
    const int64_t step = s.c[1] * int64_t(sizeof(T)), bytes = s.count * s.m * step;
    const bool whole = s.n % kLanes<T> == 0 && s.c[0] * int64_t(sizeof(T)) % 64 == 0 && s.k <= kDepth && s.k > 0;
    const bool past = whole && !s.add && streams(a.c_re, bytes, step) && streams(a.c_im, bytes, step);
    for (int64_t i; items.next(i);)
      multiply<T>({a.a_re + i * s.a[0], a.a_im + i * s.a[0], s.a[1], s.a[2]},
                  {a.b_re + i * s.b[0], a.b_im + i * s.b[0], s.b[1], s.b[2]},
                  {a.c_re + i * s.c[0], a.c_im + i * s.c[0], s.c[1], 1}, s.m, s.k, s.n, signs, T(s.alpha),
                  past ? Into::past : s.add ? Into::sum : Into::place, scratch.data(), s.a[0], s.b[0]);
    end_streams();
  });
}

template <class T> struct PlanesFactor {
  int64_t size, threads;
  T *re, *im;
  int64_t count, n, batch, row, width;
};
template <class T> void run(const PlanesFactor<T>& a) {
  parallel(a.count, a.threads, [&](Items items) {
    Scratch<T> scratch(scratch_size<T>()), temporary(2 * (a.n + kLeaf) * (a.n + kLeaf) + 64);
    for (int64_t i; items.next(i);)
      factor<T>({a.re + i * a.batch, a.im + i * a.batch, a.row, 1}, a.n, a.width, temporary.data(), scratch.data());
  });
}

}  // namespace

ESPALIER_KERNEL(planes_product, PlanesProduct)
ESPALIER_KERNEL(planes_factor, PlanesFactor)
ESPALIER_KERNEL(planes_solve, PlanesSolve)
