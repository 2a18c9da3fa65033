// Launchers of recurrent_step_kernel.cuh: rnnattn_native::step_forward and step_backward.
#include "modes.h"
//
#include "recurrent_step_kernel.cuh"

namespace rnnattn::cuda {
namespace {

constexpr int kVector = 4;
constexpr unsigned kThreads = 128;

// Starts the kernel made for vectors where every row allows them, else the one for single units.
template <typename Params>
void launch_step(void (*vector)(Params), void (*single)(Params), bool vectors, int device, const Params& p) {
  const int64_t units = vectors ? p.H / kVector : p.H;
  const unsigned x = power_of_two(units, kThreads);
  const dim3 block(x, kThreads / x);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.B, block.y)), static_cast<unsigned>(ceil_div(units, x)));
  if (p.B > 0 && p.H > 0) launch(vectors ? vector : single, grid, block, device, p);
}

template <typename... Matrix>
bool vectors_fit(int64_t H, const Matrix&... a) {
  return H % kVector == 0 && (aligned(a, kVector * sizeof(*a.data)) && ...);
}

void forward(int64_t mode, const Tensor gates_x, const Tensor gates_h, const OptionalTensor bias_q,
             const OptionalTensor h_prev, const OptionalTensor c_prev, const OptionalTensor lengths, int64_t t,
             const OptionalTensor resets, const OptionalTensor gates_reset, const OptionalTensor h_reset,
             const OptionalTensor c_reset, const OptionalTensor gates, const OptionalTensor c, const Tensor y,
             const OptionalTensor h) {
  const char* name = "step_forward";
  const Operation op(name, gates_x);
  STD_TORCH_CHECK(y.dim() == 2, "rnnattn ", name, ": y: expected 2 dimensions [B, H], got ", y.dim());
  const int64_t B = y.size(0), H = y.size(1);
  const ScalarType dtype = y.scalar_type();
  with_cell(name, mode, [&](auto of) {
    using Cell = decltype(of);
    constexpr int64_t G = Cell::kGates, S = Cell::kSaved;
    op.check("gates_x", gates_x, kFloat, {B, G * H});
    op.check("gates_h", gates_h, kFloat, {B, G * H});
    op.check_dense("bias_q", bias_q, dtype, {H});
    op.check("h_prev", h_prev, dtype, {B, H});
    op.check("c_prev", c_prev, kFloat, {B, H});
    op.check_dense("lengths", lengths, ScalarType::Long, {B});
    op.check_dense("resets", resets, ScalarType::Bool, {B});
    op.check("gates_reset", gates_reset, kFloat, {B, G * H});
    op.check("h_reset", h_reset, dtype, {B, H});
    op.check("c_reset", c_reset, kFloat, {B, H});
    if (S > 0) op.check("gates", gates, dtype, {B, S * H});
    op.check("c", c, kFloat, {B, H});
    op.check("y", y, dtype, {B, H});
    op.check("h", h, dtype, {B, H});
    require(name, mode, "c_prev", Cell::kHasC, c_prev);
    require(name, mode, "c", Cell::kHasC, c);
    require(name, mode, "h_prev", !Cell::kShared || (h && lengths), h_prev);
    dispatch(name, dtype, [&](auto element) {
      using Scalar = decltype(element);
      const StepForward<Scalar> p{B, H, t, pointer<const int64_t>(lengths), pointer<const bool>(resets),
                                  pointer<const Scalar>(bias_q), rows<const float>(gates_x), rows<const float>(gates_h),
                                  rows<const Scalar>(h_prev), rows<const float>(c_prev), rows<const float>(gates_reset),
                                  rows<const Scalar>(h_reset), rows<const float>(c_reset), rows<Scalar>(gates),
                                  rows<float>(c), rows<Scalar>(y), rows<Scalar>(h)};
      const bool vectors = vectors_fit(H, p.gates_x, p.gates_h, Rows<const Scalar>{p.bias_q, 0}, p.h_prev, p.c_prev,
                                       p.gates_reset, p.h_reset, p.c_reset, p.gates, p.c, p.y, p.h);
      launch_step(step_forward_kernel<Cell, Scalar, kVector>, step_forward_kernel<Cell, Scalar, 1>, vectors, op.device(), p);
    });
  });
}

