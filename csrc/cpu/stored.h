// Vectors of F in memory as F or rounded to 16 bits, to nearest with ties to even as torch rounds (but subnormal bfloat16 to
// zero, by AVX512_BF16).
#pragma once

#include "../recurrent.h"
#include "vec.h"

namespace {

using rnnattn::Stored;

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

RNNATTN_INLINE IntVec bits(FloatVec v) { return (IntVec)v; }  // a cast of vectors keeps the bits
RNNATTN_INLINE FloatVec from_bits(IntVec v) { return (FloatVec)v; }

RNNATTN_INLINE FloatVec from_bfloat16(IntVec stored) { return from_bits(stored << 16); }

RNNATTN_INLINE IntVec to_bfloat16(FloatVec v) {
  const IntVec b = bits(v), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return v == v ? (rounded & 0xffff) : (IntVec{} + 0x7fc0);
}

// The exponent is rebiased by a product with 2^112, which gets subnormal numbers right as well.
RNNATTN_INLINE FloatVec from_half(IntVec stored) {
  const IntVec magnitude = (stored & 0x7fff) << 13, sign = (stored & 0x8000) << 16;
  const IntVec finite = bits(from_bits(magnitude) * 0x1p112f);
  return from_bits((magnitude >= (0x7c00 << 13) ? (magnitude | 0x7f800000) : finite) | sign);
}

RNNATTN_INLINE IntVec to_half(FloatVec v) {
  const IntVec b = bits(v), magnitude = b & 0x7fffffff, sign = (b >> 16) & 0x8000;
  const IntVec normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const IntVec subnormal = bits(from_bits(magnitude) + 0.5f) - (126 << 23);  // adding 1/2 rounds at 2^-24
  const IntVec special = magnitude > 0x7f800000 ? (IntVec{} + 0x7e00) : (IntVec{} + 0x7c00);
  const IntVec finite = magnitude < (113 << 23) ? subnormal : normal;
  return (magnitude >= (143 << 23) ? special : finite) | sign;
}

// 16-bit numbers, one to a lane; the first n lanes, the others as in load() and store().
#if defined(__AVX512BW__) && defined(__AVX512VL__)
// The compiler's own conversions take two halves through memory.
RNNATTN_INLINE IntVec load_narrow(const uint16_t* p, int64_t n) {
  const __m256i narrow = n == kLanes<float> ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return (IntVec)_mm512_cvtepu16_epi32(narrow);
}

RNNATTN_INLINE void store_narrow(uint16_t* p, __m256i narrow, int64_t n) {
  if (n == kLanes<float>) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
  else _mm256_mask_storeu_epi16(p, first_lanes(n), narrow);
}

RNNATTN_INLINE void store_narrow(uint16_t* p, IntVec v, int64_t n) { store_narrow(p, _mm512_cvtepi32_epi16((__m512i)v), n); }
#else
RNNATTN_INLINE IntVec load_narrow(const uint16_t* p, int64_t n) {
  HalfBits narrow{};
  if (n == kLanes<float>) std::memcpy(&narrow, p, sizeof narrow);
  else std::memcpy(&narrow, p, n * sizeof *p);
  return __builtin_convertvector(narrow, IntVec);
}

RNNATTN_INLINE void store_narrow(uint16_t* p, IntVec v, int64_t n) {
  const HalfBits narrow = __builtin_convertvector(v, HalfBits);
  if (n == kLanes<float>) std::memcpy(p, &narrow, sizeof narrow);
  else std::memcpy(p, &narrow, n * sizeof *p);
}
#endif

// Lanes [0, n) of the elements from index on.
RNNATTN_INLINE FloatVec load_stored(Stored stored, const void* base, int64_t index, int64_t n, float) {
  if (stored == Stored::kFull) return load(static_cast<const float*>(base) + index, n);
  const IntVec wide = load_narrow(static_cast<const uint16_t*>(base) + index, n);
  return stored == Stored::kBFloat16 ? from_bfloat16(wide) : from_half(wide);
}

RNNATTN_INLINE DoubleVec load_stored(Stored, const void* base, int64_t index, int64_t n, double) {
  return load(static_cast<const double*>(base) + index, n);
}

template <typename F>
RNNATTN_INLINE Vec<F> load_stored(Stored stored, const void* base, int64_t index, int64_t n) {
  return load_stored(stored, base, index, n, F{});
}

// Returns what was stored, as F: v itself, or v rounded.
RNNATTN_INLINE FloatVec store_as(Stored stored, void* base, int64_t index, FloatVec v, int64_t n) {
  if (stored == Stored::kFull) {
    store<float>(static_cast<float*>(base) + index, v, n);
    return v;
  }
#if defined(__AVX512BF16__)
  if (stored == Stored::kBFloat16) {
    const __m256i narrow = (__m256i)_mm512_cvtneps_pbh((__m512)v);  // subnormal numbers count as zero
    store_narrow(static_cast<uint16_t*>(base) + index, narrow, n);
    return from_bfloat16((IntVec)_mm512_cvtepu16_epi32(narrow));
  }
#endif
  const IntVec rounded = stored == Stored::kBFloat16 ? to_bfloat16(v) : to_half(v);
  store_narrow(static_cast<uint16_t*>(base) + index, rounded, n);
  return stored == Stored::kBFloat16 ? from_bfloat16(rounded) : from_half(rounded);
}

RNNATTN_INLINE DoubleVec store_as(Stored, void* base, int64_t index, DoubleVec v, int64_t n) {
  store<double>(static_cast<double*>(base) + index, v, n);
  return v;
}

// Rows that products take: of F, or of bfloat16.
template <typename F> RNNATTN_INLINE Vec<F> load_row(const F* p, int64_t n) { return load(p, n); }
template <typename F> RNNATTN_INLINE void store_row(F* p, Vec<F> v, int64_t n) { store<F>(p, v, n); }
RNNATTN_INLINE FloatVec load_row(const uint16_t* p, int64_t n) { return load_stored<float>(Stored::kBFloat16, p, 0, n); }
RNNATTN_INLINE void store_row(uint16_t* p, FloatVec v, int64_t n) { store_as(Stored::kBFloat16, p, 0, v, n); }

}  // namespace
