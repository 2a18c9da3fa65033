#include "layer_function.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>

#include "plain.h"
#include "recurrent_layer.h"

namespace rnnattn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Gradients = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

const char* direction(bool bidirectional) { return bidirectional ? "bidirectional" : "forward"; }

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// y, h_n, c_n in the caller's layout, and gates and cells.
auto forward(const CallArguments& given, at::TensorList weights, const LayerSettings& s, bool save) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;  // nor views: an output is its own tensor to the caller
  auto [y, h_n, c_n, gates, cells] = recurrent_layer_forward(
      sequence_to_kernel(s.layout, given.x), state_to_kernel(s.layout, given.h0), optional(state_to_kernel(s.layout, given.c0)),
      weights, optional(s.lengths), {}, false, s.has_biases, direction(s.bidirectional), s.mode, save);
  return std::tuple{sequence_from_kernel(s.layout, y), state_from_kernel(s.layout, h_n),
                    given.c0.defined() ? state_from_kernel(s.layout, c_n) : Tensor(), gates, cells};
}

// By the operator, which sees to tensors of all kinds and to whoever looks on.
Gradients dispatched_backward(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x,
                                  const Tensor& h0, const OptionalTensor& c0, at::TensorList weights, const Tensor& y,
                                  const Tensor& gates, const Tensor& cells, const LayerSettings& s, Wanted wanted) {
  using Operator =
      Gradients(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                const OptionalTensor&, at::TensorList, const OptionalTensor&, const OptionalTensor&, bool, const Tensor&, const Tensor&,
                const Tensor&, bool, std::string_view, std::string_view, bool, bool, std::string_view);
  static const auto run =
      c10::Dispatcher::singleton().findSchemaOrThrow("rnnattn::recurrent_layer_gradients", "").typed<Operator>();
  return run.call(dy, dh_n, dc_n, {}, x, h0, c0, weights, optional(s.lengths), {}, false, y, gates, cells, s.has_biases,
                  direction(s.bidirectional), s.mode, wanted.dx, wanted.dweights, "cpp");
}

