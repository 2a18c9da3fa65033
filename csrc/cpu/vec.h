// Vectors of the instruction set this file is compiled for, through the compiler's vector types,
// and the elementary functions on them. Knows no torch; everything has internal linkage, so that
// objects compiled for different instruction sets can be linked together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));

template <typename F> struct VecOf;
template <> struct VecOf<float> { using type = FloatVec; };
template <> struct VecOf<double> { using type = DoubleVec; };
template <typename F> using Vec = typename VecOf<F>::type;
template <typename F> constexpr int64_t kLanes = kVectorBytes / sizeof(F);

// Left to itself the compiler calls the functions below one after the other; inline, the chains of several overlap.
#define RNNATTN_INLINE [[gnu::always_inline]] inline

template <typename F> RNNATTN_INLINE Vec<F> load(const F* p) { Vec<F> v; std::memcpy(&v, p, sizeof v); return v; }
template <typename F> RNNATTN_INLINE void store(F* p, Vec<F> v) { std::memcpy(p, &v, sizeof v); }
template <typename F> RNNATTN_INLINE Vec<F> splat(F a) { return a - Vec<F>{}; }  // 0 + a would add: -0 + 0 is 0

// The first n lanes; the others are zero (load) or left alone (store).
#if defined(__AVX512F__)
RNNATTN_INLINE __mmask16 first_lanes(int64_t n) { return (1u << n) - 1; }
RNNATTN_INLINE FloatVec load_lanes(const float* p, int64_t n) { return (FloatVec)_mm512_maskz_loadu_ps(first_lanes(n), p); }
RNNATTN_INLINE DoubleVec load_lanes(const double* p, int64_t n) { return (DoubleVec)_mm512_maskz_loadu_pd(first_lanes(n), p); }
RNNATTN_INLINE void store_lanes(float* p, FloatVec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
RNNATTN_INLINE void store_lanes(double* p, DoubleVec v, int64_t n) { _mm512_mask_storeu_pd(p, first_lanes(n), (__m512d)v); }
#else
template <typename F> RNNATTN_INLINE Vec<F> load_lanes(const F* p, int64_t n) {
  Vec<F> v{};
  std::memcpy(&v, p, n * sizeof(F));
  return v;
}
template <typename F> RNNATTN_INLINE void store_lanes(F* p, Vec<F> v, int64_t n) { std::memcpy(p, &v, n * sizeof(F)); }
#endif
template <typename F> RNNATTN_INLINE Vec<F> load(const F* p, int64_t n) { return n == kLanes<F> ? load(p) : load_lanes(p, n); }
template <typename F> RNNATTN_INLINE void store(F* p, Vec<F> v, int64_t n) {
  if (n == kLanes<F>) return store<F>(p, v);
  store_lanes(p, v, n);
}

// Loops over the vectors of a tile are unrolled where they stand, so that its sums live in registers.
#define RNNATTN_UNROLL _Pragma("GCC unroll 16")

// Calls body(index, lanes) over [begin, end): full vectors, then one partial.
template <typename F, typename Body>
inline void for_lanes(int64_t begin, int64_t end, Body body) {
  int64_t k = begin;
  for (; k + kLanes<F> <= end; k += kLanes<F>) body(k, kLanes<F>);
  if (k < end) body(k, end - k);
}

template <typename F> inline F total(Vec<F> v) {
  F sum = 0;
  for (int64_t k = 0; k < kLanes<F>; ++k) sum += v[k];
  return sum;
}

// In [low, high]; NaN stays.
RNNATTN_INLINE FloatVec clamp(FloatVec x, float low, float high) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#else
  const FloatVec y = x < low ? splat(low) : x;
  return y > high ? splat(high) : y;
#endif
}

// x = k ln 2 + r, |r| <= ln(2) / 2, and e^r - 1 by Cephes' polynomial (Moshier 1989): what the
// functions below are made of, each to an ulp or two.
struct Exponential {
  FloatVec k, r_exp;
};

RNNATTN_INLINE Exponential exponential(FloatVec x) {
  const FloatVec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const FloatVec k = (x * 1.44269504f + magic) - magic;
  FloatVec r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  FloatVec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {k, p * (r * r) + r};
}

// x 2^k for integers k that leave a normal number.
RNNATTN_INLINE FloatVec scale(FloatVec x, FloatVec k) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_scalef_ps((__m512)x, (__m512)k);
#else
  return x * (FloatVec)((__builtin_convertvector(k, IntVec) + 127) << 23);
#endif
}

// Arguments are clamped to where the result is a normal number: pre-activations beyond saturate anyway.
RNNATTN_INLINE FloatVec exp(FloatVec x) {
  const Exponential e = exponential(clamp(x, -87.0f, 88.0f));
  return scale(e.r_exp + 1.0f, e.k);
}

