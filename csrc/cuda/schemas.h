// The operators of the CUDA sources; csrc/ops.cpp defines them in rnnattn_native. Outputs are the caller's.
// Shapes: rnnattn/backends/stepwise.py (step_*), attention_pool.h (the rest).
#pragma once

namespace rnnattn::cuda {

inline constexpr const char* kCudaSchemas[] = {
    "step_forward(int mode, Tensor gates_x, Tensor gates_h, Tensor? bias_q, Tensor? h_prev, Tensor? c_prev, "
    "Tensor? lengths, int t, Tensor? resets, Tensor? gates_reset, Tensor? h_reset, Tensor? c_reset, "
    "Tensor(a!)? gates, Tensor(b!)? c, Tensor(c!) y, Tensor(d!)? h) -> ()",
    "step_backward(int mode, Tensor? dy, Tensor? product, Tensor(a!)? dh, Tensor(b!)? dc, Tensor? gates, Tensor? y, "
    "Tensor? h_prev, Tensor? c, Tensor? c_prev, Tensor? lengths, int t, Tensor? resets, Tensor? resets_after, "
    "Tensor? c_reset, Tensor(c!)? dh_reset, Tensor(d!)? dc_reset, Tensor(e!) da, Tensor(f!)? db) -> ()",
    "softmax_pool_forward(Tensor x, Tensor? v, Tensor? lengths, Tensor? mask, Tensor(a!)? scores, Tensor(b!) partial, "
    "Tensor(c!) partial_m, Tensor(d!) partial_sum, Tensor(e!) pooled, Tensor(f!) lse, Tensor(g!)? weights) -> ()",
    "linear_pool_backward(Tensor x, Tensor v, Tensor? lengths, Tensor? mask, Tensor d_pooled, Tensor? d_weights, "
    "Tensor delta, Tensor lse, Tensor(a!) dx, Tensor(b!) dv) -> ()",
    "additive_scores(Tensor x, Tensor w, Tensor? b, Tensor v, Tensor? lengths, Tensor? mask, Tensor(a!) scores) -> ()",
    "additive_pool_backward(Tensor product, Tensor x, Tensor v, Tensor? b, Tensor? keep, Tensor d_pooled, "
    "Tensor? d_weights, Tensor delta, Tensor lse, Tensor(a!) du, Tensor(b!) p, Tensor(c!) dv, Tensor(d!) db) -> ()",
};

}  // namespace rnnattn::cuda
