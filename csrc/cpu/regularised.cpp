// One direction of a regularised layer on a CPU: weights packed, then each thread scans its own rows to the end.
#include "../regularised.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "layer.h"
#include "row_order.h"

namespace rnnattn {
namespace {

template <typename T>
T* pointer(const Tensor& t) { return t.defined() && t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr; }

// What an argument is to be, if there is one; of any floating type where none is named.
void check(const char* name, const OptionalTensor& t, at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat, bool any = false) {
  if (!t || !t->defined()) return;
  TORCH_CHECK(t->sizes() == sizes, name, ": expected shape ", sizes, ", got ", t->sizes());
  TORCH_CHECK(any ? t->is_floating_point() : t->scalar_type() == dtype, name, ": expected ",
              any ? "a floating type" : c10::toString(dtype), ", got ", t->scalar_type());
  check_allocated(name, t);
}

// The optional arguments that both scans read, as they read them: contiguous, numbers as F.
template <typename F>
struct Parameters {
  Parameters(Mode mode, int64_t T, int64_t B, int64_t H, const OptionalTensor& norm_hh_given, const OptionalTensor& norm_c_given,
             const OptionalTensor& bias_c_given, const OptionalTensor& mask, const OptionalTensor& of_h, const OptionalTensor& of_c,
             const OptionalTensor& lengths_given, const OptionalTensor& resets_given) {
    check("norm_hh", norm_hh_given, {weight_gates(mode) * H}, at::kFloat, true), check("norm_c", norm_c_given, {H}, at::kFloat, true);
    check("bias_c", bias_c_given, {H}, at::kFloat, true), check("h_mask", mask, {B, H}, at::kFloat, true);
    check("keep_h", of_h, {T, B, H}, at::kBool), check("keep_c", of_c, {T, B, H}, at::kBool);
    check("lengths", lengths_given, {B}, at::kLong), check("resets", resets_given, {T, B}, at::kBool);
    norm_hh = full(norm_hh_given), norm_c = full(norm_c_given), bias_c = full(bias_c_given), h_mask = full(mask);
    keep_h = flat(of_h), keep_c = flat(of_c), resets = flat(resets_given), lengths = contiguous(lengths_given);
  }

  static Tensor full(const OptionalTensor& t) { return t ? t->to(c10::CppTypeToScalarType<F>::value).contiguous() : Tensor(); }
  static Tensor flat(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }

