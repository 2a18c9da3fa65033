// The vectors of csrc/cpu (vec.h, stored.h) against the C library and the definitions of the 16-bit
// formats: every bit pattern of 16 bits, rounding at and beside every tie, partial vectors, NaN and inf.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cpu/stored.h"
#include "sixteen_bits.h"

namespace {

using namespace rnnattn::test;
constexpr int64_t L = kLanes<float>;
int failures = 0;

template <typename A, typename B>
void expect(bool good, const char* what, A argument, B got, B want) {
  if (!good && ++failures < 20) std::printf("FAILED %s(%.9g): %.9g, expected %.9g\n", what, double(argument), double(got), double(want));
}

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

void check_rounding(Stored stored, const char* name) {
  std::mt19937 random(1);
  std::vector<float> values;
  for (int64_t bits = 0; bits < 1 << 16; ++bits) {
    const uint16_t pattern[L] = {static_cast<uint16_t>(bits)};
    const float value = load_stored<float>(stored, pattern, 0, 1)[0];
    expect(same(value, decode(stored, bits)), name, bits, double(value), decode(stored, bits));
    // The number itself, the tie above it, the floats on both sides of the tie, and any other.
    const float tie = (value + decode(stored, bits + 1)) / 2;
    values.insert(values.end(), {value, tie, std::nextafter(tie, INFINITY), std::nextafter(tie, -INFINITY)});
    const auto any = static_cast<uint32_t>(random());
    std::memcpy(&values.emplace_back(), &any, sizeof any);
  }
  values.resize(values.size() / L * L);
  for (size_t i = 0; i < values.size(); i += L) {
    uint16_t out[L];
    const FloatVec back = store_as(stored, out, 0, load(values.data() + i), L);
    for (int64_t l = 0; l < L; ++l) {
      const double value = values[i + l], want = rounded(stored, value);
      expect(same(decode(stored, out[l]), want), name, value, decode(stored, out[l]), want);
      expect(same(back[l], want), name, value, double(back[l]), want);
    }
  }
}

void check_partial(Stored stored) {
  for (int64_t n = 1; n <= L; ++n) {
    std::vector<uint32_t> memory(L + 2, 0x7fc17fc1);  // NaN in all formats; exactly n elements may change
    std::vector<uint32_t> before(memory);
    void* base = memory.data();
    const int64_t element = stored == Stored::kFull ? 4 : 2, at = 1;
    store_as(stored, base, at, splat(1.5f), n);
    std::vector<char> changed(memory.size() * 4);
    for (size_t i = 0; i < changed.size(); ++i)
      changed[i] = reinterpret_cast<char*>(memory.data())[i] != reinterpret_cast<char*>(before.data())[i];
    const auto inside = [&](int64_t byte) { return byte >= at * element && byte < (at + n) * element; };
    for (size_t i = 0; i < changed.size(); ++i) expect(inside(i) || !changed[i], "bytes stored beyond", i, 1, 0);
    const FloatVec back = load_stored<float>(stored, base, at, n);
    for (int64_t l = 0; l < L; ++l) expect(back[l] == (l < n ? 1.5f : 0.0f), "partial vector", l, back[l], l < n ? 1.5f : 0.0f);
  }
}

template <typename F, typename Ours, typename Library>
void check_function(const char* name, double ulps, double absolute, Ours ours, Library library) {
  std::vector<F> arguments{F(0), F(-0.0), F(INFINITY), F(-INFINITY), F(NAN), F(1e-40), F(-1e-40), F(1e38), F(-1e38)};
  for (int k = -87000; k <= 88000; ++k) arguments.push_back(F(k) / 1000);
  for (int e = -40; e < 0; ++e) arguments.push_back(std::ldexp(F(1.1), e)), arguments.push_back(std::ldexp(F(-1.1), e));
  arguments.resize((arguments.size() + L - 1) / L * L, F(NAN));
  for (size_t i = 0; i < arguments.size(); i += kLanes<F>) {
    const Vec<F> got = ours(load(arguments.data() + i));
    for (int64_t l = 0; l < kLanes<F>; ++l) {
      const F x = arguments[i + l];
      const double want = library(double(x)), allowed = ulps * std::numeric_limits<F>::epsilon() * std::fabs(want) + absolute;
      expect(std::isnan(want) ? std::isnan(got[l]) : std::fabs(got[l] - want) <= allowed, name, x, double(got[l]), want);
    }
  }
}

double logistic(double a) { return 1 / (1 + std::exp(-a)); }

}  // namespace

int main() {
  check_rounding(Stored::kBFloat16, "bf16");
  check_rounding(Stored::kHalf, "fp16");
  for (Stored stored : {Stored::kFull, Stored::kBFloat16, Stored::kHalf}) check_partial(stored);
  // Where vec.h clamps, sigmoid ends at e^-87.
  check_function<float>("sigmoid", 3, 2e-38, [](FloatVec x) { return sigmoid(x); }, logistic);
  check_function<float>("tanh", 3, 0, [](FloatVec x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  const auto precise = [](FloatVec x) { return precise_tanh(x); };
  check_function<float>("precise_tanh", 3, 0, precise, [](double x) { return std::tanh(x); });
  // Near 1, where floats are half an epsilon apart.
  check_function<float>("precise_tanh near 1", 0, 0.55 * std::numeric_limits<float>::epsilon(),
                        [&](FloatVec x) { return precise(x * x + 1.0f); }, [](double x) { return std::tanh(float(x) * float(x) + 1.0f); });
  // To 13 bits, and beyond floats' range of e^-x to zero.
  check_function<float>("sigmoid, 13 bits", 1024, 2e-38, [](FloatVec x) { return sigmoid(x, ThirteenBits()); }, logistic);
  check_function<float>("tanh, 13 bits", 1024, 0, [](FloatVec x) { return tanh(x, ThirteenBits()); }, [](double x) { return std::tanh(x); });
  check_function<double>("sigmoid, double", 3, 0, [](DoubleVec x) { return sigmoid(x); }, logistic);
  check_function<double>("tanh, double", 3, 0, [](DoubleVec x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  std::printf("vectors of %d bytes: %d failures\n", kVectorBytes, failures);
  return failures != 0;
}
