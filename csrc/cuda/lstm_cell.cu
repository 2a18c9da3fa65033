// Launchers of lstm_cell_kernel.cuh: rnnattn_native::lstm_cell_forward and lstm_cell_backward.
#include "launch.h"
//
#include "lstm_cell_kernel.cuh"

namespace rnnattn::cuda {
namespace {

constexpr int kVector = 4;
constexpr unsigned kThreads = 128;

// Starts the kernel made for vectors where every row allows them, else the one for single units.
template <typename Params>
void launch_cell(void (*vector)(Params), void (*single)(Params), bool vectors, int device, const Params& p) {
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

void forward(const Tensor gates_x, const Tensor gates_h, const Tensor c_prev, const OptionalTensor h_prev,
             const OptionalTensor lengths, int64_t t, const OptionalTensor gates, const Tensor c, const Tensor y,
             const OptionalTensor h) {
  const char* name = "lstm_cell_forward";
  const Operation op(name, gates_x);
  STD_TORCH_CHECK(y.dim() == 2, "rnnattn ", name, ": y: expected 2 dimensions [B, H], got ", y.dim());
  const int64_t B = y.size(0), H = y.size(1);
  const ScalarType dtype = y.scalar_type();
  op.check("gates_x", gates_x, ScalarType::Float, {B, 4 * H});
  op.check("gates_h", gates_h, ScalarType::Float, {B, 4 * H});
  op.check("c_prev", c_prev, ScalarType::Float, {B, H});
  op.check("h_prev", h_prev, dtype, {B, H});
  op.check_dense("lengths", lengths, ScalarType::Long, {B});
  op.check("gates", gates, dtype, {B, 4 * H});
  op.check("c", c, ScalarType::Float, {B, H});
  op.check("y", y, dtype, {B, H});
  op.check("h", h, dtype, {B, H});
  STD_TORCH_CHECK(!h || !lengths || h_prev, "rnnattn ", name,
                  ": h_prev: expected a tensor with h and lengths, got None");
  dispatch(name, dtype, [&](auto element) {
    using Scalar = decltype(element);
    const LstmCellForward<Scalar> p{B, H, t, pointer<const int64_t>(lengths), rows<const float>(gates_x),
                               rows<const float>(gates_h), rows<const float>(c_prev), rows<const Scalar>(h_prev),
                               rows<Scalar>(gates), rows<float>(c), rows<Scalar>(y), rows<Scalar>(h)};
    const bool vectors = vectors_fit(H, p.gates_x, p.gates_h, p.c_prev, p.h_prev, p.gates, p.c, p.y, p.h);
    launch_cell(lstm_cell_forward_kernel<Scalar, kVector>, lstm_cell_forward_kernel<Scalar, 1>, vectors, op.device(),
                p);
  });
}

void backward(const Tensor dh, const Tensor dc, const Tensor gates, const Tensor c, const Tensor c_prev,
              const OptionalTensor lengths, int64_t t, const Tensor d_gates) {
  const char* name = "lstm_cell_backward";
  const Operation op(name, dh);
  STD_TORCH_CHECK(dh.dim() == 2, "rnnattn ", name, ": dh: expected 2 dimensions [B, H], got ", dh.dim());
  const int64_t B = dh.size(0), H = dh.size(1);
  const ScalarType dtype = gates.scalar_type();
  op.check("dh", dh, ScalarType::Float, {B, H});
  op.check("dc", dc, ScalarType::Float, {B, H});
  op.check("gates", gates, dtype, {B, 4 * H});
  op.check("c", c, ScalarType::Float, {B, H});
  op.check("c_prev", c_prev, ScalarType::Float, {B, H});
  op.check_dense("lengths", lengths, ScalarType::Long, {B});
  op.check("d_gates", d_gates, dtype, {B, 4 * H});
  dispatch(name, dtype, [&](auto element) {
    using Scalar = decltype(element);
    const LstmCellBackward<Scalar> p{B, H, t, pointer<const int64_t>(lengths), rows<const float>(dh), rows<float>(dc),
                                rows<const Scalar>(gates), rows<const float>(c), rows<const float>(c_prev),
                                rows<Scalar>(d_gates)};
    const bool vectors = vectors_fit(H, p.dh, p.dc, p.gates, p.c, p.c_prev, p.d_gates);
    launch_cell(lstm_cell_backward_kernel<Scalar, kVector>, lstm_cell_backward_kernel<Scalar, 1>, vectors,
                op.device(), p);
  });
}

STABLE_TORCH_LIBRARY_IMPL(RNNATTN_LIBRARY, RNNATTN_DISPATCH_KEY, m) {
  m.impl("lstm_cell_forward", TORCH_BOX(&forward));
  m.impl("lstm_cell_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace rnnattn::cuda
