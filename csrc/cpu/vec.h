// Vectors of the instruction set this file is compiled for, through the compiler's vector types,
// and the elementary functions on them. Knows no torch; everything has internal linkage, so that
// objects compiled for different instruction sets can be linked together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

template <typename F> inline Vec<F> load(const F* p) { Vec<F> v; std::memcpy(&v, p, sizeof v); return v; }
template <typename F> inline void store(F* p, Vec<F> v) { std::memcpy(p, &v, sizeof v); }
template <typename F> inline Vec<F> splat(F a) { return Vec<F>{} + a; }

// The first n lanes; the others are zero (load) or left alone (store).
template <typename F> inline Vec<F> load(const F* p, int64_t n) {
  if (n == kLanes<F>) return load(p);
  Vec<F> v{};
  std::memcpy(&v, p, n * sizeof(F));
  return v;
}
template <typename F> inline void store(F* p, Vec<F> v, int64_t n) {
  if (n == kLanes<F>) return store<F>(p, v);
  std::memcpy(p, &v, n * sizeof(F));
}

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

// exp by 2^k e^r, |r| <= ln(2)/2, with Cephes' polynomial (Moshier 1989); 1 ulp or so. Arguments
// are clamped to where the result is a normal number: pre-activations beyond saturate anyway.
inline FloatVec exp(FloatVec x) {
  const FloatVec low = splat(-87.0f), high = splat(88.0f);
  FloatVec y = x < low ? low : x;  // keeps NaN
  y = y > high ? high : y;
  const FloatVec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const FloatVec k = (y * 1.44269504f + magic) - magic;
  FloatVec r = y - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  FloatVec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(k, IntVec) + 127) << 23;
  return p * reinterpret_cast<const FloatVec&>(exponent);
}

inline FloatVec sigmoid(FloatVec x) { return 1.0f / (1.0f + exp(-x)); }

// Cephes' odd polynomial near zero, where 1 - 2/(e^2x + 1) would lose the leading digits.
inline FloatVec tanh(FloatVec x) {
  const FloatVec a = x < 0 ? -x : x;
  const FloatVec large = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  const FloatVec z = x * x;
  FloatVec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const FloatVec small = p * z * x + x;
  return a < 0.625f ? small : (x < 0 ? -large : large);
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

}  // namespace