// 1 / x to an ulp or so. A division takes a core with AVX-512 as long as ten multiply-adds; its
// estimate of 14 bits doubles them in one step of Newton's.
RNNATTN_INLINE FloatVec reciprocal(FloatVec x) {
#if defined(__AVX512F__)
  const FloatVec estimate = (FloatVec)_mm512_rcp14_ps((__m512)x);
  return estimate + estimate * (1.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

RNNATTN_INLINE FloatVec sigmoid(FloatVec x) { return reciprocal(1.0f + exp(-x)); }

// m = e^2x - 1 = 2^k (e^r - 1) + (2^k - 1), which keeps the leading digits near zero, and 1 / (m + 2).
struct Tanh {
  FloatVec m, part;
};

RNNATTN_INLINE Tanh tanh_parts(FloatVec x) {
  const Exponential e = exponential(clamp(x + x, -40.0f, 40.0f));
  const FloatVec two_k = scale(splat(1.0f), e.k), m = e.r_exp * two_k + (two_k - 1.0f);
  return {m, reciprocal(m + 2.0f)};
}

RNNATTN_INLINE FloatVec tanh(FloatVec x) {
  const Tanh t = tanh_parts(x);
  return t.m * t.part;
}

// From a half on by 1 - 2 / (m + 2), within half an epsilon: 1 - tanh^2 keeps its digits, for a fifth of tanh's time more.
RNNATTN_INLINE FloatVec precise_tanh(FloatVec x) {
  const IntVec sign = (IntVec)x & INT32_MIN;
  const Tanh t = tanh_parts((FloatVec)((IntVec)x ^ sign));
  return (FloatVec)((IntVec)(t.m < 2.0f ? t.m * t.part : 1.0f - 2.0f * t.part) | sign);
}

// double stays with the C library, one lane at a time: it is there for checks, not for speed.
inline DoubleVec exp(DoubleVec x) {
  for (int64_t k = 0; k < kLanes<double>; ++k) x[k] = std::exp(x[k]);
  return x;
}
inline DoubleVec sigmoid(DoubleVec x) { return 1.0 / (1.0 + exp(-x)); }
inline DoubleVec tanh(DoubleVec x) {
  for (int64_t k = 0; k < kLanes<double>; ++k) x[k] = std::tanh(x[k]);
  return x;
}
inline DoubleVec precise_tanh(DoubleVec x) { return tanh(x); }

// What is rounded to bfloat16 at once, to 8 bits, needs no more than 13: within 2^-13 of the value, near zero too.
struct AllBits {};
struct ThirteenBits {};

template <typename V> RNNATTN_INLINE V sigmoid(V x, AllBits) { return sigmoid(x); }
template <typename V> RNNATTN_INLINE V tanh(V x, AllBits) { return tanh(x); }
template <typename V> RNNATTN_INLINE V precise_tanh(V x, AllBits) { return precise_tanh(x); }

#if defined(__AVX512F__)
// 2^x - 1 = 2^k (2^r - 1) + (2^k - 1), |r| <= 1/2; 2^r - 1 within 1.5e-5 of the value, by the polynomial whose largest
// relative error is smallest. Infinite x have r = 0.
struct PowerOfTwo {
  FloatVec k, r_power;
};

RNNATTN_INLINE PowerOfTwo power_of_two(FloatVec x) {
  const FloatVec r = (FloatVec)_mm512_reduce_ps((__m512)x, 0);
  const FloatVec p = (r * 9.618095e-3f + 5.5837248e-2f) * r + 2.4023253e-1f;
  return {x - r, (p * r + 6.9313687e-1f) * r};
}

RNNATTN_INLINE FloatVec sigmoid(FloatVec x, ThirteenBits) {
  const PowerOfTwo e = power_of_two(x * -1.44269504f);
  return (FloatVec)_mm512_rcp14_ps((__m512)(1.0f + scale(1.0f + e.r_power, e.k)));
}

RNNATTN_INLINE FloatVec tanh(FloatVec x, ThirteenBits) {
  const PowerOfTwo e = power_of_two((FloatVec)_mm512_min_ps(_mm512_set1_ps(60.0f), (__m512)(x * 2.88539008f)));
  const FloatVec two_k = scale(splat(1.0f), e.k), m = e.r_power * two_k + (two_k - 1.0f);
  return m * (FloatVec)_mm512_rcp14_ps((__m512)(m + 2.0f));
}
#else
RNNATTN_INLINE FloatVec sigmoid(FloatVec x, ThirteenBits) { return sigmoid(x); }
RNNATTN_INLINE FloatVec tanh(FloatVec x, ThirteenBits) { return tanh(x); }
#endif
RNNATTN_INLINE FloatVec precise_tanh(FloatVec x, ThirteenBits bits) { return tanh(x, bits); }

}  // namespace
