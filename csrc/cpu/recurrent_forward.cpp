// The forward of a recurrent layer on a CPU: weights packed, then one parallel region in which each
// thread scans its rows or its units to the end.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../dispatch.h"
#include "../recurrent_layer.h"
#include "forward_weights.h"
#include "huge_pages.h"
#include "prepared.h"
#include "row_order.h"

namespace rnnattn {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Whether steps are so few that they do not pay for packing the weights before the scan.
bool are_few(int64_t T, int64_t B) { return T == 1 ? B <= 64 : T <= 8 && T * B <= 32; }

// Scan steps whose input product a member computes at once: as many as leave its cache to the weights. A matrix unit takes
// either one, with its hidden product, or many, as few rows waste most of it, and weights that are read once in a while.
int64_t chunk_steps(double rows, int64_t columns, int64_t element, int64_t T, bool tiles, int64_t weight_bytes) {
  if (tiles && sums_both_products(rows, static_cast<double>(weight_bytes))) return 1;
  const double rows_at_once = static_cast<double>(private_cache()) / (tiles ? 2 : 8) / static_cast<double>(columns * element);
  return std::clamp<int64_t>(static_cast<int64_t>(rows_at_once / std::max(1.0, rows)), 1, T);
}

char* bytes(const Tensor& t, int64_t index) { return static_cast<char*>(t.data_ptr()) + index * t.element_size(); }

// What stands behind a row's length, and the last states.
template <typename F>
void finish_rows(const RowOrder& order, const std::vector<bool>& reverses, const Tensor& y, const Tensor& h0, const Tensor& h_n,
                 const Tensor& gates, const Tensor& cells, const Tensor& c0, const Tensor& c_n) {
  const int64_t T = order.packed ? 0 : y.size(0), B = h0.size(1), K = h0.size(0), R = h0.size(2), element = y.element_size();
  for (int64_t k = 0; k < K; ++k)
    order.for_rows([&](int64_t b, int64_t length, int64_t) {
      const auto y_at = [&](int64_t t) { return bytes(y, (order.at(t, b) * K + k) * R); };
      const int64_t row = k * B + b;
      std::memcpy(bytes(h_n, row * R), length ? y_at(reverses[k] ? 0 : length - 1) : bytes(h0, row * R), R * element);
      for (int64_t t = length; t < T; ++t) {
        std::memset(y_at(t), 0, R * element);
        const int64_t at = k * order.places + order.at(t, b);
        if (gates.numel()) std::memset(bytes(gates, at * gates.size(3)), 0, gates.size(3) * element);
        if (!cells.numel()) continue;
        const int64_t H = cells.size(3);
        std::copy_n((reverses[k] ? c0 : c_n).template const_data_ptr<F>() + row * H, H, cells.template data_ptr<F>() + at * H);
      }
    });
}

// [K, T, B, n] for x [T, B, I], and [K, slots, n] for a packed one.
at::DimVector sizes_of_steps(int64_t K, const Tensor& x, int64_t n) {
  at::DimVector sizes{K};
  sizes.append(x.sizes().begin(), x.sizes().end() - 1);
  sizes.push_back(n);
  return sizes;
}

// shape: of x, lengths and resets. Outputs that there are not are undefined.
template <typename F>
Outputs forward(const Tensor& x_given, const Tensor& h0, const OptionalTensor& c0, std::vector<ForwardWeights<F>>& weights,
                const BatchShape& shape, const OptionalTensor& lengths, const OptionalTensor& resets, bool reset_to_initial,
                const std::vector<bool>& reverses, Mode mode, bool save, int64_t calls = 0) {
  check_allocated("x", x_given), check_allocated("h0", h0), check_allocated("c0", c0);
  const auto acc = c10::CppTypeToScalarType<F>::value;
  const Stored stored = stored_as(x_given.scalar_type());
  const Tensor x = x_given.stride(-1) == 1 || x_given.size(-1) == 1 ? x_given : x_given.contiguous();
  const int64_t T = shape.T, B = shape.B, I = x.size(-1), K = h0.size(0), R = h0.size(2), H = weights[0].ih.packing.width;
  const int64_t columns = gate_columns(mode), lanes = kernels<F>().lanes;
  const int64_t blocks = weights[0].ih.blocks, block = weight_gates(mode) * unit_vectors(mode) * lanes;
  const bool lstm = mode == Mode::kLstm, saves_gates = save && columns > 1, projected = weights[0].hr.has_value();
  const auto options = x.options(), full = options.dtype(acc);

  const Tensor y = in_huge_pages(at::empty(at::IntArrayRef(sizes_of_steps(K, x, K * R)).slice(1), options));
  const Tensor gates = saves_gates ? workspace(sizes_of_steps(K, x, columns * H), options) : Tensor();
  const Tensor cells = save && lstm ? workspace(sizes_of_steps(K, x, H), full) : Tensor();
  const bool narrow = weights[0].ih.packing.panel == Panel::kBFloat16 && multiplies_bfloat16(x.scalar_type(), projected);
  const Tensor h0_given = h0.contiguous(), h0_rows = narrow ? h0_given : h0_given.to(acc);
  const Tensor c0_full = lstm ? c0->to(acc).contiguous() : Tensor(), c = lstm ? at::empty({K, B, H}, full) : Tensor();
  if (lstm && c.numel()) std::memcpy(c.data_ptr(), c0_full.const_data_ptr(), c.nbytes());
  const Tensor h = stored == Stored::kFull || narrow ? Tensor() : at::empty({K, 2, B, R}, full);
  const Tensor h_reset = reset_states(resets, reset_to_initial, h0_rows), c_reset = reset_states(resets, reset_to_initial, c0_full);
  const Tensor h_raw = projected ? at::empty({K, B, H}, full) : Tensor();

  std::vector<const PackedMatrix<F>*> to_pack;
  const auto pack = [&](PackedMatrix<F>& matrix) {
    if (matrix.panels.defined()) return;
    matrix.allocate();
    to_pack.push_back(&matrix);
  };
  const bool few = are_few(T, B), unpacked = few && !weights[0].ih.panels.defined();
  for (auto& w : weights) {
    if (!few) pack(w.ih), pack(w.hh);
    if (w.hr) pack(*w.hr);
  }

  const double rows = mean_rows(lengths, shape);
  const int directions = static_cast<int>(K);
  const int64_t element = narrow ? 2 : sizeof(F);
  const bool tiles = narrow && kernel_table().bfloat16->tiles;
  const int64_t shared_rows = unpacked ? 1 : B;  // threads that share the rows would each pack all weights
  const Plan plan = plan_layer({mode, T, shared_rows, I, H, R, directions, rows, element, lanes, false, tiles}, team_size());
  const RowOrder order(lengths, shape, plan.groups);
  const std::vector<int64_t> x_first = order.first_elements(x.stride(0), x.stride(-2));
  const int64_t group_rows = (B + plan.groups - 1) / plan.groups;

  const auto chunk_of = [&](int members) {
    const int64_t width = (blocks + members - 1) / members * block;
    // Memory goes by the rows of the first step, of which a few long ones may go on alone.
    return chunk_steps(std::max(rows / plan.groups, group_rows / 4.0), width, sizeof(F), T, tiles, width * (I + R) * element);
  };
  const auto gates_x = [&](int members) {  // numbers of the input products computed ahead
    return (tiles || chunk_of(members) > 1 ? (blocks + members - 1) / members : 1) * chunk_of(members) * group_rows * block;
  };
  const auto copies = [&](int members) {
    const int64_t chunk_rows = chunk_of(members) * group_rows;
    if (stored == Stored::kFull) return int64_t{0};
    return narrow ? (chunk_rows * padded_row(I) + group_rows * padded_row(R)) / 2 : chunk_rows * I;
  };
  const Panel panel = weights[0].ih.packing.panel;
  const int64_t panel_size = unpacked ? block * std::max(panel_depth(panel, I), panel_depth(panel, R)) : 0;
  const auto scratch = [&](int members) {
    return ScratchSize{gates_x(members) + copies(members) + panel_size, chunk_of(members) * group_rows + 2 * group_rows};
  };
  run_layer<F>(plan, directions, to_pack, scratch, [&](int k, int group, int index, int members, Barrier* barrier, F* numbers,
                                                       const void** pointers) {
    const ForwardWeights<F>& w = weights[k];
    const auto share = [&](int64_t n, int m) { return n * m / members; };
    const int64_t projections = w.hr ? w.hr->blocks : 0;
    const Member<F> member{index, share(blocks, index), share(blocks, index + 1), share(projections, index),
                           share(projections, index + 1), numbers, numbers + gates_x(members), pointers,
                           numbers + gates_x(members) + copies(members)};
    // This direction's part of a tensor, or null.
    const auto part = [&](const Tensor& t, int64_t stride) {
      return t.defined() && t.numel() ? t.template data_ptr<F>() + k * stride : nullptr;
    };
    const auto stored_part = [&](const Tensor& t, int64_t stride) -> void* { return t.numel() ? bytes(t, k * stride) : nullptr; };
    const ForwardScan<F> scan{mode, stored, T, B, I, H, R, order.group(group, reverses[k]), barrier,
                              x.const_data_ptr(), x_first.data(), x.stride(-2), w.ih.packing, w.hh.packing,
                              w.ih.packing.panel, w.ih.data(), w.hh.data(), part(w.scale_ih, 0), part(w.scale_hh, 0), part(w.bias, 0),
                              part(w.bias_q, 0), w.hr ? static_cast<const F*>(w.hr->data()) : nullptr, bytes(h0_rows, k * B * R),
                              part(h, 2 * B * R), part(h_raw, B * H), part(c, B * H), stored_part(y, R), K * R,
                              stored_part(gates, order.places * columns * H), part(cells, order.places * H), chunk_of(members), calls,
                              {flags(resets), h_reset.defined() ? bytes(h_reset, k * B * R) : nullptr, part(c_reset, B * H)}};
    if constexpr (std::is_same_v<F, float>)
      if (narrow) return kernel_table().bfloat16->forward_scan(scan, member);
    kernels<F>().forward_scan(scan, member);
  });

  const Tensor h_n = at::empty_like(h0_given);
  finish_rows<F>(order, reverses, y, h0_given, h_n, gates, cells, c0_full, c);
  return {y, h_n, lstm ? c.to(x.scalar_type()) : c, gates, cells};
}

Tensor or_empty(const Tensor& t, at::TensorOptions options) { return t.defined() ? t : at::empty({0}, options); }

// The weights of a stack, packed once for all calls of prepared_forward: kPrepared tensors for each
// direction of each layer. precision: float (as the weights are, but 16 bits as fp32 where products take that), bfloat16
// or int8.
std::vector<Tensor> prepare_weights(at::TensorList weights, bool has_biases, int64_t layers, bool bidirectional,
                                    std::string_view mode_name, std::string_view precision) {
  adapt_to_fork();
  at::AutoDispatchBelowADInplaceOrView no_autograd;  // the caller differentiates
  const Mode mode = parse_mode(mode_name);
  TORCH_CHECK(precision == "float" || precision == "bfloat16" || precision == "int8",
              "precision: expected float, bfloat16 or int8, got ", precision);
  const Panel panel = precision == "int8" ? Panel::kInt8 : precision == "bfloat16" ? Panel::kBFloat16 : Panel::kFull;
  const int64_t K = bidirectional ? 2 : 1, H = weights[0].size(0) / weight_gates(mode), each = weights.size() / layers;
  TORCH_CHECK(panel == Panel::kFull || weights[0].scalar_type() != at::kDouble, "precision: expected float for float64 weights, got ",
              precision);
  const auto held = [&](bool projected) {
    return panel == Panel::kFull && multiplies_bfloat16(weights[0].scalar_type(), projected) ? Panel::kBFloat16 : panel;
  };
  return dispatch_accumulation(weights[0].scalar_type(), [&](auto zero) {
    using F = decltype(zero);
    std::vector<Tensor> prepared;
    for (int64_t layer = 0; layer < layers; ++layer)
      for (auto& w : forward_weights<F>(weights.slice(layer * each, each), has_biases, K, mode, H))
        for (Tensor& t : prepare<F>(std::move(w), held(w.hr.has_value()), mode, H)) prepared.push_back(std::move(t));
    return prepared;
  });
}

template <typename F>
class Stack final : public PreparedStack {
 public:
  Stack(const std::vector<Tensor>& prepared, int64_t K, Mode mode, int64_t I, int64_t H, int64_t R)
      : mode_(mode), reverses_(parse_direction(K == 2 ? "bidirectional" : "forward")) {
    const size_t each = K * kPrepared;
    TORCH_CHECK(!prepared.empty() && prepared.size() % each == 0, "prepared: expected a multiple of ", each, " tensors, got ", prepared.size());
    for (size_t first = 0; first < prepared.size(); first += each) {
      auto& layer = layers_.emplace_back();
      for (size_t at = first; at < first + each; at += kPrepared)
        layer.push_back(restore<F>(at::TensorList(prepared).slice(at, kPrepared), mode, first ? K * R : I, H, R));
    }
  }