void backward(int64_t mode, const OptionalTensor dy, const OptionalTensor product, const OptionalTensor dh,
              const OptionalTensor dc, const OptionalTensor gates, const OptionalTensor y, const OptionalTensor h_prev,
              const OptionalTensor c, const OptionalTensor c_prev, const OptionalTensor lengths, int64_t t,
              const OptionalTensor resets, const OptionalTensor resets_after, const OptionalTensor c_reset,
              const OptionalTensor dh_reset, const OptionalTensor dc_reset, const Tensor da, const OptionalTensor db) {
  const char* name = "step_backward";
  const Operation op(name, da);
  STD_TORCH_CHECK(da.dim() == 2, "rnnattn ", name, ": da: expected 2 dimensions [B, GH], got ", da.dim());
  const ScalarType dtype = da.scalar_type();
  with_cell(name, mode, [&](auto of) {
    using Cell = decltype(of);
    constexpr int64_t G = Cell::kGates, S = Cell::kSaved;
    const int64_t B = da.size(0), H = da.size(1) / G;
    op.check("dy", dy, dtype, {B, H});
    op.check("product", product, kFloat, {B, H});
    op.check("dh", dh, kFloat, {B, H});
    op.check("dc", dc, kFloat, {B, H});
    if (S > 0) op.check("gates", gates, dtype, {B, S * H});
    op.check("y", y, dtype, {B, H});
    op.check("h_prev", h_prev, dtype, {B, H});
    op.check("c", c, kFloat, {B, H});
    op.check("c_prev", c_prev, kFloat, {B, H});
    op.check_dense("lengths", lengths, ScalarType::Long, {B});
    op.check_dense("resets", resets, ScalarType::Bool, {B});
    op.check_dense("resets_after", resets_after, ScalarType::Bool, {B});
    op.check("c_reset", c_reset, kFloat, {B, H});
    op.check("dh_reset", dh_reset, kFloat, {B, H});
    op.check("dc_reset", dc_reset, kFloat, {B, H});
    op.check("da", da, dtype, {B, G * H});
    op.check("db", db, dtype, {B, G * H});
    require(name, mode, "gates", S > 0, gates);
    require(name, mode, "y", S == 0, y);
    require(name, mode, "h_prev", !Cell::kShared, h_prev);
    require(name, mode, "db", !Cell::kShared, db);
    require(name, mode, "dh", !Cell::kShared, dh);
    require(name, mode, "dc", Cell::kHasC, dc);
    require(name, mode, "c", Cell::kHasC, c);
    require(name, mode, "c_prev", Cell::kHasC, c_prev);
    dispatch(name, dtype, [&](auto element) {
      using Scalar = decltype(element);
      const StepBackward<Scalar> p{B, H, t, pointer<const int64_t>(lengths), pointer<const bool>(resets),
                                   pointer<const bool>(resets_after), rows<const Scalar>(dy), rows<const float>(product),
                                   rows<float>(dh), rows<float>(dc), rows<const Scalar>(gates), rows<const Scalar>(y),
                                   rows<const Scalar>(h_prev), rows<const float>(c), rows<const float>(c_prev),
                                   rows<const float>(c_reset), rows<float>(dh_reset), rows<float>(dc_reset),
                                   rows<Scalar>(da), rows<Scalar>(db)};
      const bool vectors = vectors_fit(H, p.dy, p.product, p.dh, p.dc, p.gates, p.y, p.h_prev, p.c, p.c_prev, p.c_reset,
                                       p.dh_reset, p.dc_reset, p.da, p.db);
      launch_step(step_backward_kernel<Cell, Scalar, kVector>, step_backward_kernel<Cell, Scalar, 1>, vectors,
                  op.device(), p);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(RNNATTN_LIBRARY, RNNATTN_DISPATCH_KEY, m) {
  m.impl("step_forward", TORCH_BOX(&forward));
  m.impl("step_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace rnnattn::cuda
