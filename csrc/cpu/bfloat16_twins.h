// What the instructions of bfloat16_instructions.h do, in plain C++ by Intel's manual (SDM, volume 2: VDPBF16PS,
// LDTILECFG, TILELOADD, TDPBF16PS): for tests on processors that have none of them. What raises an exception there ends
// the program. Products of bfloat16 are exact in float, so that a product and a sum round as the manual's fused ones.
#pragma once

namespace {

#define RNNATTN_HAS_TILES 1

// Subnormal numbers count as zero, read or written.
RNNATTN_INLINE float flushed(float a) {
  uint32_t word;
  std::memcpy(&word, &a, sizeof word);
  return word & 0x7f800000 ? a : word >> 31 ? -0.0f : 0.0f;
}

RNNATTN_INLINE FloatVec flushed(FloatVec a) {
  const IntVec word = bits(a);
  return from_bits((word & 0x7f800000) == 0 ? word & INT32_MIN : word);
}

RNNATTN_INLINE FloatVec dot_pairs(FloatVec sum, IntVec a, IntVec w) {
  const auto odd = [](IntVec pair) { return flushed(from_bits(pair & -65536)); };
  const auto even = [](IntVec pair) { return flushed(from_bits(pair << 16)); };
  sum = flushed(flushed(sum) + odd(w) * odd(a));
  return flushed(sum + even(w) * even(a));
}

struct TileUnit {  // of one thread
  TileShapes shapes;
  bool configured;
  uint32_t words[kTiles][kTileRows][kTileBytes / 4];
};
thread_local TileUnit tile_unit;

// Whether ldtilecfg takes the shapes.
inline bool tile_shapes_are_valid(const TileShapes& s) {
  bool valid = s.palette <= 1;
  for (const uint8_t byte : s.reserved) valid &= byte == 0;
  for (int t = 0; t < 16; ++t) {
    valid &= (s.rows[t] == 0) == (s.row_bytes[t] == 0);  // a tile has both, or is not used
    valid &= t < kTiles ? s.rows[t] <= kTileRows && s.row_bytes[t] <= kTileBytes : s.rows[t] == 0;
  }
  return valid;
}

inline void expect_tiles(bool good) {
  if (!good) __builtin_trap();
}

inline void tile_release() { tile_unit = {}; }

inline void tile_configure(const TileShapes& shapes) {
  expect_tiles(tile_shapes_are_valid(shapes));
  tile_release();
  tile_unit.shapes = shapes;
  tile_unit.configured = shapes.palette == 1;
}

// Tile t, which is configured.
template <int T>
inline auto& tile() {
  static_assert(T >= 0 && T < kTiles);
  expect_tiles(tile_unit.configured && tile_unit.shapes.rows[T]);
  return tile_unit.words[T];
}

template <int T> inline void tile_zero() { std::memset(tile<T>(), 0, sizeof tile_unit.words[T]); }

template <int T>
inline void tile_load(const void* rows, int64_t stride) {
  tile_zero<T>();  // what lies beyond the configured rows and bytes
  for (int r = 0; r < tile_unit.shapes.rows[T]; ++r)
    std::memcpy(tile<T>()[r], static_cast<const char*>(rows) + r * stride, tile_unit.shapes.row_bytes[T]);
}

template <int T>
inline void tile_store(void* rows, int64_t stride) {
  for (int r = 0; r < tile_unit.shapes.rows[T]; ++r)
    std::memcpy(static_cast<char*>(rows) + r * stride, tile<T>()[r], tile_unit.shapes.row_bytes[T]);
}

// The first or second bfloat16 of a word.
inline float number_of(uint32_t word, int which) {
  word = which ? word & 0xffff0000 : word << 16;
  float number;
  std::memcpy(&number, &word, sizeof number);
  return flushed(number);
}

template <int C, int A, int B>
inline void tile_multiply_add() {
  static_assert(C != A && C != B && A != B);
  auto &c = tile<C>(), &a = tile<A>(), &b = tile<B>();
  const uint8_t* rows = tile_unit.shapes.rows;
  const uint16_t* row_bytes = tile_unit.shapes.row_bytes;
  expect_tiles(rows[C] == rows[A] && row_bytes[A] == 4 * rows[B]);
  expect_tiles(row_bytes[C] == row_bytes[B] && row_bytes[C] % 4 == 0);
  const int columns = row_bytes[C] / 4;
  for (int m = 0; m < kTileRows; ++m) {
    float sums[2][kTileBytes / 4] = {};  // of the pairs' first and second numbers
    for (int k = 0; m < rows[C] && k < rows[B]; ++k)
      for (int which = 0; which < 2; ++which) {
        const float element = number_of(a[m][k], which);
        for (int n = 0; n < columns; ++n)
          sums[which][n] = flushed(sums[which][n] + element * number_of(b[k][n], which));
      }
    float row[kTileBytes / 4] = {};
    std::memcpy(row, c[m], columns * sizeof *row);
    for (int n = 0; n < columns; ++n) row[n] = flushed(flushed(row[n]) + flushed(sums[0][n] + sums[1][n]));
    if (m >= rows[C]) std::memset(row, 0, sizeof row);
    std::memcpy(c[m], row, sizeof row);
  }
}

}  // namespace