class RecurrentLayer : public torch::autograd::Function<RecurrentLayer> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                               const LayerSettings& s) {
    const auto [y, h_n, c_n, gates, cells] = rnnattn::forward({x, h0, c0.value_or(Tensor())}, weights, s, true);
    variable_list saved{x, h0, c0.value_or(Tensor()), gates, cells, s.lengths};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    // The caller may write into y: a second tensor tells that by its version, and the backward then runs the layer again.
    ctx->saved_data["y"] = Tensor(y.tensor_data());
    ctx->saved_data["version"] = static_cast<int64_t>(y._version());
    ctx->saved_data["mode"] = s.mode;
    ctx->saved_data["flags"] = std::vector<bool>{s.has_biases, s.bidirectional, s.layout.batch_first, s.layout.is_cell};
    return c_n.defined() ? variable_list{y, h_n, c_n} : variable_list{y, h_n};
  }

  static variable_list backward(AutogradContext* ctx, variable_list d) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList weights = at::TensorList(saved).slice(6);
    const auto flags = ctx->saved_data["flags"].toBoolList();
    const LayerSettings s{{flags[2], flags[3]}, ctx->saved_data["mode"].toStringRef(), flags[0], flags[1], saved[5]};
    const bool has_c = saved[2].defined();
    const size_t first = has_c ? 3 : 2;  // weight among the inputs
    bool needs_dweights = false;
    for (size_t n = 0; n < weights.size(); ++n) needs_dweights |= ctx->needs_input_grad(first + n);
    const Wanted wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), needs_dweights};

    const auto plain = [&](const Tensor& t) { return !t.defined() || is_plain(t, t.scalar_type()); };
    const bool direct = !c10::GradMode::is_enabled() && plain_thread() && std::all_of(d.begin(), d.end(), plain) &&
                        std::all_of(saved.begin(), saved.end(), plain);
    std::optional<at::AutoDispatchBelowADInplaceOrView> no_autograd;
    if (direct) no_autograd.emplace();
    const bool last_use = !torch::autograd::get_current_graph_task_keep_graph();
    Tensor returned = ctx->saved_data["y"].toTensor();
    if (returned._version() != ctx->saved_data["version"].toInt())
      returned = std::get<0>(rnnattn::forward({saved[0], saved[1], saved[2]}, weights, s, false));
    if (last_use) ctx->saved_data.erase("y");
    const auto sequence = [&](const Tensor& t) { return sequence_to_kernel(s.layout, t); };
    const auto state = [&](const Tensor& t) { return state_to_kernel(s.layout, t); };
    const OptionalTensor dy = optional(sequence(d[0])), dh_n = optional(state(d[1])), dc_n = has_c ? optional(state(d[2])) : std::nullopt;
    const Tensor x = sequence(saved[0]), h0 = state(saved[1]), y = sequence(returned);
    const OptionalTensor c0 = optional(state(saved[2]));
    const auto [dx, dh0, dc0, own] =
        direct ? recurrent_layer_backward(dy, dh_n, dc_n, {}, x, h0, c0, weights, optional(s.lengths), {}, false, y, saved[3], saved[4],
                                          s.has_biases, direction(s.bidirectional), s.mode, wanted, last_use)
               : dispatched_backward(dy, dh_n, dc_n, x, h0, c0, weights, y, saved[3], saved[4], s, wanted);

    variable_list gradients{wanted.dx ? sequence_from_kernel(s.layout, dx) : Tensor(),
                            wanted.dh0 ? state_from_kernel(s.layout, dh0) : Tensor(), has_c ? state_from_kernel(s.layout, dc0) : Tensor()};
    gradients.resize(3 + weights.size() + 1);  // the last one for the settings
    const size_t directions = s.bidirectional ? 2 : 1, each = weights.size() / directions, own_each = own.size() / directions;
    for (size_t n = 0; needs_dweights && n < weights.size(); ++n) {
      const size_t at = n % each, shared = each - own_each;  // b_ih and b_hh have the same numbers where there is one less
      const Tensor& gradient = own[n / each * own_each + (at > 2 ? at - shared : at)];
      gradients[3 + n] = shared && at == 3 ? gradient.clone() : gradient;
    }
    return gradients;
  }
};

std::tuple<Tensor, Tensor, Tensor> differentiable_layer(const CallArguments& given, at::TensorList weights, const LayerSettings& s) {
  const auto wants = [](const Tensor& t) { return t.defined() && t.requires_grad(); };
  if (records_gradients() &&
      (wants(given.x) || wants(given.h0) || wants(given.c0) || std::any_of(weights.begin(), weights.end(), wants))) {
    variable_list out = RecurrentLayer::apply(given.x, given.h0, optional(given.c0), weights, s);
    return {out[0], out[1], given.c0.defined() ? out[2] : Tensor()};
  }
  auto [y, h_n, c_n, gates, cells] = forward(given, weights, s, false);
  return {y, h_n, c_n};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> differentiable_stack(const CallArguments& given, at::TensorList weights, int64_t layers,
                                                        double dropout, const LayerSettings& s) {
  if (layers == 1) return differentiable_layer(given, weights, s);
  const int64_t K = s.bidirectional ? 2 : 1;
  const size_t each = weights.size() / layers;
  Tensor y = given.x;
  std::vector<Tensor> h_n(layers), c_n(given.c0.defined() ? layers : 0);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const auto own = [&](const Tensor& state) { return state.defined() ? state.narrow(0, layer * K, K) : state; };
    if (layer > 0 && dropout > 0)  // in the order of elements that torch.nn has, for the same draws
      y = sequence_from_kernel(s.layout, at::dropout(sequence_to_kernel(s.layout, y), dropout, true));
    Tensor c;
    std::tie(y, h_n[layer], c) = differentiable_layer({y, own(given.h0), own(given.c0)}, weights.slice(layer * each, each), s);
    if (c.defined()) c_n[layer] = c;
  }
  return {y, at::cat(h_n), c_n.empty() ? Tensor() : at::cat(c_n)};
}

}  // namespace rnnattn
