// Products of a few rows with a panel of packed weights, the sums kept in registers.
// A panel holds one block of columns: [K][V vectors][lanes].
#pragma once

#include "../recurrent.h"
#include "vec.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

constexpr int kWide = 4;  // vectors of a panel that has plain columns

// Rows of a tile: as many sums as registers hold beside a row of the panel and one element of a.
template <int V> constexpr int kRows = V == 3 ? kRegisters / 4 : (kRegisters - V - 2) / V;

// Rows times a panel, of which part after part of kDepth steps of k is multiplied with all rows: it
// stays in the core's own cache for them. ahead is the panel to come after this one: each tile fetches
// some cache lines of the part to come, or the first tile on it would wait for the shared cache.
template <typename F>
struct Product {
  const F* const* rows;
  int64_t K;
  const F* w;
  const F* ahead;
};

constexpr int64_t kDepth = 512;

// out[r] = init[r] + a[r] w for R rows; init may be null for zero, init_stride 0 for the same in every row.
template <int R, int V, typename F>
[[gnu::noinline]] void product_tile(const F* const* rows, int64_t k, int64_t end, const F* w, const F* ahead,
                                    const F* init, int64_t init_stride, F* out) {
  constexpr int64_t L = kLanes<F>;
  const F* a[R];
  Vec<F> sums[R][V];
  RNNATTN_UNROLL for (int r = 0; r < R; ++r) {
    a[r] = rows[r];
    RNNATTN_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = init ? load(init + r * init_stride + v * L) : Vec<F>{};
  }
  if constexpr (R * V < 8) {  // twice as many sums, to hide the latency of the multiply-add
    Vec<F> odd[R][V];
    RNNATTN_UNROLL for (int r = 0; r < R; ++r)
      RNNATTN_UNROLL for (int v = 0; v < V; ++v) odd[r][v] = Vec<F>{};
    for (; k + 2 <= end; k += 2, w += 2 * V * L)
      RNNATTN_UNROLL for (int r = 0; r < R; ++r)
        RNNATTN_UNROLL for (int v = 0; v < V; ++v) {
          sums[r][v] += splat(a[r][k]) * load(w + v * L);
          odd[r][v] += splat(a[r][k + 1]) * load(w + (V + v) * L);
        }
    RNNATTN_UNROLL for (int r = 0; r < R; ++r)
      RNNATTN_UNROLL for (int v = 0; v < V; ++v) sums[r][v] += odd[r][v];
  }
  for (; k < end; ++k, w += V * L, ahead += 64 / sizeof(F)) {
    __builtin_prefetch(ahead, 0, 2);
    Vec<F> column[V];
    RNNATTN_UNROLL for (int v = 0; v < V; ++v) column[v] = load(w + v * L);
    RNNATTN_UNROLL for (int r = 0; r < R; ++r) {
      const Vec<F> element = splat(a[r][k]);
      RNNATTN_UNROLL for (int v = 0; v < V; ++v) sums[r][v] += element * column[v];
    }
  }
  RNNATTN_UNROLL for (int r = 0; r < R; ++r)
    RNNATTN_UNROLL for (int v = 0; v < V; ++v) store<F>(out + (r * V + v) * L, sums[r][v]);
}

template <int V, typename F, int R = kRows<V>, typename... Arguments>
inline void product_of(int64_t rows, Arguments... arguments) {
  if constexpr (R > 1)
    if (rows < R) return product_of<V, F, R - 1>(rows, arguments...);
  product_tile<R, V, F>(arguments...);
}

// out[i - begin] = init + a[i] w for the rows [begin, end), out [rows][V][lanes]; init [V][lanes], or null for zero.
template <int V, typename F>
inline void multiply(const Product<F>& p, int64_t begin, int64_t end, const F* init, F* out) {
  constexpr int64_t kBlock = V * kLanes<F>;
  const int64_t n = end - begin, tiles = (n + kRows<V> - 1) / kRows<V>;
  int64_t k = 0;
  do {
    const int64_t until = k + kDepth < p.K ? k + kDepth : p.K;
    const F *part = p.w + k * kBlock, *next = until < p.K ? p.w + until * kBlock : p.ahead;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = n * tile / tiles, rows = n * (tile + 1) / tiles - first;
      F* to = out + first * kBlock;
      // V tiles have fetched the whole part.
      const F* ahead = tile < V ? next + tile * (until - k) * (64 / sizeof(F)) : part;
      product_of<V, F>(rows, p.rows + begin + first, k, until, part, ahead, k ? to : init, k ? kBlock : 0, to);
    }
    k = until;
  } while (k < p.K);
}

// The sums of the rows [begin, end), some rows at a time: body(first row, rows, sums [rows][V][lanes]).
template <int V, typename F, typename Body>
inline void for_products(const Product<F>& p, int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t kTogether = 8 * kRows<V>;
  for (int64_t first = begin; first < end; first += kTogether) {
    alignas(64) F sums[kTogether * V * kLanes<F>];
    const int64_t last = first + kTogether < end ? first + kTogether : end;
    multiply<V>(p, first, last, static_cast<const F*>(nullptr), sums);
    body(first, last - first, static_cast<const F*>(sums));
  }
}

}  // namespace
