// One LSTM layer on a CPU: a GEMM and the fused pointwise kernel per step, weight gradients as GEMMs
// after the scan. 16-bit tensors are computed in fp32: h is rounded to 16 bits at every step as the
// specification says, gates and cell states are not.
#include "../lstm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "isa.h"

namespace rnnattn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct LayerWeights {  // in the accumulation type
  Tensor w_ih, w_hh;   // [4H, I], [4H, R]
  Tensor bias;         // [4H], b_ih + b_hh, or undefined
  Tensor w_hr;         // [R, H], or undefined
};

std::vector<LayerWeights> split_weights(at::TensorList weights, bool has_biases, size_t directions, at::ScalarType acc) {
  const size_t each = weights.size() / directions;
  std::vector<LayerWeights> parts;
  for (size_t k = 0; k < directions; ++k) {
    const auto w = weights.slice(k * each, each);
    LayerWeights part{w[0].to(acc), w[1].to(acc), {}, {}};
    if (has_biases) part.bias = w[2].to(acc) + w[3].to(acc);
    if (each == (has_biases ? 5 : 3)) part.w_hr = w.back().to(acc);
    parts.push_back(std::move(part));
  }
  return parts;
}

std::vector<bool> scan_directions(std::string_view direction) {
  if (direction == "bidirectional") return {false, true};
  TORCH_CHECK(direction == "forward" || direction == "reverse",
              "direction: expected forward, reverse or bidirectional, got ", direction);
  return {direction == "reverse"};
}

// bool [T, B, 1], true where step t of row b lies inside the row's length; undefined without lengths.
Tensor valid_steps(const OptionalTensor& lengths, int64_t T) {
  if (!lengths) return {};
  return (at::arange(T, lengths->options()).unsqueeze(1) < lengths->unsqueeze(0)).unsqueeze(2);
}

const int64_t* lengths_data(const OptionalTensor& lengths) { return lengths ? lengths->const_data_ptr<int64_t>() : nullptr; }

// Runs kernel(b, begin, end) over all rows and units, in blocks of units that keep threads apart.
template <typename Kernel>
void for_rows_and_units(int64_t B, int64_t H, const Kernel& kernel) {
  constexpr int64_t kBlock = 64, kGrain = 32;
  const int64_t blocks = (H + kBlock - 1) / kBlock;
  at::parallel_for(0, B * blocks, kGrain, [&](int64_t item, int64_t last) {
    while (item < last) {
      const int64_t b = item / blocks, first = item % blocks;
      const int64_t count = std::min(blocks - first, last - item);
      kernel(b, first * kBlock, std::min(H, (first + count) * kBlock));
      item += count;
    }
  });
}

