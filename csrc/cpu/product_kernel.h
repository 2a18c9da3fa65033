// Products of a few rows with a panel of packed weights, the sums kept in registers.
// A panel holds one block of columns: [K][V vectors][lanes].
#pragma once

#include "../recurrent.h"
#include "stored.h"

namespace {

using rnnattn::Panel;
using rnnattn::panel_depth;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

constexpr int kWide = 4;  // vectors of a panel that has plain columns

// Rows of a tile: as many sums as registers hold beside a row of the panel and one element of a.
template <int V> constexpr int kRows = V == 3 ? kRegisters / 4 : (kRegisters - V - 2) / V;

// How the rows of a product are held and what a multiply-add takes of them: a number of F at a time.
template <typename F>
struct RowsOf {
  using Row = F;
  static constexpr int kTaken = 1;
  static constexpr int64_t kTileRows = 1;  // of a matrix unit's tiles, where there is one
  RNNATTN_INLINE static Vec<F> element(const F* a, int64_t) { return splat(*a); }
  RNNATTN_INLINE static Vec<F> multiply_add(Vec<F> sum, Vec<F> a, Vec<F> column) { return sum + a * column; }
};

// What a panel holds: F itself, or words of 32 bits with the weights of a column for several
// consecutive k, of which shifts make floats.
template <typename F>
struct Full : RowsOf<F> {
  using Word = F;
  static constexpr Panel kPanel = Panel::kFull;
  static constexpr int kGroup = 1;
  static Vec<F> weights(const F* w, int) { return load(w); }
  static Vec<F> word(Vec<F> v, int) { return v; }
};

struct PairsOfBFloat16 : RowsOf<float> {
  using Word = int32_t;
  static constexpr Panel kPanel = Panel::kBFloat16;
  static constexpr int kGroup = 2;
  static FloatVec weights(const int32_t* w, int j) {
    IntVec word;
    std::memcpy(&word, w, sizeof word);
    return from_bits(j ? word & -65536 : word << 16);
  }
  static IntVec word(FloatVec v, int j) { return to_bfloat16(v) << (16 * j); }
};

struct FoursOfInt8 : RowsOf<float> {
  using Word = int32_t;
  static constexpr Panel kPanel = Panel::kInt8;
  static constexpr int kGroup = 4;
  static FloatVec weights(const int32_t* w, int j) {
    IntVec word;
    std::memcpy(&word, w, sizeof word);
    return __builtin_convertvector((word << (24 - 8 * j)) >> 24, FloatVec);
  }
  static IntVec word(FloatVec v, int j) { return (__builtin_convertvector(v, IntVec) & 255) << (8 * j); }
};

template <typename W>
constexpr int64_t words(int64_t K) { return panel_depth(W::kPanel, K); }

// Rows times a panel, of which part after part of kDepth steps of k is multiplied with all rows: it
// stays in the core's own cache for them. ahead is the panel to come after this one: each tile fetches
// some cache lines of the part to come, or the first tile on it would wait for the shared cache.
template <typename F, typename W>
struct Product {
  using Word = typename W::Word;
  const typename W::Row* const* rows;
  int64_t K;
  const Word* w;
  const Word* ahead;
  const F* scale = nullptr;  // [V][lanes], what sums of int8 weights are multiplied by
};

constexpr int64_t kDepth = 512;

// Cache lines to fetch beside the panel's, one at each step of k: what is to be read after the product.
struct Lines {
  const void* const* next;
  void fetch() { __builtin_prefetch(*next++, 0, 2); }
};

// Collects them; whoever takes one at each of kDepth steps gets some line where there are fewer.
class LineList {
 public:
  static constexpr int64_t kMost = 768;

  explicit LineList(const void* any) {
    for (auto& line : lines_) line = any;
  }

  const LineList& clear() {
    n_ = 0;
    return *this;
  }

  // Those of n elements of some bytes from an index on.
  void add(const void* base, int64_t index, int64_t bytes, int64_t n) {
    const char* from = static_cast<const char*>(base) + index * bytes;
    for (int64_t at = 0; at < n * bytes; at += 64) lines_[n_++] = from + at;
  }

  int64_t size() const { return n_; }
  Lines fetched() const { return {lines_}; }

