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
#include "workspace.h"

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

// A storage can be freed under its tensor: torch's own operators notice, pointers would not.
inline void check_allocated(const char* name, const OptionalTensor& t) {
  TORCH_CHECK(!t || !t->defined() || t->numel() == 0 || t->storage().nbytes() > 0, name,
              ": expected a tensor with data, got one whose storage was freed");
}

struct DirectionWeights {  // contiguous; the matrices may be of another dtype than the rest
  Tensor w_ih, w_hh;       // [G H, I], [G H, R]
  Tensor b_ih, b_hh;       // [G H], or undefined
  Tensor w_hr;             // [R, H], or undefined
};

inline std::vector<DirectionWeights> split_weights(at::TensorList weights, bool has_biases, size_t directions, at::ScalarType dtype,
                                                   at::ScalarType matrices) {
  const size_t each = weights.size() / directions;
  std::vector<DirectionWeights> parts;
  for (size_t k = 0; k < directions; ++k) {
    const auto w = weights.slice(k * each, each);
    const auto as_type = [&](size_t n) { return w[n].to(n < 2 ? matrices : dtype).contiguous(); };
    DirectionWeights part{as_type(0), as_type(1), {}, {}, {}};
    if (has_biases) part.b_ih = as_type(2), part.b_hh = as_type(3);
    if (each == (has_biases ? 5 : 3)) part.w_hr = as_type(each - 1);
    parts.push_back(std::move(part));
  }
  return parts;
}

// What resets put in the place of other states: the initial ones, or zeros. Undefined without resets, or without such states.
inline Tensor reset_states(const OptionalTensor& resets, bool to_initial, const Tensor& initial) {
  return !resets || !initial.defined() ? Tensor() : to_initial ? initial : at::zeros_like(initial);
}

inline const bool* flags(const OptionalTensor& resets) { return resets ? resets->const_data_ptr<bool>() : nullptr; }

inline int64_t blocks_of(int64_t width, int64_t units, int64_t lanes) { return (width + units * lanes - 1) / (units * lanes); }

// A matrix and, where it is to be packed, the memory its panels go to.
template <typename F>
struct PackedMatrix {
  Packing<F> packing;
  Tensor panels;
  int64_t blocks;

  explicit PackedMatrix(const Packing<F>& p) : packing(p), blocks(blocks_of(p.width, p.units, kernels<F>().lanes)) {}

  // Elements of the panels: of F, or words of 32 bits.
  int64_t size() const {
    return blocks * packing.gates * packing.units * kernels<F>().lanes * panel_depth(packing.panel, packing.K);
  }

  void allocate() {
    panels = workspace({size()}, packing.panel == Panel::kFull ? c10::CppTypeToScalarType<F>::value : at::kInt);
  }

  const void* data() const { return panels.defined() ? panels.const_data_ptr() : nullptr; }

  void pack(int part, int parts) const {
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
      kernels<F>().pack_panel(packing, block, panels.data_ptr());
  }
};

// Whether products take bfloat16 as it is stored. A processor's float16 instructions do not help: AVX512-FP16 sums in
// float16, and sums are to be float.
inline bool multiplies_bfloat16(at::ScalarType dtype, bool projected) {
  return dtype == at::kBFloat16 && kernel_table().bfloat16 && !projected;
}

// Whether weights given in bfloat16 stay so where products take floats: what few rows wait for is memory, and half of it
// passes sooner; for many rows the bits would be shifted into floats again and again.
inline bool keeps_bfloat16(at::ScalarType dtype, double rows) { return dtype == at::kBFloat16 && rows <= 4; }

// Columns of w [K, width], or of its transpose, four vectors to a panel.
template <typename F>
PackedMatrix<F> packed_columns(const Tensor& w, bool transposed) {
  const int64_t K = w.size(transposed), width = w.size(!transposed), row = w.size(1);
  return PackedMatrix<F>({w.const_data_ptr(), transposed ? 1 : row, transposed ? row : 1, K, width, 1, kernels<F>().wide_vectors,
                          Panel::kFull, stored_as(w.scalar_type())});
}

// Memory of one thread: numbers and pointers.
struct ScratchSize {
  int64_t numbers, pointers;
};

// Packs the matrices, then calls scan(direction, group, member, members, barrier, numbers, pointers)
// once for each member of each direction's groups; scratch(members) tells the memory it wants.
template <typename F, typename Size, typename Scan>
void run_layer(const Plan& plan, int directions, const std::vector<const PackedMatrix<F>*>& to_pack, const Size& scratch,
               const Scan& scan) {
  const int scans = directions * plan.groups;
  const auto run = [&](int teams, int members) {
    const int threads = teams * members;
    const ScratchSize size = scratch(members);  // all memory comes first: nothing may throw in the region
    const Tensor numbers = workspace({threads * size.numbers}, c10::CppTypeToScalarType<F>::value);
    std::vector<const void*> pointers(threads * size.pointers);
    Barrier all(threads);
    std::vector<std::unique_ptr<Barrier>> barriers;
    for (int n = 0; n < scans; ++n) barriers.push_back(members > 1 ? std::make_unique<Barrier>(members) : nullptr);
    return run_team(threads, [&](int thread) {
      for (const auto* matrix : to_pack) matrix->pack(thread, threads);
      if (threads > 1 && !to_pack.empty()) all.wait(thread);
      for (int n = thread / members; n < scans; n += teams)
        scan(n / plan.groups, n % plan.groups, thread % members, members, barriers[n].get(),
             numbers.data_ptr<F>() + thread * size.numbers, pointers.data() + thread * size.pointers);
    });
  };
  if (!run(plan.teams, plan.members)) run(1, 1);
}

}  // namespace rnnattn
