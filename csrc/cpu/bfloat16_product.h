// Products of rows of bfloat16 with panels of bfloat16 pairs, summed in float, by the instructions for them.
// The panels' layout, [K / 2][V][lanes] words, suits both: a vector of pairs, and a tile of 16 rows of the panel.
#pragma once

#include <utility>

#include "bfloat16_instructions.h"
#include "product_kernel.h"

namespace {

// A pair of a row's numbers at once, by product_tile.
struct BFloat16Dots : PairsOfBFloat16 {
  using Row = uint16_t;
  static constexpr int kTaken = 2;

  RNNATTN_INLINE static IntVec weights(const int32_t* w, int) {
    IntVec pairs;
    std::memcpy(&pairs, w, sizeof pairs);
    return pairs;
  }

  // In every lane; left: what the row has from here on, beyond which nothing is read.
  RNNATTN_INLINE static IntVec element(const uint16_t* a, int64_t left) {
    int32_t pair = *a;
    if (left > 1) std::memcpy(&pair, a, sizeof pair);
    return IntVec{} + pair;
  }

  RNNATTN_INLINE static FloatVec multiply_add(FloatVec sum, IntVec a, IntVec column) { return dot_pairs(sum, a, column); }
  static void finish() {}
};

#if defined(RNNATTN_HAS_TILES)

// body(integral_constant<0>), ...: tiles are named by constants. Inline, or what the bodies refer to is in memory.
#define RNNATTN_INLINE_LAMBDA __attribute__((always_inline))
template <int N, typename Body>
RNNATTN_INLINE void for_constants(const Body& body) {
  const auto call = [&]<int... I>(std::integer_sequence<int, I...>) RNNATTN_INLINE_LAMBDA {
    (body(std::integral_constant<int, I>{}), ...);
  };
  call(std::make_integer_sequence<int, N>{});
}

// A tile of rows at once, be it of a single one: few rows wait for the panels, which tiles read faster than vectors do.
struct BFloat16Tiles : BFloat16Dots {
  static constexpr int64_t kTileRows = ::kTileRows;
  static constexpr int64_t kDepth = kTileBytes / sizeof(Row);  // steps of k in a tile
  static constexpr int kA = 4, kB = 6;                         // the tiles before are sums

  // Lays the rows of the products to come at one stride, a multiple of kDepth long, and sets the tiles to their number.
  // All but a single one are copied: rows that lie a power of two apart would meet in the first cache, and what other
  // threads wrote is fetched sooner by one copy than by the tiles that ask for it.
  static void arrange(const Row** rows, int64_t n, int64_t K, Row* memory) {
    if (!n) return;
    TileShapes shapes;
    for (int t = 0; t < kTiles; ++t) {
      shapes.rows[t] = t < kB && n < kTileRows ? n : kTileRows;
      shapes.row_bytes[t] = t < kA || t >= kB ? kLanes<float> * sizeof(float) : kTileBytes;
    }
    tile_configure(shapes);
    if (n == 1 && K % kDepth == 0) return;
    const int64_t width = rnnattn::padded_row(K);
    for (int64_t i = 0; i < n; ++i, memory += width) {
      if (K) std::memcpy(memory, rows[i], K * sizeof(Row));
      std::memset(memory + K, 0, (width - K) * sizeof(Row));
      rows[i] = memory;
    }
  }

  // Times that multiply() calls beside() for n rows and a depth of K.
  template <int C>
  static int64_t steps(int64_t n, int64_t K) {
    const int64_t tiles = (n + kTileRows - 1) / kTileRows;
    return (tiles / 2 * ((C + 1) / 2) + tiles % 2) * ((K + kDepth - 1) / kDepth);
  }

  struct Sums {
    int64_t n, first, second;  // rows, of which those of a tile, and of another
    const float* init;
    int64_t init_row;
    float* out;
  };

  // out[i] = init[i] + the sum of the products' a[begin + i] w, for n rows that were arranged and C vectors of a panel's V
  // from kColumn on, out [n][V][lanes]. init [n or 1][V][lanes] has rows init_row apart, or is null for zero. beside() is
  // called at each step of k. The last tile goes over rows of the one before it again.
  template <int V, int kColumn, int C, typename Beside>
  static void multiply(const Product<float, BFloat16Tiles>* products, int count, int64_t begin, int64_t n, const float* init,
                       int64_t init_row, float* out, const Beside& beside) {
    for (int64_t i = 0; i < n; i += 2 * kTileRows) {
      const int64_t last = n < kTileRows ? 0 : n - kTileRows, first = i < last ? i : last;
      const int64_t second = i + kTileRows < last ? i + kTileRows : last;
      const Sums sums{n, first, second, init, init_row, out};
      if (first == second) {
        columns<1, kColumn, C, V>(products, count, begin, sums, beside);
      } else {
        columns<2, kColumn, C < 2 ? C : 2, V>(products, count, begin, sums, beside);
        if constexpr (C > 2) columns<2, kColumn + 2, C - 2, V>(products, count, begin, sums, beside);
      }
    }
  }

 private:
  // R tiles of rows with C vectors of the panel's columns.
  template <int R, int kColumn, int C, int V, typename Beside>
  [[gnu::noinline]] static void columns(const Product<float, BFloat16Tiles>* products, int count, int64_t begin, const Sums sums,
                                        const Beside& beside) {
    static_assert(R * C <= kA && R <= kB - kA);
    constexpr int64_t L = kLanes<float>, kStride = V * L * sizeof(Word);
    const int64_t tile_rows[2] = {sums.first, sums.second};
    for_constants<R * C>([&](auto t) RNNATTN_INLINE_LAMBDA {
      if (sums.init) tile_load<t>(sums.init + tile_rows[t / C] * sums.init_row + (kColumn + t % C) * L, sums.init_row * sizeof(float));
      else tile_zero<t>();
    });
    for (const auto* p = products; p < products + count; ++p) {
      const Row* const* rows = p->rows + begin;
      const int64_t stride = sums.n > 1 ? (rows[1] - rows[0]) * sizeof(Row) : 0;
      const Row* a[2] = {rows[sums.first], rows[sums.second]};
      const Word* w = p->w + kColumn * L;
      for (int64_t k = 0; k < p->K; k += kDepth, w += kDepth / kGroup * V * L) {
        for_constants<R>([&](auto r) RNNATTN_INLINE_LAMBDA { tile_load<kA + r>(a[r] + k, stride); });
        for_constants<C>([&](auto c) RNNATTN_INLINE_LAMBDA {
          constexpr int kTile = kB + c % 2;
          tile_load<kTile>(w + c * L, kStride);
          for_constants<R>([&](auto r) RNNATTN_INLINE_LAMBDA { tile_multiply_add<r * C + c, kA + r, kTile>(); });
        });
        beside();
      }
    }
    for_constants<R * C>([&](auto t) RNNATTN_INLINE_LAMBDA {
      tile_store<t>(sums.out + (tile_rows[t / C] * V + kColumn + t % C) * L, kStride);
    });
  }

 public:
  static void finish() { tile_release(); }
};

using BFloat16Rows = BFloat16Tiles;
#else
using BFloat16Rows = BFloat16Dots;
#endif

}  // namespace