  std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                                         const OptionalTensor& lengths, const OptionalTensor& resets,
                                         bool reset_to_initial) const override {
    adapt_to_fork();
    at::AutoDispatchBelowADInplaceOrView no_autograd;  // the caller differentiates
    const BatchShape shape = batch_shape(x, h0.size(1), lengths, resets);
    if (layers_.size() == 1) {
      auto [y, h_n, c_n, gates, cells] = forward<F>(x, h0, c0, layers_[0], shape, lengths, resets, reset_to_initial, reverses_,
                                                    mode_, false, calls_++);
      return {std::move(y), std::move(h_n), std::move(c_n)};
    }
    const int64_t K = reverses_.size();
    Tensor y = x;
    std::vector<Tensor> h_n, c_n;
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
      const auto own = [&](const Tensor& states) { return states.narrow(0, layer * K, K); };
      auto out = forward<F>(y, own(h0), c0 ? OptionalTensor(own(*c0)) : c0, layers_[layer], shape, lengths, resets,
                            reset_to_initial, reverses_, mode_, false);
      y = std::get<0>(out);
      h_n.push_back(std::get<1>(out)), c_n.push_back(std::get<2>(out));
    }
    return {y, at::cat(h_n), c0 ? at::cat(c_n) : Tensor()};
  }

 private:
  const Mode mode_;
  const std::vector<bool> reverses_;
  mutable std::atomic<int64_t> calls_{0};
  mutable std::vector<std::vector<ForwardWeights<F>>> layers_;  // [layer][direction]; forward() packs what is not, here nothing
};