template <typename F>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& h0, const Tensor& c0, at::TensorList weights, const OptionalTensor& lengths,
    bool has_biases, std::string_view direction, bool save) {
  const auto reverses = scan_directions(direction);
  const auto acc = c10::CppTypeToScalarType<F>::value;
  const bool same = x.scalar_type() == acc;
  const int64_t T = x.size(0), B = x.size(1), K = h0.size(0), R = h0.size(2), H = c0.size(2);
  const Tensor y = at::empty({T, B, K * R}, x.options());
  const Tensor h_n = at::empty_like(h0, at::MemoryFormat::Contiguous), c_n = at::empty_like(c0, at::MemoryFormat::Contiguous);
  const Tensor gates = at::empty({save ? K : 1, T, B, 4 * H}, x.options().dtype(acc));
  const Tensor cells = save ? at::empty({K, T, B, H}, gates.options()) : Tensor();
  const Tensor valid = valid_steps(lengths, T), x2d = x.flatten(0, 1).to(acc);
  const auto parts = split_weights(weights, has_biases, K, acc);
  for (int64_t k = 0; k < K; ++k) {
    const LayerWeights& w = parts[k];
    const Tensor a = gates[save ? k : 0];
    Tensor a2d = a.view({T * B, 4 * H});
    if (w.bias.defined()) at::addmm_out(a2d, w.bias, x2d, w.w_ih.t());
    else at::mm_out(a2d, x2d, w.w_ih.t());
    const Tensor w_hh_t = w.w_hh.t();
    const bool direct = same && !valid.defined() && !w.w_hr.defined();  // h_t goes straight into y
    const Tensor h_raw = direct ? Tensor() : at::empty({B, H}, gates.options());
    Tensor h = h0[k].to(acc), c = save ? c0[k].to(acc).contiguous() : c0[k].to(acc, false, true, at::MemoryFormat::Contiguous);
    for (int64_t n = 0; n < T; ++n) {
      const int64_t t = reverses[k] ? T - 1 - n : n;
      const Tensor a_t = a[t], y_t = y[t].narrow(1, k * R, R), c_t = save ? cells[k][t] : c;
      a_t.addmm_(h, w_hh_t);
      const Tensor& h_out = direct ? y_t : h_raw;
      const LstmForwardStep<F> step{t, H, lengths_data(lengths), a_t.data_ptr<F>(), c.const_data_ptr<F>(),
                                    c_t.data_ptr<F>(), h_out.data_ptr<F>(), h_out.stride(0)};
      for_rows_and_units(B, H, [&](int64_t b, int64_t begin, int64_t end) { kernels<F>().lstm_forward(step, b, begin, end); });
      c = c_t;
      if (direct) {
        h = y_t;
        continue;
      }
      y_t.copy_(w.w_hr.defined() ? at::mm(h_raw.to(x.scalar_type()).to(acc), w.w_hr.t()) : h_raw);
      const Tensor h_t = y_t.to(acc);
      h = valid.defined() ? at::where(valid[t], h_t, h) : same ? y_t : h_t;
    }
    h_n[k].copy_(h);
    c_n[k].copy_(c);
  }
  const Tensor saved = save ? gates.to(x.scalar_type()) : at::empty({0}, x.options());
  return {y, h_n, c_n, saved, save ? cells : at::empty({0}, gates.options())};
}

// The h that each step started from, [T, B, R]. A reverse scan starts at a row's last valid step from
// h0, not from the zero that stands in y behind it.
Tensor previous_states(const Tensor& y, const Tensor& h0, const OptionalTensor& lengths, bool reverse) {
  const int64_t T = y.size(0);
  if (!reverse) return at::cat({h0.unsqueeze(0), y.narrow(0, 0, T - 1)});
  const Tensor later = at::cat({y.narrow(0, 1, T - 1), h0.unsqueeze(0)});
  if (!lengths) return later;
  const Tensor starts = (at::arange(1, T + 1, lengths->options()).unsqueeze(1) >= lengths->unsqueeze(0)).unsqueeze(2);
  return at::where(starts, h0.unsqueeze(0), later);
}

