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

// A tile of rows at once; the few rows that would leave it empty go the way of BFloat16Dots.
struct BFloat16Tiles : BFloat16Dots {
  static constexpr int64_t kTileRows = ::kTileRows, kMostRows = 4;
  static constexpr int64_t kDepth = kTileBytes / sizeof(Row);  // steps of k in a tile
  static constexpr int kA = 4, kB = 6;                         // the tiles before are sums

  // Lays the rows of the products to come at one stride, a multiple of kDepth long, and sets the tiles to their number.
  static void arrange(const Row** rows, int64_t n, int64_t K, Row* memory) {
    if (n <= kMostRows) return;
    TileShapes shapes;
    for (int t = 0; t < kTiles; ++t) {
      shapes.rows[t] = t < kB && n < kTileRows ? n : kTileRows;
      shapes.row_bytes[t] = t < kA || t >= kB ? kLanes<float> * sizeof(float) : kTileBytes;
    }
    tile_configure(shapes);
    bool in_place = K % kDepth == 0;
    for (int64_t i = 2; in_place && i < n; ++i) in_place = rows[i] - rows[i - 1] == rows[1] - rows[0];
    if (in_place) return;
    const int64_t width = rnnattn::padded_row(K);
    for (int64_t i = 0; i < n; ++i, memory += width) {
      std::memcpy(memory, rows[i], K * sizeof(Row));
      std::memset(memory + K, 0, (width - K) * sizeof(Row));
      rows[i] = memory;
    }
  }

  // As ::multiply, for n rows that were arranged. The last tile goes over rows of the one before it again.
  template <int V>
  static void multiply(const Product<float, BFloat16Tiles>& p, int64_t begin, int64_t n, const float* init, float* out) {
    for (int64_t i = 0; i < n; i += 2 * kTileRows) {
      const int64_t last = n < kTileRows ? 0 : n - kTileRows, first = i < last ? i : last;
      const int64_t second = i + kTileRows < last ? i + kTileRows : last;
      if (first == second) {
        columns<1, V, V>(p, begin, first, second, 0, init, out);
      } else {
        columns<2, 2, V>(p, begin, first, second, 0, init, out);
        columns<2, V - 2, V>(p, begin, first, second, 2, init, out);
      }
    }
  }

  // R tiles of rows, from first and from second on, with C vectors of the panel's columns, from column on.
  template <int R, int C, int V>
  [[gnu::noinline]] static void columns(const Product<float, BFloat16Tiles>& p, int64_t begin, int64_t first, int64_t second,
                                        int64_t column, const float* init, float* out) {
    static_assert(R * C <= kA && R <= kB - kA);
    constexpr int64_t L = kLanes<float>;
    const Row* const* rows = p.rows + begin;
    const int64_t stride = (rows[1] - rows[0]) * sizeof(Row), panel_stride = V * L * sizeof(Word);
    const Row* a[2] = {rows[first], rows[second]};
    const Word* w = p.w + column * L;
    for_constants<R * C>([&](auto t) RNNATTN_INLINE_LAMBDA {
      if (init) tile_load<t>(init + (column + t % C) * L, 0);
      else tile_zero<t>();
    });
    for (int64_t k = 0; k < p.K; k += kDepth, w += kDepth / kGroup * V * L) {
      for_constants<R>([&](auto r) RNNATTN_INLINE_LAMBDA { tile_load<kA + r>(a[r] + k, stride); });
      for_constants<C>([&](auto c) RNNATTN_INLINE_LAMBDA {
        constexpr int kTile = kB + c % 2;
        tile_load<kTile>(w + c * L, panel_stride);
        for_constants<R>([&](auto r) RNNATTN_INLINE_LAMBDA { tile_multiply_add<r * C + c, kA + r, kTile>(); });
      });
    }
    for_constants<R * C>([&](auto t) RNNATTN_INLINE_LAMBDA {
      tile_store<t>(out + ((t / C ? second : first) * V + column + t % C) * L, panel_stride);
    });
  }

  static void finish() { tile_release(); }
};

using BFloat16Rows = BFloat16Tiles;
#else
using BFloat16Rows = BFloat16Dots;
#endif

}  // namespace