  Tensor norm_hh, norm_c, bias_c, h_mask, keep_h, keep_c, resets;
  OptionalTensor lengths;
};

// Calls scan(what both scans read, memory, pointers) for the rows of each thread.
template <typename F, typename Scan>
void run_rows(Mode mode, at::ScalarType stored, int64_t T, int64_t B, const Tensor& w_hh, bool transposed, const Parameters<F>& given,
              double zoneout_h, double zoneout_c, bool reverse, const Tensor& h_reset, const Tensor& c_reset,
              int64_t (*numbers)(Mode, int64_t rows, int64_t H), const Scan& scan) {
  const int groups = static_cast<int>(std::clamp<int64_t>(B, 1, team_size()));
  const int64_t H = w_hh.size(1), rows = (B + groups - 1) / groups;
  PackedMatrix<F> panels = packed_columns<F>(w_hh, transposed);
  panels.allocate();
  const RowOrder order(given.lengths, {T, B}, groups);
  run_layer<F>({groups, 1, groups}, 1, {&panels}, [&](int) { return ScratchSize{numbers(mode, rows, H), rows}; },
               [&](int, int group, int, int, Barrier*, F* memory, const void** pointers) {
                 scan(RegularisedScan<F>{mode, stored_as(stored), T, B, H, order.group(group, reverse),
                                         static_cast<const F*>(panels.data()), pointer<F>(given.norm_hh), pointer<F>(given.norm_c),
                                         pointer<F>(given.bias_c), pointer<F>(given.h_mask), pointer<bool>(given.keep_h),
                                         pointer<bool>(given.keep_c), F(zoneout_h), F(zoneout_c),
                                         {pointer<bool>(given.resets), pointer<F>(h_reset), pointer<F>(c_reset)}},
                      memory, pointers);
               });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> regularised_scan_forward(
    const Tensor& a, const Tensor& h0, const OptionalTensor& c0, const Tensor& w_hh, const OptionalTensor& b_hh,
    const OptionalTensor& norm_hh, const OptionalTensor& norm_c, const OptionalTensor& bias_c, const OptionalTensor& h_mask,
    const OptionalTensor& keep_h, const OptionalTensor& keep_c, double zoneout_h, double zoneout_c, const OptionalTensor& lengths,
    const OptionalTensor& resets, bool reset_to_initial, bool reverse, std::string_view mode_name, bool save) {
  adapt_to_fork();
  at::AutoDispatchBelowADInplaceOrView no_autograd;  // the caller differentiates
  const Mode mode = parse_mode(mode_name);
  const auto dtype = h0.scalar_type();
  return dispatch_accumulation(dtype, [&](auto zero) {
    using F = decltype(zero);
    TORCH_CHECK(a.dim() == 3, "a: expected 3 dimensions [T, B, GH], got shape ", a.sizes());
    TORCH_CHECK(h0.dim() == 2, "h0: expected 2 dimensions [B, H], got shape ", h0.sizes());
    const int64_t T = a.size(0), B = a.size(1), H = h0.size(1), GH = weight_gates(mode) * H;
    const bool lstm = mode == Mode::kLstm;
    TORCH_CHECK(c0.has_value() == lstm, "c0: expected ", lstm ? "a tensor for LSTM, got None" : "None for a cell without c");
    check("a", a, {T, B, GH}, c10::CppTypeToScalarType<F>::value), check("h0", h0, {B, H}, dtype), check("c0", c0, {B, H}, dtype, true);
    check("w_hh", w_hh, {GH, H}, dtype), check("b_hh", b_hh, {GH}, dtype, true);
    const Parameters<F> given(mode, T, B, H, norm_hh, norm_c, bias_c, h_mask, keep_h, keep_c, lengths, resets);
    const auto full = a.options();
    const auto filled = [&](at::IntArrayRef sizes, const at::TensorOptions& options, bool wanted) {
      return !wanted ? at::empty({0}, options) : lengths ? at::zeros(sizes, options) : at::empty(sizes, options);
    };
    const Tensor a_rows = a.contiguous(), w = w_hh.contiguous(), b = Parameters<F>::full(b_hh);
    const Tensor h = h0.to(a.scalar_type(), false, true, at::MemoryFormat::Contiguous);
    const Tensor c = lstm ? c0->to(a.scalar_type(), false, true, at::MemoryFormat::Contiguous) : at::empty({0}, full);
    const auto initial = [&](const Tensor& t) { return reset_states(resets, reset_to_initial, t.numel() ? t.clone() : Tensor()); };
    const Tensor h_reset = initial(h), c_reset = initial(c);
    const Tensor y = filled({T, B, H}, h0.options(), true), cells = filled({T, B, H}, full, lstm);
    const Tensor gates = filled({T, B, gate_columns(mode) * H}, h0.options(), save);
    const Tensor hidden = filled({T, B, GH}, h0.options(), save && norm_hh), rstd = filled({T, B}, full, save && norm_hh);
    run_rows<F>(mode, dtype, T, B, w, true, given, zoneout_h, zoneout_c, reverse, h_reset, c_reset, kernels<F>().regularised_numbers,
                [&](const RegularisedScan<F>& scan, F* memory, const void** pointers) {
                  kernels<F>().regularised_forward({scan, pointer<F>(a_rows), pointer<F>(b), pointer<F>(h), pointer<F>(c),
                                                    pointer<void>(y), pointer<F>(cells), pointer<void>(gates), pointer<void>(hidden),
                                                    pointer<F>(rstd)}, memory, pointers);
                });
    return std::tuple{y, h.to(dtype), lstm ? c.to(dtype) : at::empty({0}, h0.options()), cells, gates, hidden, rstd};
  });
}

// The scan alone: da, db, d_hidden, dh0, dc0, d_norm_c, d_bias_c ([B, H] sums of each row); empty where there is no such
// thing, db where it is da and d_hidden where it is db.
std::vector<Tensor> regularised_scan_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const OptionalTensor& dcells,
    const Tensor& h_prev, const OptionalTensor& c_prev, const Tensor& h0, const OptionalTensor& c0, const Tensor& w_hh,
    const OptionalTensor& norm_hh, const OptionalTensor& norm_c, const OptionalTensor& bias_c, const OptionalTensor& h_mask,
    const OptionalTensor& keep_h, const OptionalTensor& keep_c, double zoneout_h, double zoneout_c, const OptionalTensor& lengths,
    const OptionalTensor& resets, bool reset_to_initial, bool reverse, std::string_view mode_name, const Tensor& gates_given,
    const Tensor& hidden_given, const Tensor& rstd_given) {
  adapt_to_fork();
  at::AutoDispatchBelowADInplaceOrView no_autograd;  // the caller differentiates
  const Mode mode = parse_mode(mode_name);
  const auto dtype = h_prev.scalar_type();
  return dispatch_accumulation(dtype, [&](auto zero) {
    using F = decltype(zero);
    const auto acc = c10::CppTypeToScalarType<F>::value;
    TORCH_CHECK(h_prev.dim() == 3, "h_prev: expected 3 dimensions [T, B, H], got shape ", h_prev.sizes());
    const int64_t T = h_prev.size(0), B = h_prev.size(1), H = h_prev.size(2), GH = weight_gates(mode) * H;
    const bool lstm = mode == Mode::kLstm;
    TORCH_CHECK(c_prev.has_value() == lstm && c0.has_value() == lstm, "c_prev and c0: expected ",
                lstm ? "tensors for LSTM, got None" : "None for a cell without c");
    check("h_prev", h_prev, {T, B, H}, dtype), check("c_prev", c_prev, {T, B, H}, acc), check("w_hh", w_hh, {GH, H}, dtype);
    check("dy", dy, {T, B, H}, dtype, true), check("dcells", dcells, {T, B, H}, dtype, true);
    check("dh_n", dh_n, {B, H}, dtype, true), check("dc_n", dc_n, {B, H}, dtype, true);
    check("gates", gates_given, {T, B, gate_columns(mode) * H}, dtype);
    if (norm_hh) check("hidden", hidden_given, {T, B, GH}, dtype), check("rstd", rstd_given, {T, B}, acc);
    const Tensor gates = gates_given.contiguous(), hidden = hidden_given.contiguous(), rstd = rstd_given.contiguous();
    const Parameters<F> given(mode, T, B, H, norm_hh, norm_c, bias_c, h_mask, keep_h, keep_c, lengths, resets);
    const auto full = h_prev.options().dtype(acc);
    const Tensor none = at::empty({0}, full);
    const auto start = [&](const OptionalTensor& d) {
      return d ? d->to(acc, false, true, at::MemoryFormat::Contiguous) : at::zeros({B, H}, full);
    };
    const auto sums = [&](bool wanted) { return wanted ? at::zeros({B, H}, full) : none; };
    const auto steps = [&](bool wanted) { return !wanted ? none : lengths ? at::zeros({T, B, GH}, full) : at::empty({T, B, GH}, full); };
    const Tensor dy_rows = Parameters<F>::full(dy), dcells_rows = Parameters<F>::full(dcells), h_before = h_prev.contiguous();
    const Tensor c_before = Parameters<F>::full(c_prev), w = w_hh.contiguous();
    const Tensor dh = start(dh_n), dc = lstm ? start(dc_n) : none;
    const bool gathers = resets && reset_to_initial;
    const Tensor dh_reset = sums(gathers), dc_reset = sums(gathers && lstm);
    const Tensor d_norm_c = sums(norm_c.has_value()), d_bias_c = sums(bias_c.has_value());
    const Tensor da = steps(true), db = steps(mode == Mode::kGru), d_hidden = steps(norm_hh.has_value());
    run_rows<F>(mode, dtype, T, B, w, false, given, zoneout_h, zoneout_c, reverse, Tensor(), Tensor(), kernels<F>().regularised_numbers,
                [&](const RegularisedScan<F>& scan, F* memory, const void** pointers) {
                  kernels<F>().regularised_backward(
                      {scan, pointer<F>(dy_rows), pointer<F>(dcells_rows), pointer<void>(h_before), pointer<F>(c_before),
                       pointer<void>(gates), pointer<void>(hidden), pointer<F>(rstd), pointer<F>(dh), pointer<F>(dc),
                       pointer<F>(dh_reset), pointer<F>(dc_reset), pointer<F>(da), pointer<F>(db), pointer<F>(d_hidden),
                       pointer<F>(d_norm_c), pointer<F>(d_bias_c)}, memory, pointers);
                });
    if (gathers) dh.add_(dh_reset), dc.add_(dc_reset);
    return std::vector<Tensor>{da, db, d_hidden, dh.to(h0.scalar_type()), lstm ? dc.to(c0->scalar_type()) : none, d_norm_c, d_bias_c};
  });
}

TORCH_LIBRARY_IMPL(rnnattn_native, CPU, m) {
  m.impl("regularised_scan_forward", &regularised_scan_forward);
  m.impl("regularised_scan_backward", &regularised_scan_backward);
}

}  // namespace
}  // namespace rnnattn
