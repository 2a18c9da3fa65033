// Launchers of regularised_step_kernel.cuh: rnnattn_native::regularised_forward and regularised_backward.
#include "modes.h"
//
#include "regularised_step_kernel.cuh"

namespace rnnattn::cuda {
namespace {

template <typename Params>
void launch_rows(void (*kernel)(Params), int device, const Params& p) {
  const unsigned threads = power_of_two(p.H, kRowThreads);
  const dim3 block(threads < kWarp ? kWarp : threads);
  if (p.B > 0 && p.H > 0) launch(kernel, dim3(static_cast<unsigned>(p.B)), block, device, p);
}

// Checks what both directions read.
Regularisation regularisation(const Operation& op, int64_t B, int64_t H, int64_t G, const OptionalTensor& norm_hh,
                              const OptionalTensor& norm_c, const OptionalTensor& bias_c, const OptionalTensor& h_mask,
                              const OptionalTensor& keep_h, const OptionalTensor& keep_c, double zoneout_h,
                              double zoneout_c, const OptionalTensor& lengths, int64_t t) {
  op.check_dense("norm_hh", norm_hh, kFloat, {G * H});
  op.check_dense("norm_c", norm_c, kFloat, {H});
  op.check_dense("bias_c", bias_c, kFloat, {H});
  op.check("h_mask", h_mask, kFloat, {B, H});
  op.check("keep_h", keep_h, ScalarType::Bool, {B, H});
  op.check("keep_c", keep_c, ScalarType::Bool, {B, H});
  op.check_dense("lengths", lengths, ScalarType::Long, {B});
  return {pointer<const float>(norm_hh), pointer<const float>(norm_c), pointer<const float>(bias_c),
          rows<const float>(h_mask), rows<const bool>(keep_h), rows<const bool>(keep_c),
          static_cast<float>(zoneout_h), static_cast<float>(zoneout_c), pointer<const int64_t>(lengths), t};
}

void regularised_forward(int64_t mode, const Tensor a, const Tensor product, const OptionalTensor b_hh,
                         const OptionalTensor norm_hh, const OptionalTensor norm_c, const OptionalTensor bias_c,
                         const OptionalTensor h_mask, const OptionalTensor keep_h, const OptionalTensor keep_c,
                         double zoneout_h, double zoneout_c, const OptionalTensor lengths, int64_t t,
                         const OptionalTensor resets_next, const OptionalTensor h_reset, const OptionalTensor c_reset,
                         const Tensor h, const OptionalTensor c, const Tensor operand, const Tensor y,
                         const OptionalTensor cells, const OptionalTensor gates, const OptionalTensor hidden,
                         const OptionalTensor rstd) {
  const char* name = "regularised_forward";
  const Operation op(name, a);
  STD_TORCH_CHECK(y.dim() == 2, "rnnattn ", name, ": y: expected 2 dimensions [B, H], got ", y.dim());
  const int64_t B = y.size(0), H = y.size(1);
  const ScalarType dtype = y.scalar_type();
  const bool fp32 = operand.scalar_type() == kFloat;
  with_cell(name, mode, [&](auto of) {
    using Cell = decltype(of);
    constexpr int64_t G = Cell::kGates;
    op.check("a", a, kFloat, {B, G * H});
    op.check("product", product, kFloat, {B, G * H});
    op.check_dense("b_hh", b_hh, kFloat, {G * H});
    const Regularisation by = regularisation(op, B, H, G, norm_hh, norm_c, bias_c, h_mask, keep_h, keep_c, zoneout_h,
                                             zoneout_c, lengths, t);
    op.check_dense("resets_next", resets_next, ScalarType::Bool, {B});
    op.check("h_reset", h_reset, kFloat, {B, H});
    op.check("c_reset", c_reset, kFloat, {B, H});
    op.check("h", h, kFloat, {B, H});
    op.check("c", c, kFloat, {B, H});
    op.check("operand", operand, fp32 ? kFloat : dtype, {B, H});
    op.check("y", y, dtype, {B, H});
    op.check("cells", cells, kFloat, {B, H});
    op.check("gates", gates, dtype, {B, kSavedBlocks<Cell> * H});
    op.check("hidden", hidden, dtype, {B, G * H});
    op.check_dense("rstd", rstd, kFloat, {B});
    require(name, mode, "c", Cell::kHasC, c);
    require(name, mode, "cells", Cell::kHasC, cells);
    dispatch(name, dtype, [&](auto element) {
      using Scalar = decltype(element);
      const RegularisedForward<Scalar> p{
          B, H, by, pointer<const float>(b_hh), pointer<const bool>(resets_next), rows<const float>(a),
          rows<const float>(product), rows<const float>(h_reset), rows<const float>(c_reset), rows<float>(h),
          rows<float>(c), fp32 ? Rows<Scalar>{} : rows<Scalar>(operand), fp32 ? rows<float>(operand) : Rows<float>{},
          rows<Scalar>(y), rows<float>(cells), rows<Scalar>(gates), rows<Scalar>(hidden), pointer<float>(rstd)};
      launch_rows(regularised_forward_kernel<Cell, Scalar>, op.device(), p);
    });
  });
}

void regularised_backward(int64_t mode, const OptionalTensor dy, const OptionalTensor dcells,
                          const OptionalTensor product, const Tensor dh, const OptionalTensor dc, const Tensor h_prev,
                          const OptionalTensor c_prev, const Tensor gates, const OptionalTensor hidden,
                          const OptionalTensor rstd, const OptionalTensor norm_hh, const OptionalTensor norm_c,
                          const OptionalTensor bias_c, const OptionalTensor h_mask, const OptionalTensor keep_h,
                          const OptionalTensor keep_c, double zoneout_h, double zoneout_c, const OptionalTensor lengths,
                          int64_t t, const OptionalTensor resets_after, const OptionalTensor dh_reset,
                          const OptionalTensor dc_reset, const OptionalTensor d_norm_c, const OptionalTensor d_bias_c,
                          const Tensor da, const OptionalTensor db, const OptionalTensor d_hidden) {
  const char* name = "regularised_backward";
  const Operation op(name, da);
  STD_TORCH_CHECK(dh.dim() == 2, "rnnattn ", name, ": dh: expected 2 dimensions [B, H], got ", dh.dim());
  const int64_t B = dh.size(0), H = dh.size(1);
  const ScalarType dtype = gates.scalar_type();
  with_cell(name, mode, [&](auto of) {
    using Cell = decltype(of);
    constexpr int64_t G = Cell::kGates;
    op.check("dy", dy, dtype, {B, H});
    op.check("dcells", dcells, kFloat, {B, H});
    op.check("product", product, kFloat, {B, H});
    op.check("dh", dh, kFloat, {B, H});
    op.check("dc", dc, kFloat, {B, H});
    op.check("h_prev", h_prev, dtype, {B, H});
    op.check("c_prev", c_prev, kFloat, {B, H});
    op.check("gates", gates, dtype, {B, kSavedBlocks<Cell> * H});
    op.check("hidden", hidden, dtype, {B, G * H});
    op.check_dense("rstd", rstd, kFloat, {B});
    const Regularisation by = regularisation(op, B, H, G, norm_hh, norm_c, bias_c, h_mask, keep_h, keep_c, zoneout_h,
                                             zoneout_c, lengths, t);
    op.check_dense("resets_after", resets_after, ScalarType::Bool, {B});
    op.check("dh_reset", dh_reset, kFloat, {B, H});
    op.check("dc_reset", dc_reset, kFloat, {B, H});
    op.check("d_norm_c", d_norm_c, kFloat, {B, H});
    op.check("d_bias_c", d_bias_c, kFloat, {B, H});
    op.check("da", da, kFloat, {B, G * H});
    op.check("db", db, kFloat, {B, G * H});
    op.check("d_hidden", d_hidden, kFloat, {B, G * H});
    require(name, mode, "dc", Cell::kHasC, dc);
    require(name, mode, "c_prev", Cell::kHasC, c_prev);
    require(name, mode, "db", !Cell::kShared, db);
    STD_TORCH_CHECK(!norm_hh || (hidden && rstd && d_hidden), "rnnattn ", name,
                    ": norm_hh: expected hidden, rstd and d_hidden with it, got None");
    dispatch(name, dtype, [&](auto element) {
      using Scalar = decltype(element);
      const RegularisedBackward<Scalar> p{
          B, H, by, pointer<const bool>(resets_after), rows<const Scalar>(dy), rows<const float>(dcells),
          rows<const float>(product), rows<float>(dh), rows<float>(dc), rows<const Scalar>(h_prev),
          rows<const float>(c_prev), rows<const Scalar>(gates), rows<const Scalar>(hidden), pointer<const float>(rstd),
          rows<float>(dh_reset), rows<float>(dc_reset), rows<float>(d_norm_c), rows<float>(d_bias_c), rows<float>(da),
          rows<float>(db), rows<float>(d_hidden)};
      launch_rows(regularised_backward_kernel<Cell, Scalar>, op.device(), p);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(RNNATTN_LIBRARY, RNNATTN_DISPATCH_KEY, m) {
  m.impl("regularised_forward", TORCH_BOX(&regularised_forward));
  m.impl("regularised_backward", TORCH_BOX(&regularised_backward));
}

}  // namespace
}  // namespace rnnattn::cuda
