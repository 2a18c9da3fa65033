// What the forward and the backward of a recurrent layer on a CPU share: its weights by direction,
// their packing, and the threads that scan its groups of rows.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <string_view>
#include <vector>

#include "../optional_tensor.h"
#include "barrier.h"
#include "isa.h"
#include "plan.h"
#include "team.h"

namespace rnnattn {

using at::Tensor;

inline Mode parse_mode(std::string_view mode) {
  if (mode == "LSTM") return Mode::kLstm;
  if (mode == "GRU") return Mode::kGru;
  if (mode == "RNN_TANH") return Mode::kTanh;
  TORCH_CHECK(mode == "RNN_RELU", "mode: expected LSTM, GRU, RNN_TANH or RNN_RELU, got ", mode);
  return Mode::kRelu;
}

// Whether each scan of the layer runs backwards in time.
inline std::vector<bool> parse_direction(std::string_view direction) {
  if (direction == "bidirectional") return {false, true};
  TORCH_CHECK(direction == "forward" || direction == "reverse",
              "direction: expected forward, reverse or bidirectional, got ", direction);
  return {direction == "reverse"};
}

inline Stored stored_as(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? Stored::kBFloat16 : dtype == at::kHalf ? Stored::kHalf : Stored::kFull;
}

struct DirectionWeights {  // in the accumulation type, contiguous
  Tensor w_ih, w_hh;       // [G H, I], [G H, R]
  Tensor b_ih, b_hh;       // [G H], or undefined
  Tensor w_hr;             // [R, H], or undefined
};

inline std::vector<DirectionWeights> split_weights(at::TensorList weights, bool has_biases, size_t directions, at::ScalarType acc) {
  const size_t each = weights.size() / directions;
  std::vector<DirectionWeights> parts;
  for (size_t k = 0; k < directions; ++k) {
    const auto w = weights.slice(k * each, each);
    const auto full = [&](size_t n) { return w[n].to(acc).contiguous(); };
    DirectionWeights part{full(0), full(1), {}, {}, {}};
    if (has_biases) part.b_ih = full(2), part.b_hh = full(3);
    if (each == (has_biases ? 5 : 3)) part.w_hr = full(each - 1);
    parts.push_back(std::move(part));
  }
  return parts;
}

inline int64_t blocks_of(int64_t width, int64_t units, int64_t lanes) { return (width + units * lanes - 1) / (units * lanes); }

// A matrix and, where it is to be packed, the memory its panels go to.
template <typename F>
struct PackedMatrix {
  Packing<F> packing;
  Tensor panels;
  int64_t blocks, block_size;

  PackedMatrix(const Packing<F>& p, const at::TensorOptions& options, bool pack = true) : packing(p) {
    const int64_t lanes = kernels<F>().lanes;
    blocks = blocks_of(p.width, p.units, lanes);
    block_size = p.K * p.gates * p.units * lanes;
    if (pack) panels = at::empty({blocks * block_size}, options);
  }

  const F* data() const { return panels.defined() ? panels.const_data_ptr<F>() : nullptr; }

  void pack(int part, int parts) const {
    if (!panels.defined()) return;
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
      kernels<F>().pack_panel(packing, block, panels.data_ptr<F>() + block * block_size);
  }
};

// Columns of w [K, width], or of its transpose, four vectors to a panel.
template <typename F>
PackedMatrix<F> packed_columns(const Tensor& w, bool transposed) {
  const int64_t K = w.size(transposed), width = w.size(!transposed), row = w.size(1);
  return {{w.const_data_ptr<F>(), transposed ? 1 : row, transposed ? row : 1, K, width, 1, kernels<F>().wide_vectors}, w.options()};
}

// Packs the matrices and runs scan(index of direction, group, member's threads ...) for all directions and groups.
// scan(k, group, member, thread, barrier) is called once for each member of each group.
template <typename F, typename Scan>
void run_layer(const Plan& plan, int directions, const std::vector<PackedMatrix<F>>& matrices, const Scan& scan) {
  const int scans = directions * plan.groups;
  const auto run = [&](int teams, int members) {
    const int threads = teams * members;
    Barrier all(threads);
    std::vector<std::unique_ptr<Barrier>> barriers;
    for (int n = 0; n < scans; ++n) barriers.push_back(members > 1 ? std::make_unique<Barrier>(members) : nullptr);
    return run_team(threads, [&](int thread) {
      for (const auto& matrix : matrices) matrix.pack(thread, threads);
      if (threads > 1) all.wait(thread);
      for (int n = thread / members; n < scans; n += teams)
        scan(n / plan.groups, n % plan.groups, thread % members, members, thread, barriers[n].get());
    });
  };
  if (!run(plan.teams, plan.members)) run(1, 1);
}

}  // namespace rnnattn
