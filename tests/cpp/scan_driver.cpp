// Runs the scans of csrc/cpu on std::threads, without torch and without OpenMP, in every mode and split
// into groups and members, and compares them with the equations in double. Built with
// -fsanitize=thread it shows a race (OpenMP's runtime is not instrumented); built for another
// architecture it shows the kernels right there.
#include <cstdio>
#include <string>

#include "../../csrc/cpu/plan.h"
#include "equations.h"

namespace {

using namespace rnnattn;
using namespace rnnattn::test;

int failures = 0;

void expect(bool good, const std::string& what) {
  if (!good) ++failures, std::printf("FAILED %s\n", what.c_str());
}

const char* name(Mode mode) {
  const char* names[] = {"LSTM", "GRU", "RNN_TANH", "RNN_RELU"};
  return names[static_cast<int>(mode)];
}

std::string describe(const Shape& s, const char* type) {
  char text[320];
  const char* stored[] = {type, "bf16", "fp16"};
  std::snprintf(text, sizeof text, "%s %s T%ld B%ld I%ld H%ld R%ld%s%s%s%s%s%s%s, %d groups of %d, chunk %ld", name(s.mode),
                stored[static_cast<int>(s.stored)], long(s.T), long(s.B), long(s.I), long(s.H), long(s.R), s.biased ? "" : " no bias",
                s.ragged ? " ragged" : "", s.reverse ? " reverse" : "", s.packed ? "" : " unpacked", s.panel == Panel::kFull ? "" : s.panel == Panel::kInt8 ? " int8" : " bf16 weights", s.resets ? " resets" : "",
                s.to_initial ? " to initial states" : "", s.groups, s.members, long(s.chunk));
  return text;
}

// Relative L2 error at most `allowed`, and NaN exactly where the truth has it: nothing is left out,
// nothing written that is not the scan's.
template <typename Got>
void close(const Got& got, const std::vector<double>& want, double allowed, const std::string& what) {
  double difference = 0, size = 0;
  int64_t misplaced = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double g = got[i], w = want[i];
    if (std::isnan(g) != std::isnan(w)) ++misplaced;
    else if (!std::isnan(w)) difference += (g - w) * (g - w), size += w * w;
  }
  const double error = std::sqrt(difference) / std::max(std::sqrt(size), 1e-30);
  if (misplaced || !(error <= allowed))
    expect(false, what + ": relative error " + std::to_string(error / allowed) + " of what is allowed, " +
                      std::to_string(misplaced) + " elements not written, or written beyond");
}

template <typename F>
std::vector<double> sum_of_rows(const std::vector<F>& matrix, int64_t rows) {
  std::vector<double> sum(rows ? matrix.size() / rows : 0);
  for (size_t i = 0; i < matrix.size(); ++i) sum[i % sum.size()] += matrix[i];
  return sum;
}

template <typename F>
void check(const Shape& s, const char* type) {
  const std::string what = describe(s, type);
  Layer<F> layer(s, 1), again(s, 1);
  const double full = 8 * std::numeric_limits<F>::epsilon();
  const double forward = s.stored == Stored::kFull ? full : std::ldexp(1.0, 1 - format_of(s.stored).digits);
  layer.forward();
  const Forward y = forward_equations(layer);
  close(layer.y, y.y, forward, what + ", y");
  if (s.columns() > 1) close(layer.gates, y.gates, forward, what + ", gates");
  if (s.mode == Mode::kLstm) close(layer.cells, y.cells, forward, what + ", cells"), close(layer.c_n, y.c_n, forward, what + ", c_n");
  layer.backward();
  const Backward d = backward_equations(layer);
  const double backward = s.narrow() ? forward : full;
  close(layer.d_gates, d.d_gates, backward, what + ", d_gates");
  close(sum_of_rows(layer.d_bias, layer.s.groups), sum_of_rows(d.d_gates, layer.slots), backward * (1 + layer.slots), what + ", d_bias");
  close(layer.dh, d.dh, backward, what + ", dh"), close(layer.dh_reset, d.dh_reset, backward, what + ", dh_reset");
  if (s.mode == Mode::kLstm) close(layer.dc, d.dc, backward, what + ", dc"), close(layer.dc_reset, d.dc_reset, backward, what + ", dc_reset");
  if (s.projected()) close(layer.dh_out, d.dh_out, full, what + ", dh_out");

  again.forward(), again.backward();
  const auto same = [](const auto& a, const auto& b) {
    bool all = a.size() == b.size();
    for (size_t i = 0; i < size_t(a.size()); ++i) all &= a[i] == b[i] || (a[i] != a[i] && b[i] != b[i]);
    return all;
  };
  expect(same(layer.d_gates, again.d_gates) && same(layer.dh, again.dh), what + ": two runs differ");
}

