// Launchers of the pooling kernels: the operators of schemas.h from softmax_pool_forward on.
#include "launch.h"
//
#include "additive_backward_kernel.cuh"
#include "additive_scores_kernel.cuh"
#include "attention_pool_kernel.cuh"

namespace rnnattn::cuda {
namespace {

Keep checked_keep(const Operation& op, const OptionalTensor& lengths, const OptionalTensor& mask, int64_t B,
                  int64_t T) {
  op.check_dense("lengths", lengths, ScalarType::Long, {B});
  op.check("mask", mask, ScalarType::Bool, {B, T});
  return {pointer<const int64_t>(lengths), pointer<const bool>(mask), mask ? mask->stride(0) : 0};
}

template <typename Scalar>
Sequence<Scalar> sequence(const Tensor& x) {
  return {static_cast<const Scalar*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

// Whether vectors of N elements never straddle, neither in x nor in the contiguous arrays of `width` beside it.
template <int N, typename Scalar, typename... Array>
bool vectors_fit(const Sequence<Scalar>& x, std::initializer_list<int64_t> widths, const Array*... arrays) {
  bool fit = aligned(Rows<const Scalar>{x.data, x.stride_b}, N * sizeof(Scalar)) && x.stride_t % N == 0;
  for (const int64_t width : widths) fit = fit && width % N == 0;
  return fit && (aligned(Rows<const Array>{arrays, 0}, N * sizeof(Array)) && ...);
}

// Blocks side by side for the columns of a kernel laid out as `Columns<N>`.
unsigned column_blocks(int64_t columns, int N) {
  return static_cast<unsigned>(ceil_div(columns, int64_t{kPoolThreads} * N));
}

void check_sequence(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "rnnattn ", name,
                  ": x: expected 3 dimensions [B, T, D] with D > 0, got ", x.dim(), " dimensions");
}

void softmax_pool_forward(const Tensor x, const OptionalTensor v, const OptionalTensor lengths,
                          const OptionalTensor mask, const OptionalTensor scores, const Tensor partial,
                          const Tensor partial_m, const Tensor partial_sum, const Tensor pooled, const Tensor lse,
                          const OptionalTensor weights) {
  const char* name = "softmax_pool_forward";
  const Operation op(name, x);
  check_sequence(name, x);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2), S = partial.dim() == 3 ? partial.size(1) : 1;
  const ScalarType dtype = x.scalar_type();
  op.check("x", x, dtype, {B, T, D});
  op.check_dense("v", v, dtype, {D});
  const Keep keep = checked_keep(op, lengths, mask, B, T);
  op.check_dense("scores", scores, kFloat, {B, T});
  op.check_dense("partial", partial, kFloat, {B, S, D});
  op.check_dense("partial_m", partial_m, kFloat, {B, S});
  op.check_dense("partial_sum", partial_sum, kFloat, {B, S});
  op.check_dense("pooled", pooled, kFloat, {B, D});
  op.check_dense("lse", lse, kFloat, {B});
  op.check_dense("weights", weights, dtype, {B, T});
  STD_TORCH_CHECK(S > 0, "rnnattn ", name, ": partial: expected at least one part, got shape[1] = ", S);
  STD_TORCH_CHECK(scores || (v && !weights), "rnnattn ", name,
                  ": scores: expected a tensor without v, or with weights, got None");
  if (B == 0) return;
  dispatch(name, dtype, [&](auto element) {
    using Scalar = decltype(element);
    constexpr int N = 16 / sizeof(Scalar);
    const PoolForward<Scalar> p{B, T, D, S, sequence<Scalar>(x), keep, pointer<const Scalar>(v), pointer<float>(scores),
                                pointer<float>(partial), pointer<float>(partial_m), pointer<float>(partial_sum)};
    const bool vectors = vectors_fit<N>(p.x, {D}, p.v) && vectors_fit<4>(p.x, {D}, p.partial);
    const dim3 grid(static_cast<unsigned>(B * S), column_blocks(D, vectors ? N : 1));
    launch(vectors ? pool_forward_kernel<Scalar, N> : pool_forward_kernel<Scalar, 1>, grid, dim3(kPoolThreads),
           op.device(), p);
    const PoolCombine<Scalar> joined{B, T, D, S, p.partial, p.partial_m, p.partial_sum, p.scores,
                                     pointer<float>(pooled), pointer<float>(lse), pointer<Scalar>(weights)};
    launch(pool_combine_kernel<Scalar>, dim3(static_cast<unsigned>(B), column_blocks(D, 1)), dim3(kPoolThreads),
           op.device(), joined);
  });
}

void linear_pool_backward(const Tensor x, const Tensor v, const OptionalTensor lengths, const OptionalTensor mask,
                          const Tensor d_pooled, const OptionalTensor d_weights, const Tensor delta, const Tensor lse,
                          const Tensor dx, const Tensor dv) {
  const char* name = "linear_pool_backward";
  const Operation op(name, x);
  check_sequence(name, x);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2), P = dv.dim() == 2 ? dv.size(0) : 1;
  const ScalarType dtype = x.scalar_type();
  op.check("x", x, dtype, {B, T, D});
  op.check_dense("v", v, dtype, {D});
  const Keep keep = checked_keep(op, lengths, mask, B, T);
  op.check_dense("d_pooled", d_pooled, kFloat, {B, D});
  op.check_dense("d_weights", d_weights, kFloat, {B, T});
  op.check_dense("delta", delta, kFloat, {B});
  op.check_dense("lse", lse, kFloat, {B});
  op.check_dense("dx", dx, dtype, {B, T, D});
  op.check_dense("dv", dv, kFloat, {P, D});
  if (P == 0) return;
  dispatch(name, dtype, [&](auto element) {
    using Scalar = decltype(element);
    constexpr int N = 16 / sizeof(Scalar);
    const LinearPoolBackward<Scalar> p{B, T, D, P, sequence<Scalar>(x), keep, pointer<const Scalar>(v),
                                       pointer<const float>(d_pooled), pointer<const float>(d_weights),
                                       pointer<const float>(delta), pointer<const float>(lse), pointer<Scalar>(dx),
                                       pointer<float>(dv)};
    const bool vectors = vectors_fit<N>(p.x, {D}, p.v, p.d_pooled, p.dx, p.dv);
    const dim3 grid(static_cast<unsigned>(P), column_blocks(D, vectors ? N : 1));
    launch(vectors ? linear_pool_backward_kernel<Scalar, N> : linear_pool_backward_kernel<Scalar, 1>, grid,
           dim3(kPoolThreads), op.device(), p);
  });
}

void additive_scores(const Tensor x, const Tensor w, const OptionalTensor b, const Tensor v,
                     const OptionalTensor lengths, const OptionalTensor mask, const Tensor scores) {
  const char* name = "additive_scores";
  const Operation op(name, x);
  check_sequence(name, x);
  STD_TORCH_CHECK(w.dim() == 2, "rnnattn ", name, ": w: expected 2 dimensions [A, D], got ", w.dim());
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2), A = w.size(0);
  const ScalarType dtype = x.scalar_type();
  op.check("x", x, dtype, {B, T, D});
  op.check_dense("w", w, dtype, {A, D});
  op.check_dense("b", b, dtype, {A});
  op.check_dense("v", v, dtype, {A});
  const Keep keep = checked_keep(op, lengths, mask, B, T);
  op.check_dense("scores", scores, kFloat, {B, T});
  if (B * T == 0) return;
  dispatch(name, dtype, [&](auto element) {
    using Scalar = decltype(element);
    constexpr int N = 16 / sizeof(Scalar);
    const AdditiveScores<Scalar> p{B, T, D, A, sequence<Scalar>(x), keep, pointer<const Scalar>(w),
                                   pointer<const Scalar>(b), pointer<const Scalar>(v), pointer<float>(scores)};
    const dim3 grid(static_cast<unsigned>(ceil_div(B * T, kTileRows)));
    const bool vectors = vectors_fit<N>(p.x, {D}, p.w);
    launch(vectors ? additive_scores_kernel<Scalar, N> : additive_scores_kernel<Scalar, 1>, grid, dim3(kTileThreads),
           op.device(), p);
  });
}

