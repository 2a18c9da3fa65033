// One LSTM layer on a CPU: the input product as one GEMM, then per step a GEMM and the fused pointwise
// kernel, each thread scanning its own rows or direction; weight gradients as GEMMs after the scan. 16-bit tensors are computed in fp32: h is rounded to 16 bits at every step as the
// specification says, gates and cell states are not.
#include "../lstm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "../optional_tensor.h"
#include "isa.h"

namespace rnnattn {
namespace {

using at::Tensor;

struct LayerWeights {  // in the accumulation type
  Tensor w_ih, w_hh;   // [4H, I], [4H, R]
  Tensor w_hh_t;       // [R, 4H] contiguous: products with it are quicker than with a transposed view
  Tensor bias;         // [4H], b_ih + b_hh, or undefined
  Tensor w_hr;         // [R, H], or undefined
};

std::vector<LayerWeights> split_weights(at::TensorList weights, bool has_biases, size_t directions, at::ScalarType acc) {
  const size_t each = weights.size() / directions;
  std::vector<LayerWeights> parts;
  for (size_t k = 0; k < directions; ++k) {
    const auto w = weights.slice(k * each, each);
    LayerWeights part{w[0].to(acc), w[1].to(acc).contiguous(), {}, {}, {}};
    part.w_hh_t = part.w_hh.t().contiguous();
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

// The lengths of the rows from b on, or null.
const int64_t* lengths_data(const OptionalTensor& lengths, int64_t b) {
  return lengths ? lengths->const_data_ptr<int64_t>() + b : nullptr;
}

// The steps after which all of the rows [b, b + n) have ended.
int64_t longest(const OptionalTensor& lengths, int64_t b, int64_t n, int64_t T) {
  if (!lengths) return T;
  const int64_t* first = lengths_data(lengths, b);
  return std::clamp<int64_t>(*std::max_element(first, first + n), 0, T);
}

// One task: the rows [b, b + n) of direction k.
struct Task {
  int64_t k, b, n;
};

constexpr int64_t kCached = 1 << 20;  // bytes of W_hh that stay in a thread's cache

// Calls run(task) over all directions and slices of rows, on as many threads as there are tasks: a
// task runs its whole scan alone, so threads meet once a layer instead of once a step. Slices are not
// cut so thin that every thread reads all of a large W_hh for a row or two: then the rows stay
// together, and it is the GEMM that uses the threads.
template <typename Run>
void for_tasks(int64_t K, int64_t B, int64_t weight_bytes, const Run& run) {
  constexpr int64_t kRows = 4;
  const int64_t slices = (at::get_num_threads() + K - 1) / K;
  const int64_t thinnest = weight_bytes <= kCached ? 1 : kRows;
  const int64_t rows = std::max((B + slices - 1) / slices, thinnest);
  std::vector<Task> tasks;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t b = 0; b < B; b += rows) tasks.push_back({k, b, std::min(rows, B - b)});
  at::parallel_for(0, tasks.size(), 1, [&](int64_t task, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (; task < last; ++task) run(tasks[task]);
  });
}

// Whether our own product is quicker than a GEMM call: few rows, and a matrix that stays in cache.
template <typename F>
bool few_rows(int64_t n, const Tensor& matrix) {
  return n <= 4 && matrix.numel() * static_cast<int64_t>(sizeof(F)) <= kCached;
}

// The forward scan of a task without a tensor operation per step: h_t goes straight into y.
template <typename F>
void scan_few_rows(const Task& task, bool reverse, const Tensor& w_hh_t, const Tensor& h0, const Tensor& c0,
                   const Tensor& gates, const Tensor& cells, const Tensor& y, const Tensor& h_n, const Tensor& c_n) {
  const auto [k, b, n] = task;
  const int64_t T = y.size(0), B = y.size(1), R = h0.size(1), H = c0.size(1), y_stride = y.size(2);
  const Tensor h_first = h0.contiguous(), c_buffer = c0.clone(at::MemoryFormat::Contiguous);
  const F *h = h_first.const_data_ptr<F>(), *c = c_buffer.const_data_ptr<F>();
  int64_t h_stride = R;
  for (int64_t step = 0; step < T; ++step) {
    const int64_t t = reverse ? T - 1 - step : step;
    F* a_t = gates.data_ptr<F>() + (t * B + b) * 4 * H;
    F* y_t = y.data_ptr<F>() + (t * B + b) * y_stride + k * R;
    F* c_t = cells.defined() ? cells.data_ptr<F>() + ((k * T + t) * B + b) * H : c_buffer.data_ptr<F>();
    kernels<F>().rows_product({n, R, 4 * H, h, h_stride, w_hh_t.const_data_ptr<F>(), a_t, 4 * H, true});
    const LstmForwardStep<F> forward_step{t, H, nullptr, a_t, c, c_t, y_t, y_stride};
    for (int64_t row = 0; row < n; ++row) kernels<F>().lstm_forward(forward_step, row);
    h = y_t, h_stride = y_stride, c = c_t;
  }
  h_n.copy_(y[reverse ? 0 : T - 1].narrow(0, b, n).narrow(1, k * R, R));
  std::copy_n(c, n * H, c_n.data_ptr<F>());
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
  const Tensor gates = at::empty({K, T, B, 4 * H}, x.options().dtype(acc));
  const Tensor cells = save ? at::empty({K, T, B, H}, gates.options()) : Tensor();
  const Tensor valid = valid_steps(lengths, T), x2d = x.flatten(0, 1).to(acc);
  const auto parts = split_weights(weights, has_biases, K, acc);
  for (int64_t k = 0; k < K; ++k) {
    Tensor a = gates[k].view({T * B, 4 * H});
    if (parts[k].bias.defined()) at::addmm_out(a, parts[k].bias, x2d, parts[k].w_ih.t());
    else at::mm_out(a, x2d, parts[k].w_ih.t());
  }
  for_tasks(K, B, 4 * H * R * sizeof(F), [&](const Task& task) {
    const auto [k, b, n] = task;
    const LayerWeights& w = parts[k];
    const auto rows = [&, b = b, n = n](const Tensor& t) { return t.narrow(0, b, n); };
    const bool direct = same && !valid.defined() && !w.w_hr.defined();  // h_t goes straight into y
    if (direct && few_rows<F>(n, w.w_hh_t)) {
      scan_few_rows<F>(task, reverses[k], w.w_hh_t, rows(h0[k]), rows(c0[k]), gates[k], cells, y, rows(h_n[k]), rows(c_n[k]));
      return;
    }
    const Tensor h_raw = direct ? Tensor() : at::empty({n, H}, gates.options());
    Tensor h = rows(h0[k]).to(acc), c = rows(c0[k]).to(acc, false, true, at::MemoryFormat::Contiguous);
    const int64_t end = longest(lengths, b, n, T);
    for (int64_t step = 0; step < end; ++step) {
      const int64_t t = reverses[k] ? end - 1 - step : step;
      const Tensor a_t = rows(gates[k][t]), y_t = rows(y[t]).narrow(1, k * R, R), c_t = save ? rows(cells[k][t]) : c;
      a_t.addmm_(h, w.w_hh_t);
      const Tensor& h_out = direct ? y_t : h_raw;
      const LstmForwardStep<F> forward_step{t, H, lengths_data(lengths, b), a_t.data_ptr<F>(), c.const_data_ptr<F>(),
                                            c_t.data_ptr<F>(), h_out.data_ptr<F>(), h_out.stride(0)};
      for (int64_t row = 0; row < n; ++row) kernels<F>().lstm_forward(forward_step, row);
      c = c_t;
      if (direct) {
        h = y_t;
        continue;
      }
      y_t.copy_(w.w_hr.defined() ? at::mm(h_raw.to(x.scalar_type()).to(acc), w.w_hr.t()) : h_raw);
      const Tensor h_t = y_t.to(acc);
      h = valid.defined() ? at::where(rows(valid[t]), h_t, h) : h_t;
    }
    rows(h_n[k]).copy_(h);
    rows(c_n[k]).copy_(c);
    if (end == T) return;
    // Where all rows have ended: what the specification says of invalid steps.
    const auto ended = [&, b = b, n = n](const Tensor& t) { return t.narrow(0, end, T - end).narrow(1, b, n); };
    ended(y).narrow(2, k * R, R).zero_();
    if (!save) return;
    ended(gates[k]).zero_();
    ended(cells[k]).copy_(reverses[k] ? rows(c0[k]) : c);
  });
  const Tensor none = at::empty({0}, x.options());
  return {y, h_n, c_n, save ? gates.to(x.scalar_type()) : none, save ? cells : at::empty({0}, gates.options())};
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
  const Tensor dh0 = at::empty_like(h0, at::MemoryFormat::Contiguous), dc0 = at::empty_like(c0, at::MemoryFormat::Contiguous);
  const Tensor d_gates = at::empty({K, T, B, 4 * H}, options), gates_acc = gates.to(acc);
  const Tensor dh_out = parts[0].w_hr.defined() ? at::empty({K, T, B, R}, options) : Tensor();  // gradient of h_t
  const Tensor dy_acc = dy ? dy->to(acc) : Tensor();
  for_tasks(K, B, 4 * H * R * sizeof(F), [&](const Task& task) {
    const auto [k, b, n] = task;
    const LayerWeights& w = parts[k];
    const auto rows = [&, b = b, n = n](const Tensor& t) { return t.narrow(0, b, n); };
    const auto copy = [&](const Tensor& t) { return rows(t).to(acc, false, true, at::MemoryFormat::Contiguous); };
    Tensor dh = dh_n ? copy((*dh_n)[k]) : at::zeros({n, R}, options);
    const Tensor dc = dc_n ? copy((*dc_n)[k]) : at::zeros({n, H}, options), c_first = copy(c0[k]);
    const int64_t end = longest(lengths, b, n, T);
    d_gates[k].narrow(0, end, T - end).narrow(1, b, n).zero_();
    if (w.w_hr.defined()) dh_out[k].narrow(0, end, T - end).narrow(1, b, n).zero_();
    const F* w_hh = w.w_hh.const_data_ptr<F>();
    for (int64_t step = end - 1; step >= 0; --step) {
      const int64_t t = reverses[k] ? end - 1 - step : step;
      const Tensor c_prev = step == 0 ? c_first : rows(cells[k][reverses[k] ? t + 1 : t - 1]);
      // The kernel adds dy itself, unless a projection stands between.
      Tensor dy_t = dy ? rows(dy_acc[t]).narrow(1, k * R, R) : Tensor(), dh_raw = dh;
      if (dy && dy_t.stride(1) != 1) dy_t = dy_t.contiguous();
      if (w.w_hr.defined()) {
        const Tensor whole = dy ? dh + dy_t : dh;
        rows(dh_out[k][t]).copy_(valid.defined() ? at::where(rows(valid[t]), whole, 0) : whole);
        dh_raw = at::mm(whole, w.w_hr);
        dy_t = Tensor();
      }
      const Tensor d_t = rows(d_gates[k][t]), gates_t = rows(gates_acc[k][t]), c_t = rows(cells[k][t]);
      const LstmBackwardStep<F> backward_step{
          t, H, lengths_data(lengths, b), dh_raw.const_data_ptr<F>(), dy_t.defined() ? dy_t.const_data_ptr<F>() : nullptr,
          dy_t.defined() ? dy_t.stride(0) : 0, dc.data_ptr<F>(), gates_t.const_data_ptr<F>(), c_t.const_data_ptr<F>(),
          c_prev.const_data_ptr<F>(), d_t.data_ptr<F>()};
      for (int64_t row = 0; row < n; ++row) kernels<F>().lstm_backward(backward_step, row);
      if (valid.defined()) dh = at::where(rows(valid[t]), at::mm(d_t, w.w_hh), dh);
      else if (few_rows<F>(n, w.w_hh)) kernels<F>().rows_product({n, 4 * H, R, d_t.const_data_ptr<F>(), 4 * H, w_hh, dh.data_ptr<F>(), R, false});
      else at::mm_out(dh, d_t, w.w_hh);
    }
    rows(dh0[k]).copy_(dh);
    rows(dc0[k]).copy_(dc);
  });

  Tensor dx, x2d;
  if (needs_dweights) {
    const Tensor x_acc = x.to(acc);
    x2d = (valid.defined() ? at::where(valid, x_acc, 0) : x_acc).flatten(0, 1);
  }
  std::vector<Tensor> dweights;
  for (int64_t k = 0; k < K; ++k) {
    const Tensor d2d = d_gates[k].view({T * B, 4 * H});
    if (needs_dx) {
      if (k > 0) dx.addmm_(d2d, parts[k].w_ih);
      else dx = at::mm(d2d, parts[k].w_ih);
    }
    if (!needs_dweights) continue;
    const Tensor h_prev = previous_states(y.narrow(2, k * R, R), h0[k], lengths, reverses[k]).to(acc);
    dweights.push_back(at::mm(d2d.t(), x2d).to(dtype));
    dweights.push_back(at::mm(d2d.t(), h_prev.flatten(0, 1)).to(dtype));
    if (has_biases) dweights.push_back(d2d.sum(0).to(dtype));
    if (parts[k].w_hr.defined()) {
      const Tensor h_raw = (gates_acc[k].narrow(2, 3 * H, H) * cells[k].tanh()).to(dtype).to(acc);
      dweights.push_back(at::mm(dh_out[k].flatten(0, 1).t(), h_raw.flatten(0, 1)).to(dtype));
    }
  }
  return {needs_dx ? dx.view({T, B, x.size(2)}).to(dtype) : at::empty({0}, x.options()), dh0, dc0, dweights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_forward(
    const Tensor& x, const Tensor& h0, const Tensor& c0, at::TensorList weights, const OptionalTensor& lengths,
    bool has_biases, std::string_view direction, bool save) {
  return dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    return forward<decltype(zero)>(x, h0, c0, weights, contiguous(lengths), has_biases, direction, save);
  });
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_layer_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x, const Tensor& h0,
    const Tensor& c0, at::TensorList weights, const OptionalTensor& lengths, const Tensor& y, const Tensor& gates,
    const Tensor& cells, bool has_biases, std::string_view direction, bool needs_dx, bool needs_dweights) {
  return dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    return backward<decltype(zero)>(dy, dh_n, dc_n, x, h0, c0, weights, contiguous(lengths), y, gates, cells, has_biases,
                                    direction, needs_dx, needs_dweights);
  });
}

TORCH_LIBRARY_IMPL(rnnattn_native, CPU, m) {
  m.impl("lstm_layer_forward", &lstm_layer_forward);
  m.impl("lstm_layer_backward", &lstm_layer_backward);
}

}  // namespace
}  // namespace rnnattn
