// The backward of a recurrent layer on a CPU: the scan gives the gradients of all pre-activations,
// from which those of the input and of the weights follow as GEMMs over all steps at once.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>

#include "../dispatch.h"
#include "../recurrent_layer.h"
#include "layer.h"
#include "previous_states.h"
#include "row_order.h"

namespace rnnattn {
namespace {

constexpr int64_t kColumnsOfOneGemm = 512;  // up to which one GEMM and some copies are faster than two
constexpr int64_t kTransposedSteps = 128;   // from which bfloat16 inputs are transposed for the GEMMs of their weights

using Gradients = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

template <typename F>
Gradients backward(const OptionalTensor& dy_given, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                   const OptionalTensor& dcells, const Tensor& x, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                   const OptionalTensor& lengths, const OptionalTensor& resets, bool reset_to_initial, const Tensor& y,
                   const Tensor& gates, const Tensor& cells, bool has_biases, std::string_view direction, Mode mode, Wanted wanted,
                   bool overwrites) {
  for (const Tensor& w : weights) check_allocated("weights", w);
  check_allocated("x", x), check_allocated("h0", h0), check_allocated("c0", c0), check_allocated("dy", dy_given);
  check_allocated("y", y), check_allocated("gates", gates), check_allocated("cells", cells), check_allocated("dcells", dcells);
  const auto reverses = parse_direction(direction);
  const auto acc = c10::CppTypeToScalarType<F>::value;
  const auto dtype = x.scalar_type();
  const BatchShape shape = batch_shape(x, h0.size(1), lengths, resets);
  const int64_t T = shape.T, B = shape.B, I = x.size(-1), K = h0.size(0), R = h0.size(2);
  const int64_t columns = gate_columns(mode), used = weight_gates(mode), H = weights[0].size(0) / used;
  const bool lstm = mode == Mode::kLstm, gru = mode == Mode::kGru;
  const auto full = x.options().dtype(acc);
  const Tensor none = at::empty({0}, x.options());

  const bool projected = weights.size() / K == (has_biases ? 5 : 3), narrow = multiplies_bfloat16(dtype, projected);
  const auto operand = narrow ? dtype : acc;  // of the gates' gradients, and of all that GEMMs multiply them with
  const auto parts = split_weights(weights, has_biases, K, operand, operand);
  const auto start = [&](const OptionalTensor& given, int64_t width) {
    return given ? given->to(acc, false, true, at::MemoryFormat::Contiguous) : at::zeros({K, B, width}, full);
  };
  const Tensor dh = start(dh_n, R), dc = lstm ? start(dc_n, H) : none;
  const Tensor h0_full = h0.to(acc).contiguous(), c0_full = lstm ? c0->to(acc).contiguous() : Tensor();
  const Tensor h_reset = reset_states(resets, reset_to_initial, h0_full), c_reset = reset_states(resets, reset_to_initial, c0_full);
  const auto zeros_like = [&](const Tensor& t) { return resets && reset_to_initial ? at::zeros_like(t) : Tensor(); };
  const Tensor dh_reset = zeros_like(dh), dc_reset = zeros_like(dc);
  OptionalTensor dy = dy_given;
  if (dy && dy->stride(-1) != 1) dy = dy->contiguous();
  const Tensor d_cells = dcells ? dcells->to(acc).contiguous() : Tensor();

  std::vector<PackedMatrix<F>> matrices;  // per direction: w_hh, (w_hr)
  for (const auto& w : parts) {
    matrices.push_back(packed_columns<F>(w.w_hh, false));
    if (narrow || keeps_bfloat16(dtype, mean_rows(lengths, shape))) matrices.back().packing.panel = Panel::kBFloat16;
    if (projected) matrices.push_back(packed_columns<F>(w.w_hr, false));
  }
  const bool one_step = T == 1 && !lengths;  // takes a product with w_hh for dh0 alone: not worth packing it
  std::vector<const PackedMatrix<F>*> to_pack;
  for (size_t n = 0; n < matrices.size(); ++n)
    if (!one_step || n % (matrices.size() / K)) matrices[n].allocate(), to_pack.push_back(&matrices[n]);
  const size_t each = matrices.size() / K;
  const int64_t lanes = kernels<F>().lanes, blocks = blocks_of(H, kernels<F>().wide_vectors, lanes);
  const int64_t projected_blocks = projected ? matrices[0].blocks : 0;

  const int64_t element = narrow ? 2 : sizeof(F);
  const bool tiles = narrow && kernel_table().bfloat16->tiles;
  const Plan plan =
      plan_layer({mode, T, B, I, H, R, static_cast<int>(K), mean_rows(lengths, shape), element, lanes, true, tiles}, team_size());
  const RowOrder order(lengths, shape, plan.groups);
  const std::vector<int64_t> dy_first = dy ? order.first_elements(dy->stride(0), dy->stride(-2)) : std::vector<int64_t>();
  // The scan reads a unit's gates just before it writes their gradients: into the same memory, where nobody else
  // reads it afterwards, or into memory that the system first has to find and to clear.
  const bool in_place = overwrites && gates.numel() && gates.scalar_type() == operand && order.slots == order.places && !projected;
  const Tensor d_gates =
      in_place ? gates.view({K, order.slots, columns * H}) : workspace({K, order.slots, columns * H}, full.dtype(operand));
  const Tensor d_bias = wanted.dweights && has_biases ? at::zeros({K, plan.groups, columns * H}, full) : none;
  const Tensor dh_out = projected ? workspace({K, order.slots, R}, full) : Tensor();

  const auto scratch = [&](int) {
    const int64_t rows = (B + plan.groups - 1) / plan.groups;
    return ScratchSize{narrow ? rows * padded_row(used * H) / 2 : 0, 2 * rows};
  };
  run_layer<F>(plan, static_cast<int>(K), to_pack, scratch, [&](int k, int group, int index, int members, Barrier* barrier,
                                                                F* numbers, const void** pointers) {
    const auto share = [&](int64_t n, int m) { return n * m / members; };
    const Member<F> member{index, share(blocks, index), share(blocks, index + 1), share(projected_blocks, index),
                           share(projected_blocks, index + 1), nullptr, numbers, pointers};
    const auto at_bytes = [&](const Tensor& t, int64_t at) -> const void* {
      return t.numel() ? static_cast<const char*>(t.const_data_ptr()) + at * t.element_size() : nullptr;
    };
    const auto pointer = [&](const Tensor& t, int64_t stride) { return t.defined() && t.numel() ? t.data_ptr<F>() + k * stride : nullptr; };
    const BackwardScan<F> scan{mode, stored_as(dtype), T, B, H, R, order.group(group, reverses[k]), barrier,
                               matrices[k * each].packing.panel, matrices[k * each].data(),
                               projected ? static_cast<const F*>(matrices[k * each + 1].data()) : nullptr,
                               dy ? at_bytes(*dy, k * R) : nullptr, dy_first.data(), dy ? dy->stride(-2) : 0,
                               at_bytes(y, k * R), K * R, at_bytes(gates, k * order.places * columns * H), pointer(cells, order.places * H),
                               pointer(h0_full, B * R), pointer(c0_full, B * H), pointer(dh, B * R), pointer(dc, B * H),
                               static_cast<char*>(d_gates.data_ptr()) + k * order.slots * columns * H * d_gates.element_size(),
                               d_bias.numel() ? d_bias.data_ptr<F>() + (k * plan.groups + group) * columns * H : nullptr,
                               pointer(dh_out, order.slots * R),
                               {flags(resets), pointer(h_reset, B * R), pointer(c_reset, B * H)}, pointer(dh_reset, B * R),
                               pointer(dc_reset, B * H), pointer(d_cells, order.places * H)};
    if constexpr (std::is_same_v<F, float>)
      if (narrow) return kernel_table().bfloat16->backward_scan(scan, member);
    kernels<F>().backward_scan(scan, member);
  });

  if (dh_reset.defined()) dh.add_(dh_reset), dc.add_(dc_reset);
  const bool padded = order.ragged && !order.packed;
  const Tensor rows = padded ? Slots(order, B, false).all : Tensor();
  const auto packed = [&](const Tensor& t) {  // [T, B, n] -> [slots, n]
    const Tensor flat = t.reshape({order.places, t.size(-1)});
    return (padded ? flat.index_select(0, rows) : flat).to(operand);
  };
  const Tensor x_packed = wanted.dweights ? packed(x) : Tensor();
  Tensor dx;
  std::vector<Tensor> dweights;
  for (int64_t k = 0; k < K; ++k) {
    const DirectionWeights& w = parts[k];
    const Tensor d = d_gates[k], d_h = d.narrow(1, hidden_column(mode) * H, used * H);
    if (one_step && wanted.dh0) {
      const Tensor product = at::mm(d_h, w.w_hh);
      gru ? dh[k].add_(product) : dh[k].copy_(product);
      if (resets && !reset_to_initial && !reverses[k]) dh[k].masked_fill_(resets->view({B, 1}), 0);
    }
    // The columns of the input product and their rows of w_ih: those of GRU's n stand first in d, last in w_ih.
    struct Part { int64_t column, row, n; };
    const std::vector<Part> parts_x = gru ? std::vector<Part>{{H, 0, 2 * H}, {0, 2 * H, H}} : std::vector<Part>{{0, 0, used * H}};
    if (wanted.dx)
      for (const Part& part : parts_x) {
        const Tensor d_part = d.narrow(1, part.column, part.n), w_part = w.w_ih.narrow(0, part.row, part.n);
        if (dx.defined()) dx.addmm_(d_part, w_part);
        else dx = workspace({order.slots, I}, d.options()), at::mm_out(dx, d_part, w_part);
      }
    if (!wanted.dweights) continue;
    const PreviousStates h_prev{y.narrow(-1, k * R, R), h0[k], order, reverses[k], resets, reset_to_initial};
    if (narrow && order.slots >= kTransposedSteps) {
      const Tensor inputs = rows_apart(I + R, order.slots, d.options());
      transpose_into(inputs.narrow(0, 0, I), x_packed.contiguous());
      h_prev.transpose_to(inputs.narrow(0, I, R));
      const auto product = [&](int64_t row, int64_t n, int64_t column) {
        Tensor sum = workspace({n, used * H}, d.options());
        return at::mm_out(sum, inputs.narrow(0, row, n), d.narrow(1, column, used * H));
      };
      const Tensor both = gru ? Tensor() : product(0, I + R, 0);
      const Tensor of_x = gru ? product(0, I, 0) : both.narrow(0, 0, I), of_h = gru ? product(I, R, H) : both.narrow(0, I, R);
      const Tensor dw_ih = at::empty({used * H, I}, d.options()), dw_hh = at::empty({used * H, R}, d.options());
      for (const Part& part : parts_x) transpose_into(dw_ih.narrow(0, part.row, part.n), of_x.narrow(1, part.column, part.n));
      transpose_into(dw_hh, of_h);
      dweights.push_back(dw_ih), dweights.push_back(dw_hh);
    } else if (parts_x.size() == 1 && order.slots >= used * H && I + R <= kColumnsOfOneGemm) {
      const Tensor inputs = workspace({order.slots, I + R}, d.options());
      inputs.narrow(1, 0, I).copy_(x_packed);
      h_prev.copy_to(inputs.narrow(1, I, R));
      const Tensor product = outer_sum(d, inputs);
      for (const Tensor& dw : {product.narrow(1, 0, I), product.narrow(1, I, R)})
        dweights.push_back(dw.to(dtype, false, true, at::MemoryFormat::Contiguous));
    } else {
      const Tensor dw_ih = workspace({used * H, I}, d.options());
      for (const Part& part : parts_x) outer_into(dw_ih.narrow(0, part.row, part.n), d.narrow(1, part.column, part.n), x_packed);
      dweights.push_back(dw_ih.to(dtype));
      dweights.push_back(h_prev.product(d_h).to(dtype));
    }
    if (has_biases) {
      const Tensor sums = d_bias[k].sum(0);
      dweights.push_back((gru ? at::cat({sums.narrow(0, H, 2 * H), sums.narrow(0, 0, H)}) : sums).to(dtype));
      if (gru) dweights.push_back(sums.narrow(0, H, 3 * H).to(dtype, false, true));  // not a view
    }
    if (projected) {
      const Tensor h_raw = (gates[k].narrow(-1, 3 * H, H).to(acc) * cells[k].tanh()).to(dtype);
      dweights.push_back(at::mm(dh_out[k].t(), packed(h_raw)).to(dtype));
    }
  }
  if (wanted.dx && padded) dx = at::zeros({T * B, I}, dx.options()).index_copy_(0, rows, dx);
  return {wanted.dx ? dx.to(dtype).view(x.sizes()) : none, wanted.dh0 ? dh.to(dtype) : none, lstm ? dc.to(dtype) : none, dweights};
}

Gradients backward_operator(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                            const OptionalTensor& dcells, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                            at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& resets,
                            bool reset_to_initial, const Tensor& y, const Tensor& gates, const Tensor& cells, bool has_biases,
                            std::string_view direction, std::string_view mode, bool needs_dx, bool needs_dweights,
                            bool overwrites) {
  return recurrent_layer_backward(dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, resets, reset_to_initial, y, gates, cells,
                                  has_biases, direction, mode, {needs_dx, true, needs_dweights}, overwrites);
}

TORCH_LIBRARY_IMPL(rnnattn_native, CPU, m) {
  m.impl("recurrent_layer_backward", &backward_operator);
}

}  // namespace

Gradients recurrent_layer_backward(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                   const OptionalTensor& dcells, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                                   at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& resets,
                                   bool reset_to_initial, const Tensor& y, const Tensor& gates, const Tensor& cells,
                                   bool has_biases, std::string_view direction, std::string_view mode, Wanted wanted,
                                   bool overwrites) {
  adapt_to_fork();
  at::AutoDispatchBelowADInplaceOrView no_autograd;  // the caller differentiates
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // wherever he asks for gradients
  return dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    return backward<decltype(zero)>(dy, dh_n, dc_n, dcells, x, h0, c0, weights, contiguous(lengths), contiguous(resets),
                                    reset_to_initial, y.contiguous(), gates.contiguous(), cells.contiguous(), has_biases, direction,
                                    parse_mode(mode), wanted, overwrites);
  });
}

}  // namespace rnnattn