// Every split of the threads is one that the layer can run.
void check_plans() {
  for (int threads : {1, 2, 3, 8, 64})
    for (int64_t B : {0, 1, 5, 1000})
      for (int64_t H : {1, 37, 256, 2048})
        for (int directions : {1, 2})
          for (int kind = 0; kind < 4; ++kind) {
            const bool backward = kind % 2, tiles = kind / 2;
            const Plan plan = plan_layer({.mode = Mode::kLstm, .T = 10, .B = B, .I = H, .H = H, .R = H, .directions = directions, .mean_rows = double(B),
                                          .element = tiles ? 2 : 4, .lanes = kernels<float>().lanes, .backward = backward, .tiles = tiles}, threads);
            const bool good = plan.members >= 1 && plan.groups >= 1 && plan.teams >= 1 && plan.teams * plan.members <= threads &&
                              plan.teams <= plan.groups * directions && plan.groups <= std::max<int64_t>(1, B) &&
                              plan.members <= (H + kernels<float>().lanes - 1) / kernels<float>().lanes;
            expect(good, "plan for " + std::to_string(threads) + " threads, B " + std::to_string(B) + ", H " + std::to_string(H));
          }
}

// Products in bfloat16: rows fewer than a matrix unit's tile has, as many, and more, some of them apart in memory (ragged,
// or odd sizes), and shares of units of several threads. The rest of a case is dealt out by its number, as below.
void check_bfloat16() {
  int n = 0;
  for (int64_t B : {1, 3, 5, 16, 17, 40, 50})
    for (int64_t H : {1, 37, 64})
      for (int64_t chunk : {1, 3}) {
        const Mode modes[] = {Mode::kLstm, Mode::kGru, Mode::kTanh};
        const int64_t inputs[] = {0, 9, 32, 33}, I = inputs[++n / 2 % 4];
        check<float>({modes[(n + n / 6) % 3], Stored::kBFloat16, 3, B, I, H, H, n % 4 != 0, n % 3 == 0, n % 5 == 0, n % 7 != 0,
                      1 + n / 3 % 2, 1 + n / 5 % 2, chunk, Panel::kBFloat16, n / 2 % 3 != 0, n / 2 % 3 == 2}, "");
      }
}

}  // namespace

int main() {
  if (kernel_table().bfloat16) {
    check_bfloat16();
    std::printf("%s: %d failures\n", kernel_table().isa, failures);
    return failures != 0;
  }
  check_plans();
  const int splits[][2] = {{1, 1}, {1, 2}, {2, 1}, {2, 2}, {1, 3}, {3, 1}};  // groups, members
  int n = 0;
  for (Mode mode : {Mode::kLstm, Mode::kGru, Mode::kTanh, Mode::kRelu})
    for (const auto [groups, members] : splits)
      for (int64_t H : {1, 37, 70})
        for (int kind = 0; kind < (H == 70 ? 2 : 4); ++kind, ++n) {
          // What a case has is dealt out by its number: all pairs of choices, not all choices.
          Shape s{mode, Stored::kFull, 7, kind == 1 ? 11 : 3, 6, H, H, n % 3 != 0, kind != 0, n % 2 == 0, n % 5 != 0, groups, members, 1 + n % 4};
          if (mode == Mode::kLstm && n % 2 && H > 1) s.R = H / 2;
          s.resets = n / 2 % 3 != 0, s.to_initial = n / 2 % 3 == 2;
          check<float>(s, "fp32");
          if (n % 4 < 2) check<double>(s, "fp64");
          if (n % 4 < 2 || mode == Mode::kRelu) continue;  // rounding moves a sum across the kink
          s.stored = n % 2 ? Stored::kBFloat16 : Stored::kHalf;
          check<float>(s, "");
          if (!s.packed) continue;
          s.panel = n % 2 ? Panel::kInt8 : Panel::kBFloat16;
          check<float>(s, "");
        }
  for (Mode mode : {Mode::kLstm, Mode::kGru, Mode::kTanh, Mode::kRelu}) {  // one row, as streaming has it; no row; no input
    check<float>({mode, Stored::kFull, 64, 1, 5, 256, 256, true, false, false, true, 1, 4, 8}, "fp32");
    check<float>({mode, Stored::kFull, 1, 1, 5, 64, 64, true, false, false, false, 1, 2, 1}, "fp32");
    check<float>({mode, Stored::kFull, 3, 0, 5, 40, 40, true, true, false, true, 2, 2, 2}, "fp32");
    check<float>({mode, Stored::kFull, 3, 4, 0, 20, 20, true, true, false, true, 2, 1, 2}, "fp32");
    check<double>({mode, Stored::kFull, 2, 40, 600, 20, 20, true, true, false, true, 1, 1, 2}, "fp64");  // I beyond one part of a panel
  }
  std::printf("%s: %d failures\n", kernel_table().isa, failures);
  return failures != 0;
}