void additive_pool_backward(const Tensor product, const Tensor x, const Tensor v, const OptionalTensor b,
                            const OptionalTensor keep, const Tensor d_pooled, const OptionalTensor d_weights,
                            const Tensor delta, const Tensor lse, const Tensor du, const Tensor p, const Tensor dv,
                            const Tensor db) {
  const char* name = "additive_pool_backward";
  const Operation op(name, x);
  check_sequence(name, x);
  STD_TORCH_CHECK(dv.dim() == 2, "rnnattn ", name, ": dv: expected 2 dimensions [P, A], got ", dv.dim());
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2), P = dv.size(0), A = dv.size(1);
  const ScalarType dtype = x.scalar_type();
  op.check_dense("product", product, kFloat, {B, T, A});
  op.check_dense("x", x, dtype, {B, T, D});
  op.check_dense("v", v, dtype, {A});
  op.check_dense("b", b, dtype, {A});
  op.check_dense("keep", keep, ScalarType::Bool, {B, T});
  op.check_dense("d_pooled", d_pooled, kFloat, {B, D});
  op.check_dense("d_weights", d_weights, kFloat, {B, T});
  op.check_dense("delta", delta, kFloat, {B});
  op.check_dense("lse", lse, kFloat, {B});
  op.check_dense("du", du, dtype, {B, T, A});
  op.check_dense("p", p, kFloat, {B, T});
  op.check_dense("dv", dv, kFloat, {P, A});
  op.check_dense("db", db, kFloat, {P, A});
  if (P == 0 || A == 0) return;
  dispatch(name, dtype, [&](auto element) {
    using Scalar = decltype(element);
    constexpr int N = 4;
    const AdditiveBackward<Scalar> a{B, T, D, A, P, pointer<const float>(product), pointer<const Scalar>(x),
                                     pointer<const Scalar>(v), pointer<const Scalar>(b), pointer<const bool>(keep),
                                     pointer<const float>(d_pooled), pointer<const float>(d_weights),
                                     pointer<const float>(delta), pointer<const float>(lse), pointer<Scalar>(du),
                                     pointer<float>(p), pointer<float>(dv), pointer<float>(db)};
    const bool vectors = vectors_fit<N>(sequence<Scalar>(x), {D, A}, a.product, a.v, a.b, a.d_pooled, a.du, a.dv, a.db);
    const dim3 grid(static_cast<unsigned>(P), column_blocks(A, vectors ? N : 1));
    launch(vectors ? additive_backward_kernel<Scalar, N> : additive_backward_kernel<Scalar, 1>, grid,
           dim3(kPoolThreads), op.device(), a);
  });
}

STABLE_TORCH_LIBRARY_IMPL(RNNATTN_LIBRARY, RNNATTN_DISPATCH_KEY, m) {
  m.impl("softmax_pool_forward", TORCH_BOX(&softmax_pool_forward));
  m.impl("linear_pool_backward", TORCH_BOX(&linear_pool_backward));
  m.impl("additive_scores", TORCH_BOX(&additive_scores));
  m.impl("additive_pool_backward", TORCH_BOX(&additive_pool_backward));
}

}  // namespace
}  // namespace rnnattn::cuda