template <typename F>
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x, const Tensor& h0,
    const Tensor& c0, at::TensorList weights, const OptionalTensor& lengths, const Tensor& y, const Tensor& gates,
    const Tensor& cells, bool has_biases, std::string_view direction, bool needs_dx, bool needs_dweights) {
  const auto reverses = scan_directions(direction);
  const auto acc = c10::CppTypeToScalarType<F>::value;
  const auto dtype = x.scalar_type();
  const int64_t T = x.size(0), B = x.size(1), K = h0.size(0), R = h0.size(2), H = c0.size(2);
  const auto options = x.options().dtype(acc);
  const auto parts = split_weights(weights, has_biases, K, acc);
  const Tensor valid = valid_steps(lengths, T);
  Tensor dx, x2d;
  if (needs_dweights) {
    const Tensor x_acc = x.to(acc);
    x2d = (valid.defined() ? at::where(valid, x_acc, 0) : x_acc).flatten(0, 1);
  }
  const Tensor dh0 = at::empty_like(h0, at::MemoryFormat::Contiguous), dc0 = at::empty_like(c0, at::MemoryFormat::Contiguous);
  std::vector<Tensor> dweights;
  for (int64_t k = 0; k < K; ++k) {
    const LayerWeights& w = parts[k];
    const bool projected = w.w_hr.defined();
    const Tensor gates_k = gates[k].to(acc), d_gates = at::empty({T, B, 4 * H}, options);
    const Tensor dy_k = dy ? dy->narrow(2, k * R, R).to(acc) : Tensor();
    const Tensor dh_out = projected ? at::empty({T, B, R}, options) : Tensor();
    Tensor dh = dh_n ? (*dh_n)[k].to(acc, false, true, at::MemoryFormat::Contiguous) : at::zeros({B, R}, options);
    const Tensor dc = dc_n ? (*dc_n)[k].to(acc, false, true, at::MemoryFormat::Contiguous) : at::zeros({B, H}, options);
    const Tensor c_first = c0[k].to(acc).contiguous();
    for (int64_t n = T - 1; n >= 0; --n) {
      const int64_t t = reverses[k] ? T - 1 - n : n;
      const Tensor c_prev = n == 0 ? c_first : cells[k][reverses[k] ? t + 1 : t - 1];
      // The kernel adds dy itself, unless a projection stands between.
      Tensor dy_t = dy_k.defined() ? dy_k[t] : Tensor(), dh_raw = dh;
      if (dy_t.defined() && dy_t.stride(1) != 1) dy_t = dy_t.contiguous();
      if (projected) {
        const Tensor whole = dy_t.defined() ? dh + dy_t : dh;
        dh_out[t].copy_(valid.defined() ? at::where(valid[t], whole, 0) : whole);
        dh_raw = at::mm(whole, w.w_hr);
        dy_t = Tensor();
      }
      const Tensor d_t = d_gates[t], gates_t = gates_k[t], c_t = cells[k][t];
      const LstmBackwardStep<F> step{
          t, H, lengths_data(lengths), dh_raw.const_data_ptr<F>(), dy_t.defined() ? dy_t.const_data_ptr<F>() : nullptr,
          dy_t.defined() ? dy_t.stride(0) : 0, dc.data_ptr<F>(), gates_t.const_data_ptr<F>(), c_t.const_data_ptr<F>(),
          c_prev.const_data_ptr<F>(), d_t.data_ptr<F>()};
      for_rows_and_units(B, H, [&](int64_t b, int64_t begin, int64_t end) { kernels<F>().lstm_backward(step, b, begin, end); });
      if (valid.defined()) dh = at::where(valid[t], at::mm(d_t, w.w_hh), dh);
      else at::mm_out(dh, d_t, w.w_hh);
    }
    dh0[k].copy_(dh);
    dc0[k].copy_(dc);
    const Tensor d2d = d_gates.view({T * B, 4 * H});
    if (needs_dx) {
      if (dx.defined()) dx.addmm_(d2d, w.w_ih);
      else dx = at::mm(d2d, w.w_ih);
    }
    if (!needs_dweights) continue;
    const Tensor y_k = y.narrow(2, k * R, R), d_t = d2d.t();
    dweights.push_back(at::mm(d_t, x2d).to(dtype));
    dweights.push_back(at::mm(d_t, previous_states(y_k, h0[k], lengths, reverses[k]).to(acc).reshape({T * B, R})).to(dtype));
    if (has_biases) dweights.push_back(d2d.sum(0).to(dtype));
    if (projected) {
      const Tensor h_raw = (gates_k.narrow(2, 3 * H, H) * cells[k].tanh()).to(dtype).to(acc);
      dweights.push_back(at::mm(dh_out.view({T * B, R}).t(), h_raw.view({T * B, H})).to(dtype));
    }
  }
  return {needs_dx ? dx.view({T, B, x.size(2)}).to(dtype) : at::empty({0}, x.options()), dh0, dc0, dweights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_forward(
    const Tensor& x, const Tensor& h0, const Tensor& c0, at::TensorList weights, const OptionalTensor& lengths,
    bool has_biases, std::string_view direction, bool save) {
  return dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    return forward<decltype(zero)>(x, h0, c0, weights, lengths, has_biases, direction, save);
  });
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_layer_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x, const Tensor& h0,
    const Tensor& c0, at::TensorList weights, const OptionalTensor& lengths, const Tensor& y, const Tensor& gates,
    const Tensor& cells, bool has_biases, std::string_view direction, bool needs_dx, bool needs_dweights) {
  return dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    return backward<decltype(zero)>(dy, dh_n, dc_n, x, h0, c0, weights, lengths, y, gates, cells, has_biases, direction,
                                    needs_dx, needs_dweights);
  });
}

TORCH_LIBRARY_IMPL(rnnattn_native, CPU, m) {
  m.impl("lstm_layer_forward", &lstm_layer_forward);
  m.impl("lstm_layer_backward", &lstm_layer_backward);
}

}  // namespace
}  // namespace rnnattn
