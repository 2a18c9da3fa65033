// Weights packed as panels for product_kernel.h, and for the few rows that would not pay for the
// packing, the product with weights as they are.
#pragma once

#include <type_traits>

#include "product_kernel.h"

namespace {

using rnnattn::Packing;

constexpr int64_t kMostUnpacked = 16;  // rows that do not pay for packing the weights

#if defined(__clang__)
template <int D, typename F>
inline void exchange(Vec<F>& a, Vec<F>& b) {
  for (int l = 0; l < kLanes<F>; ++l)
    if (!(l & D)) { const F low = b[l]; b[l] = a[l + D]; a[l + D] = low; }
}
#else
template <int D, typename F>
inline void exchange(Vec<F>& a, Vec<F>& b) {
  using Index = decltype(Vec<F>{} < Vec<F>{});
  Index low, high;
  RNNATTN_UNROLL for (int l = 0; l < kLanes<F>; ++l) {
    low[l] = l & D ? kLanes<F> + l - D : l;
    high[l] = l & D ? kLanes<F> + l : l + D;
  }
  const Vec<F> first = a;
  a = __builtin_shuffle(first, b, low);
  b = __builtin_shuffle(first, b, high);
}
#endif

// The matrix of as many rows as lanes, in place: blocks off the diagonal change places, of ever smaller size.
template <typename F, int D = kLanes<F> / 2>
inline void transpose(Vec<F>* rows) {
  RNNATTN_UNROLL for (int i = 0; i < kLanes<F>; ++i)
    if (!(i & D)) exchange<D, F>(rows[i], rows[i + D]);
  if constexpr (D > 1) transpose<F, D / 2>(rows);
}

template <typename F>
inline int64_t lanes_left(int64_t width, int64_t from) {
  const int64_t left = width - from;
  return left < 0 ? 0 : left < kLanes<F> ? left : kLanes<F>;
}

// depth rows of a panel from k on, v the vector's place in a row of V.
template <typename W, typename F>
inline void store_weights(const Vec<F>* rows, int64_t depth, int64_t k, int64_t v, int64_t V, typename W::Word* panel) {
  constexpr int64_t L = kLanes<F>;
  for (int64_t j = 0; j < depth; j += W::kGroup) {
    auto word = W::word(rows[j], 0);
    if constexpr (W::kGroup > 1)
      for (int64_t n = 1; n < W::kGroup && j + n < depth; ++n) word |= W::word(rows[j + n], n);
    std::memcpy(panel + ((k + j) / W::kGroup * V + v) * L, &word, sizeof word);
  }
}

// A panel of pairs from weights that are bfloat16 already, of which no float need be made: a word is a pair as it lies in a
// column, or of two rows that lie side by side.
inline void pack_pairs(const Packing<float>& p, int64_t block, int32_t* panel) {
  constexpr int64_t L = kLanes<float>;
  const int64_t V = p.gates * p.units;
  const auto* w = static_cast<const uint16_t*>(p.w);
  for (int64_t v = 0; v < V; ++v) {
    const int64_t unit = (block * p.units + v / p.gates) * L, n = lanes_left<float>(p.width, unit);
    const int64_t first = (v % p.gates * p.width + unit) * p.column_stride;
    for (int64_t k = 0; k < p.K; k += 2 * L) {
      const int64_t depth = p.K - k < 2 * L ? p.K - k : 2 * L;
      FloatVec pairs[L] = {};
      if (p.column_stride == 1) {
        for (int64_t j = 0; n && j < depth; ++j) pairs[j / 2] = from_bits(bits(pairs[j / 2]) | load_narrow(w + first + (k + j) * p.k_stride, n) << (16 * (j % 2)));
      } else {
        for (int64_t l = 0; l < n; ++l) std::memcpy(&pairs[l], w + first + l * p.column_stride + k, depth * sizeof *w);
        transpose<float>(pairs);
      }
      for (int64_t j = 0; 2 * j < depth; ++j) std::memcpy(panel + ((k / 2 + j) * V + v) * L, &pairs[j], sizeof *pairs);
    }
  }
  const int64_t filled = (p.K + 1) / 2;
  if (p.K) std::memset(panel + filled * V * L, 0, (words<PairsOfBFloat16>(p.K) - filled) * V * L * sizeof *panel);
}

template <typename W, typename F>
void pack_panel_as(const Packing<F>& p, int64_t block, typename W::Word* panel) {
  if constexpr (W::kPanel == Panel::kBFloat16)
    if (p.stored == Stored::kBFloat16) return pack_pairs(p, block, panel);
  constexpr int64_t L = kLanes<F>;
  const int64_t V = p.gates * p.units;
  const auto weights = [&](int64_t index, int64_t n) { return load_stored<F>(p.stored, p.w, index, n); };
  for (int64_t v = 0; v < V; ++v) {
    const int64_t unit = (block * p.units + v / p.gates) * L, n = lanes_left<F>(p.width, unit);
    const int64_t first = (v % p.gates * p.width + unit) * p.column_stride;
    for (int64_t k = 0; k < p.K; k += L) {
      const int64_t depth = lanes_left<F>(p.K, k);
      Vec<F> rows[L];
      if (p.column_stride == 1) {
        for (int64_t j = 0; j < depth; ++j) rows[j] = n ? weights(first + (k + j) * p.k_stride, n) : Vec<F>{};
      } else {
        for (int64_t l = 0; l < L; ++l) rows[l] = l < n ? weights(first + l * p.column_stride + k, depth) : Vec<F>{};
        transpose<F>(rows);
      }
      store_weights<W, F>(rows, depth, k, v, V, panel);
    }
  }
  const int64_t filled = (p.K + W::kGroup - 1) / W::kGroup;
  if (p.K) std::memset(panel + filled * V * L, 0, (words<W>(p.K) - filled) * V * L * sizeof *panel);
}

// One panel of a matrix.
template <typename F>
void pack_panel(const Packing<F>& p, int64_t block, void* panels) {
  const int64_t columns = p.gates * p.units * kLanes<F>;
  const auto pack_as = [&](auto held) {
    using W = decltype(held);
    pack_panel_as<W, F>(p, block, static_cast<typename W::Word*>(panels) + block * words<W>(p.K) * columns);
  };
  if constexpr (sizeof(F) == sizeof(float)) {
    if (p.panel == Panel::kBFloat16) return pack_as(PairsOfBFloat16{});
    if (p.panel == Panel::kInt8) return pack_as(FoursOfInt8{});
  }
  pack_as(Full<F>{});
}

// Lane l of the result is the total of sums[l]. Half of the vectors are folded onto the others, of ever smaller size.
template <typename F, int D = kLanes<F> / 2>
inline Vec<F> totals(Vec<F>* sums) {
  RNNATTN_UNROLL for (int i = 0; i < D; ++i) exchange<D, F>(sums[i], sums[i + D]), sums[i] += sums[i + D];
  if constexpr (D > 1) return totals<F, D / 2>(sums);
  else return sums[0];
}

constexpr int kRowsOfDots = 4, kColumnsOfDots = 4;  // at once

// What a multiply-add of the products below takes of a row and of a column, both as they lie: a number to a lane.
template <typename F, Stored S, typename Row>
struct NumbersOfDots {
  static constexpr int64_t kTaken = kLanes<F>;
  RNNATTN_INLINE static Vec<F> weights(const void* w, int64_t index, int64_t n) { return load_stored<F>(S, w, index, n); }
  RNNATTN_INLINE static Vec<F> row(const Row* a, int64_t n) { return load_row(a, n); }
  RNNATTN_INLINE static Vec<F> multiply_add(Vec<F> sum, Vec<F> a, Vec<F> column) { return sum + a * column; }
};

#if defined(__AVX512BF16__)
// A pair.
template <>
struct NumbersOfDots<float, Stored::kBFloat16, uint16_t> {
  static constexpr int64_t kTaken = 2 * kLanes<float>;
  RNNATTN_INLINE static __m512bh weights(const void* w, int64_t index, int64_t n) { return row(static_cast<const uint16_t*>(w) + index, n); }
  RNNATTN_INLINE static __m512bh row(const uint16_t* a, int64_t n) {
    return (__m512bh)(n == kTaken ? _mm512_loadu_si512(a) : _mm512_maskz_loadu_epi16((uint32_t{1} << n) - 1, a));
  }
  RNNATTN_INLINE static FloatVec multiply_add(FloatVec sum, __m512bh a, __m512bh column) {
    return (FloatVec)_mm512_dpbf16_ps((__m512)sum, column, a);
  }
};
#endif

// out[r][c] = a[r] . w's column c for R rows and C columns that lie `apart`, each a vector of partial sums; out has L columns.
// So few that they would wait for one another are taken in parts.
template <int R, int C, Stored S, typename F, typename Row>
[[gnu::noinline]] void dots(const Row* const* rows, const void* w, int64_t first, int64_t apart, int64_t K, Vec<F>* out) {
  using Numbers = NumbersOfDots<F, S, Row>;
  constexpr int64_t L = kLanes<F>, kTaken = Numbers::kTaken;
  constexpr int kParts = R * C < 4 ? 4 : 1;
  Vec<F> sums[kParts][R][C] = {};
  const auto add = [&](int part, int64_t k, int64_t n) __attribute__((always_inline)) {
    decltype(Numbers::weights(w, 0, 0)) column[C];
    RNNATTN_UNROLL for (int c = 0; c < C; ++c) column[c] = Numbers::weights(w, first + c * apart + k, n);
    RNNATTN_UNROLL for (int r = 0; r < R; ++r) {
      const auto a = Numbers::row(rows[r] + k, n);
      RNNATTN_UNROLL for (int c = 0; c < C; ++c) sums[part][r][c] = Numbers::multiply_add(sums[part][r][c], a, column[c]);
    }
  };
  int64_t k = 0;
  for (; k + kParts * kTaken <= K; k += kParts * kTaken)
    RNNATTN_UNROLL for (int part = 0; part < kParts; ++part) add(part, k + part * kTaken, kTaken);
  for (; k < K; k += kTaken) add(0, k, K - k < kTaken ? K - k : kTaken);
  RNNATTN_UNROLL for (int r = 0; r < R; ++r)
    RNNATTN_UNROLL for (int c = 0; c < C; ++c) {
      Vec<F> sum = sums[0][r][c];
      RNNATTN_UNROLL for (int part = 1; part < kParts; ++part) sum += sums[part][r][c];
      out[r * L + c] = sum;
    }
}

template <int C, Stored S, typename F, int R = kRowsOfDots, typename... Arguments>
inline void dots_of(int64_t rows, Arguments... arguments) {
  if constexpr (R > 1)
    if (rows < R) return dots_of<C, S, F, R - 1>(rows, arguments...);
  dots<R, C, S, F>(arguments...);
}

template <Stored S, typename F, typename Row>
void multiply_unpacked_from(const Packing<F>& p, int64_t block, const Row* const* rows, int64_t n, const F* init, F* out) {
  constexpr int64_t L = kLanes<F>;
  const int64_t V = p.gates * p.units;
  Vec<F> sums[kMostUnpacked][L];
  for (int64_t v = 0; v < V; ++v) {
    const int64_t unit = (block * p.units + v / p.gates) * L, units = lanes_left<F>(p.width, unit);
    const int64_t first = (v % p.gates * p.width + unit) * p.column_stride;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t l = units; l < L; ++l) sums[i][l] = Vec<F>{};
    // A few columns with all rows: they are read from memory once.
    const auto multiply = [&](auto columns, int64_t l) {
      for (int64_t i = 0; i < n; i += kRowsOfDots)
        dots_of<columns, S, F>(n - i, rows + i, p.w, first + l * p.column_stride, p.column_stride, p.K, &sums[i][l]);
    };
    int64_t l = 0;
    if (n > 1)
      for (; l + kColumnsOfDots <= units; l += kColumnsOfDots) multiply(std::integral_constant<int, kColumnsOfDots>{}, l);
    for (; l < units; ++l) multiply(std::integral_constant<int, 1>{}, l);
    for (int64_t i = 0; i < n; ++i) {
      const Vec<F> sum = totals<F>(sums[i]);
      store<F>(out + (i * V + v) * L, init ? sum + load(init + v * L) : sum);
    }
  }
}

// out[i] = init + a[i] w for n rows, w [gates * width, K] as torch holds it, out [rows][vectors][lanes] as a product with
// a panel gives it. Some rows of w after the others, as they lie in memory, once for every kMostUnpacked rows of a.
template <typename F, typename Row>
void multiply_unpacked(const Packing<F>& p, int64_t block, const Row* const* rows, int64_t n, const F* init, F* out) {
  for (; n > kMostUnpacked; n -= kMostUnpacked, rows += kMostUnpacked, out += kMostUnpacked * p.gates * p.units * kLanes<F>)
    multiply_unpacked(p, block, rows, kMostUnpacked, init, out);
  if constexpr (sizeof(F) == sizeof(float)) {
    if (p.stored == Stored::kBFloat16) return multiply_unpacked_from<Stored::kBFloat16>(p, block, rows, n, init, out);
    if (p.stored == Stored::kHalf) return multiply_unpacked_from<Stored::kHalf>(p, block, rows, n, init, out);
  }
  multiply_unpacked_from<Stored::kFull>(p, block, rows, n, init, out);
}

}  // namespace
