// The weights of a layer as the forward scan reads them: packed for one call, not packed for a few
// steps, or prepared once for many calls.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "layer.h"

namespace rnnattn {

template <typename F>
struct ForwardWeights {  // of one direction
  PackedMatrix<F> ih, hh;
  std::optional<PackedMatrix<F>> hr;
  Tensor bias;                // [blocks][vectors][lanes], or undefined
  Tensor bias_q;              // GRU: b_hn [H], or undefined
  Tensor scale_ih, scale_hh;  // int8: as bias, else undefined
  DirectionWeights given;     // undefined where prepared
};

template <typename F>
Packing<F> gate_packing(const void* w, Stored stored, int64_t K, Mode mode, int64_t H) {
  return {w, 1, K, K, H, weight_gates(mode), unit_vectors(mode), Panel::kFull, stored};
}

// A vector [G H] in the order of the panels' columns.
template <typename F>
Tensor packed_vector(const Tensor& v, Mode mode, int64_t H) {
  PackedMatrix<F> packed({v.const_data_ptr<F>(), 0, 1, 1, H, weight_gates(mode), unit_vectors(mode)});
  packed.allocate();
  packed.pack(0, 1);
  return packed.panels;
}

template <typename F>
std::vector<ForwardWeights<F>> forward_weights(at::TensorList weights, bool has_biases, int64_t K, Mode mode, int64_t H) {
  std::vector<ForwardWeights<F>> all;
  for (DirectionWeights& w : split_weights(weights, has_biases, K, c10::CppTypeToScalarType<F>::value, weights[0].scalar_type())) {
    const auto matrix = [&](const Tensor& m) {
      return PackedMatrix<F>(gate_packing<F>(m.const_data_ptr(), stored_as(m.scalar_type()), m.size(1), mode, H));
    };
    ForwardWeights<F> part{matrix(w.w_ih), matrix(w.w_hh), {}, {}, {}, {}, {}, w};
    if (w.w_hr.defined()) part.hr = packed_columns<F>(w.w_hr, true);
    if (has_biases) {
      const bool gru = mode == Mode::kGru;  // b_hn is not added to the input product, it stands inside r * q
      const Tensor bias = at::empty_like(w.b_ih);
      const F *b_ih = w.b_ih.template const_data_ptr<F>(), *b_hh = w.b_hh.template const_data_ptr<F>();
      const int64_t n = bias.numel(), added = gru ? 2 * H : n;
      F* sums = bias.template data_ptr<F>();  // in a loop: torch's operators take longer than a step
      for (int64_t i = 0; i < n; ++i) sums[i] = i < added ? b_ih[i] + b_hh[i] : b_ih[i];
      if (gru) part.bias_q = w.b_hh.narrow(0, 2 * H, H);
      part.bias = packed_vector<F>(bias, mode, H);
    }
    all.push_back(std::move(part));
  }
  return all;
}

constexpr int64_t kPrepared = 7;  // tensors of one direction

// Everything a call needs of one direction's weights, with empty tensors for what it has not.
template <typename F>
std::vector<Tensor> prepare(ForwardWeights<F> w, Panel panel, Mode mode, int64_t H) {
  const Tensor none = at::empty({0}, c10::CppTypeToScalarType<F>::value);
  std::vector<Tensor> scales;
  for (PackedMatrix<F>* matrix : {&w.ih, &w.hh}) {
    Tensor values = matrix == &w.ih ? w.given.w_ih : w.given.w_hh, scale = none;
    if (panel == Panel::kInt8) {  // to the nearest of 255 values between -max and max of the row
      values = values.to(none.scalar_type());
      const Tensor largest = values.abs().amax(1).clamp_min(1e-30) / 127;
      values = (values / largest.unsqueeze(1)).round().contiguous();
      scale = packed_vector<F>(largest, mode, H);
    }
    matrix->packing.w = values.const_data_ptr(), matrix->packing.stored = stored_as(values.scalar_type());
    matrix->packing.panel = panel;
    matrix->allocate();
    matrix->pack(0, 1);
    scales.push_back(scale);
  }
  if (w.hr) w.hr->allocate(), w.hr->pack(0, 1);
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t.clone() : none; };
  return {w.ih.panels, w.hh.panels, w.hr ? w.hr->panels : none, or_none(w.bias), or_none(w.bias_q), scales[0], scales[1]};
}

// The reverse: one direction of I inputs, H units and R outputs from the tensors of prepare().
template <typename F>
ForwardWeights<F> restore(at::TensorList prepared, Mode mode, int64_t I, int64_t H, int64_t R) {
  const auto or_undefined = [&](int64_t n) { return prepared[n].numel() ? prepared[n] : Tensor(); };
  const Panel panel = prepared[0].scalar_type() != at::kInt ? Panel::kFull : prepared[5].numel() ? Panel::kInt8 : Panel::kBFloat16;
  const auto matrix = [&](const Tensor& panels, Packing<F> packing) {
    if (panels.scalar_type() == at::kInt) packing.panel = panel;
    PackedMatrix<F> m(packing);
    TORCH_CHECK(panels.numel() == m.size(), "prepared: expected ", m.size(), " packed weights for sizes ", I, ", ", H, " and ", R,
                ", got ", panels.numel());
    m.panels = panels;
    return m;
  };
  ForwardWeights<F> w{matrix(prepared[0], gate_packing<F>(nullptr, Stored::kFull, I, mode, H)),
                      matrix(prepared[1], gate_packing<F>(nullptr, Stored::kFull, R, mode, H)),
                      {}, or_undefined(3), or_undefined(4), or_undefined(5), or_undefined(6), {}};
  if (prepared[2].numel()) w.hr = matrix(prepared[2], {nullptr, 1, H, H, R, 1, kernels<F>().wide_vectors});
  return w;
}

}  // namespace rnnattn
