// The 16-bit formats of csrc/cpu/stored.h, one number at a time and by the book: an independent check of
// the vector code, for bfloat16 and float16 alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../../csrc/recurrent.h"

namespace rnnattn::test {

struct Format {
  int exponent_bits, digits;  // digits: of the significand, with the leading one that is not stored
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int fraction_bits() const { return digits - 1; }
};

inline Format format_of(Stored stored) { return stored == Stored::kHalf ? Format{5, 11} : Format{8, 8}; }

inline double decode(Stored stored, uint16_t bits) {
  const Format f = format_of(stored);
  const int exponent = bits >> f.fraction_bits() & ((1 << f.exponent_bits) - 1);
  const int fraction = bits & ((1 << f.fraction_bits()) - 1);
  double value;
  if (exponent == (1 << f.exponent_bits) - 1)
    value = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  else
    value = std::ldexp(exponent ? fraction + (1 << f.fraction_bits()) : fraction,
                       (exponent ? exponent : 1) - f.bias() - f.fraction_bits());
  return bits >> 15 ? -value : value;
}

// To the nearest number of the format, ties to even; beyond the largest by half a unit: infinity.
inline double rounded(Stored stored, double value) {
  if (stored == Stored::kFull || !std::isfinite(value) || value == 0) return value;
  const Format f = format_of(stored);
  int exponent;
  std::frexp(value, &exponent);
  const int smallest = 2 - f.bias() - f.digits;  // exponent of the least subnormal number
  const double unit = std::ldexp(1.0, exponent - f.digits < smallest ? smallest : exponent - f.digits);
  const double nearest = std::nearbyint(value / unit) * unit, largest = std::ldexp(2.0 - std::ldexp(1.0, 1 - f.digits), f.bias());
  return std::fabs(nearest) > largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : nearest;
}

// The bits of a number that the format has.
inline uint16_t encode(Stored stored, double value) {
  const Format f = format_of(stored);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int top = ((1 << f.exponent_bits) - 1) << f.fraction_bits();
  if (std::isnan(value)) return top | 1 << (f.fraction_bits() - 1);
  if (std::isinf(value)) return sign | top;
  if (value == 0) return sign;
  int exponent;
  std::frexp(value, &exponent);
  const int biased = exponent - 1 + f.bias();
  const int place = (biased > 0 ? biased : 1) - f.bias() - f.fraction_bits();
  const auto units = static_cast<int>(std::ldexp(std::fabs(value), -place));
  return sign | (biased > 0 ? (biased << f.fraction_bits()) + units - (1 << f.fraction_bits()) : units);
}

}  // namespace rnnattn::test