// A stack of layers over prepared weights, without dropout; x [T, B, I] or packed, h0 [L K, B, R], c0 [L K, B, H].
std::tuple<Tensor, Tensor, Tensor> prepared_forward(const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                                                    const OptionalTensor& lengths, const OptionalTensor& resets,
                                                    bool reset_to_initial, at::TensorList prepared, bool bidirectional,
                                                    std::string_view mode, int64_t H) {
  const auto stack = prepared_stack(prepared.vec(), bidirectional, mode, x.scalar_type(), x.size(-1), H, h0.size(2));
  auto [y, h_n, c_n] = stack->run(x, h0, c0, contiguous(lengths), contiguous(resets), reset_to_initial);
  return {y, h_n, or_empty(c_n, x.options())};
}

TORCH_LIBRARY_IMPL(rnnattn_native, CPU, m) {
  watch_forks();
  m.impl("recurrent_layer_forward", &rnnattn::recurrent_layer_forward);
  m.impl("prepare_weights", &prepare_weights);
  m.impl("prepared_forward", &prepared_forward);
}

}  // namespace

Outputs recurrent_layer_forward(const Tensor& x, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                const OptionalTensor& given_lengths, const OptionalTensor& given_resets, bool reset_to_initial,
                                bool has_biases, std::string_view direction, std::string_view mode_name, bool save) {
  const OptionalTensor lengths = contiguous(given_lengths), resets = contiguous(given_resets);
  adapt_to_fork();
  at::AutoDispatchBelowADInplaceOrView no_autograd;  // the caller differentiates
  const Mode mode = parse_mode(mode_name);
  for (const Tensor& w : weights) check_allocated("weights", w);
  const BatchShape shape = batch_shape(x, h0.size(1), lengths, resets);
  return dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    using F = decltype(zero);
    auto packed = forward_weights<F>(weights, has_biases, h0.size(0), mode, weights[0].size(0) / weight_gates(mode));
    const auto dtype = weights[0].scalar_type();
    if (multiplies_bfloat16(dtype, packed[0].hr.has_value()) || keeps_bfloat16(dtype, mean_rows(lengths, shape)))
      for (auto& w : packed) w.ih.packing.panel = w.hh.packing.panel = Panel::kBFloat16;
    const auto [y, h_n, c_n, gates, cells] = forward<F>(x, h0, c0, packed, shape, lengths, resets, reset_to_initial,
                                                        parse_direction(direction), mode, save);
    const auto empty = [&](const Tensor& t) { return or_empty(t, x.options()); };
    return Outputs{y, h_n, empty(c_n), empty(gates), empty(cells)};
  });
}

std::unique_ptr<PreparedStack> prepared_stack(std::vector<Tensor> prepared, bool bidirectional, std::string_view mode,
                                              at::ScalarType dtype, int64_t I, int64_t H, int64_t R) {
  return dispatch_accumulation(dtype, [&](auto zero) -> std::unique_ptr<PreparedStack> {
    return std::make_unique<Stack<decltype(zero)>>(prepared, bidirectional ? 2 : 1, parse_mode(mode), I, H, R);
  });
}

}  // namespace rnnattn
