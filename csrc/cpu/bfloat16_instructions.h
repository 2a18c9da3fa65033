// Instructions that multiply bfloat16: of AVX512_BF16 on vectors, and of AMX on tiles. With RNNATTN_EMULATE their
// twins in plain C++ stand in for both (bfloat16_twins.h).
#pragma once

#include "stored.h"

namespace {

// Registers of AMX: eight tiles of up to 16 rows of 64 bytes.
constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

// Operand of ldtilecfg.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace

#if defined(RNNATTN_EMULATE)
#include "bfloat16_twins.h"
#else

namespace {

// sum + the products of a pair of a with a pair of w in each lane.
RNNATTN_INLINE FloatVec dot_pairs(FloatVec sum, IntVec a, IntVec w) {
  return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)a);
}

#if defined(__AMX_BF16__)
#define RNNATTN_HAS_TILES 1

// Inline assembly, as the compilers' intrinsics take tiles by literal digits only, and do not all say what they read.
RNNATTN_INLINE void tile_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
RNNATTN_INLINE void tile_release() { asm volatile("tilerelease"); }
template <int T> RNNATTN_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }

template <int T> RNNATTN_INLINE void tile_load(const void* rows, int64_t stride) {  // stride in bytes
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(T) : "memory");
}

template <int T> RNNATTN_INLINE void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(T) : "memory");
}

// Tile C += A B: rows of pairs times pairs of rows.
template <int C, int A, int B> RNNATTN_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
#endif

}  // namespace
#endif