 private:
  static_assert(kMost >= kDepth);
  const void* lines_[kMost];
  int64_t n_ = 0;
};

struct NoLines {
  void fetch() const {}
  NoLines operator()(int64_t, int64_t) const { return {}; }
};

// out[r] = init[r] + a[r] w for R rows; init may be null for zero, init_stride 0 for the same in every row.
template <int R, int V, typename F, typename W, typename Beside>
[[gnu::noinline]] void product_tile(const typename W::Row* const* rows, int64_t k, int64_t end, const typename W::Word* w,
                                    const typename W::Word* ahead, Beside lines, const F* init, int64_t init_stride, F* out) {
  constexpr int64_t L = kLanes<F>;
  constexpr int kSets = R * V < 8 ? 2 : 1;  // of sums: eight of them hide the latency of the multiply-add
  constexpr int kStep = W::kGroup > kSets * W::kTaken ? W::kGroup : kSets * W::kTaken;
  const typename W::Row* a[R];
  Vec<F> sums[kSets][R][V];
  RNNATTN_UNROLL for (int r = 0; r < R; ++r) {
    a[r] = rows[r];
    RNNATTN_UNROLL for (int v = 0; v < V; ++v) {
      sums[0][r][v] = init ? load(init + r * init_stride + v * L) : Vec<F>{};
      if (kSets == 2) sums[1][r][v] = Vec<F>{};
    }
  }
  for (; k + kStep <= end; k += kStep, w += kStep / W::kGroup * V * L) {
    // Sums of one row wait for nothing but memory, which the hardware foresees.
    if (R > 1) __builtin_prefetch(ahead, 0, 2), ahead += 64 / sizeof *ahead, lines.fetch();
    RNNATTN_UNROLL for (int j = 0; j < kStep; j += W::kTaken) {
      decltype(W::weights(w, 0)) column[V];
      RNNATTN_UNROLL for (int v = 0; v < V; ++v)
        column[v] = W::weights(w + (j / W::kGroup * V + v) * L, j % W::kGroup);
      RNNATTN_UNROLL for (int r = 0; r < R; ++r) {
        const auto element = W::element(a[r] + k + j, W::kTaken);
        RNNATTN_UNROLL for (int v = 0; v < V; ++v) {
          Vec<F>& sum = sums[j / W::kTaken % kSets][r][v];
          sum = W::multiply_add(sum, element, column[v]);
        }
      }
    }
  }
  for (int j = 0; k < end; k += W::kTaken, j += W::kTaken)
    RNNATTN_UNROLL for (int v = 0; v < V; ++v) {
      const auto column = W::weights(w + (j / W::kGroup * V + v) * L, j % W::kGroup);
      RNNATTN_UNROLL for (int r = 0; r < R; ++r)
        sums[0][r][v] = W::multiply_add(sums[0][r][v], W::element(a[r] + k, end - k), column);
    }
  RNNATTN_UNROLL for (int r = 0; r < R; ++r)
    RNNATTN_UNROLL for (int v = 0; v < V; ++v)
      store<F>(out + (r * V + v) * L, kSets == 2 ? sums[0][r][v] + sums[kSets - 1][r][v] : sums[0][r][v]);
}

template <int V, typename F, typename W, typename Beside, int R = kRows<V>, typename... Arguments>
inline void product_of(int64_t rows, Arguments... arguments) {
  if constexpr (R > 1)
    if (rows < R) return product_of<V, F, W, Beside, R - 1>(rows, arguments...);
  product_tile<R, V, F, W, Beside>(arguments...);
}

// out[i - begin] = init + a[i] w for the rows [begin, end), out [rows][V][lanes]; init [V][lanes], or null for zero.
// lines(first row, rows) tells for each tile what to fetch beside.
template <int V, typename F, typename W, typename Fetch>
inline void multiply(const Product<F, W>& p, int64_t begin, int64_t end, const F* init, F* out, const Fetch& lines) {
  constexpr int64_t kBlock = V * kLanes<F>;
  const int64_t n = end - begin, tiles = (n + kRows<V> - 1) / kRows<V>;
  const F* given = p.scale ? nullptr : init;
  int64_t k = 0;
  do {
    const int64_t until = k + kDepth < p.K ? k + kDepth : p.K;
    const auto* part = p.w + words<W>(k) * kBlock;
    const auto* next = until < p.K ? p.w + words<W>(until) * kBlock : p.ahead;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = n * tile / tiles, rows = n * (tile + 1) / tiles - first;
      F* to = out + first * kBlock;
      // V tiles have fetched the whole part.
      const auto* ahead = tile < V ? next + tile * words<W>(until - k) * (64 / sizeof *next) : part;
      const auto product = [&](auto beside) {
        product_of<V, F, W, decltype(beside)>(rows, p.rows + begin + first, k, until, part, ahead, beside, k ? to : given, k ? kBlock : 0, to);
      };
      if (k) product(NoLines{});
      else product(lines(begin + first, rows));
    }
    k = until;
  } while (k < p.K);
  if (!p.scale) return;
  for (int64_t i = 0; i < n * V; ++i) {
    const int64_t at = i * kLanes<F>, column = at % kBlock;
    const Vec<F> sum = load(out + at) * load(p.scale + column);
    store<F>(out + at, init ? sum + load(init + column) : sum);
  }
}

template <int V, typename F, typename W>
inline void multiply(const Product<F, W>& p, int64_t begin, int64_t end, const F* init, F* out) {
  multiply<V, F, W>(p, begin, end, init, out, NoLines{});
}

// The sums of the rows [begin, end), some rows at a time: body(first row, rows, sums [rows][V][lanes]).
template <int V, typename F, typename W, typename Fetch, typename Body>
inline void for_products(const Product<F, W>& p, int64_t begin, int64_t end, const Fetch& lines, const Body& body) {
  constexpr int64_t kTogether = 8 * kRows<V>;
  for (int64_t first = begin, last; first < end; first = last) {
    alignas(64) F sums[kTogether * V * kLanes<F>];
    last = end - first > kTogether ? first + kTogether : end;
    multiply<V, F, W>(p, first, last, nullptr, sums, lines);
    body(first, last - first, sums);
  }
}

template <int V, typename F, typename W, typename Body>
inline void for_products(const Product<F, W>& p, int64_t begin, int64_t end, const Body& body) {
  for_products<V, F, W>(p, begin, end, NoLines{}, body);
}

}  // namespace
