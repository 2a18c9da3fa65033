// The operators of the CUDA sources; csrc/ops.cpp defines them in rnnattn_native. Outputs are the caller's.
// Shapes: rnnattn/backends/stepwise.py (step_*), regularised_step.h (regularised_*), attention_pool.h (the rest).
#pragma once

namespace rnnattn::cuda {

inline constexpr const char* kCudaSchemas[] = {
    "step_forward(int mode, Tensor gates_x, Tensor gates_h, Tensor? bias_q, Tensor? h_prev, Tensor? c_prev, "
    "Tensor? lengths, int t, Tensor? resets, Tensor? gates_reset, Tensor? h_reset, Tensor? c_reset, "
    "Tensor(a!)? gates, Tensor(b!)? c, Tensor(c!) y, Tensor(d!)? h) -> ()",
    "step_backward(int mode, Tensor? dy, Tensor? product, Tensor(a!)? dh, Tensor(b!)? dc, Tensor? gates, Tensor? y, "
    "Tensor? h_prev, Tensor? c, Tensor? c_prev, Tensor? lengths, int t, Tensor? resets, Tensor? resets_after, "
    "Tensor? c_reset, Tensor(c!)? dh_reset, Tensor(d!)? dc_reset, Tensor(e!) da, Tensor(f!)? db) -> ()",
    "regularised_forward(int mode, Tensor a, Tensor product, Tensor? b_hh, Tensor? norm_hh, Tensor? norm_c, "
    "Tensor? bias_c, Tensor? h_mask, Tensor? keep_h, Tensor? keep_c, float zoneout_h, float zoneout_c, "
    "Tensor? lengths, int t, Tensor? resets_next, Tensor? h_reset, Tensor? c_reset, Tensor(a!) h, Tensor(b!)? c, "
    "Tensor(c!) operand, Tensor(d!) y, Tensor(e!)? cells, Tensor(f!)? gates, Tensor(g!)? hidden, "
    "Tensor(h!)? rstd) -> ()",
    "regularised_backward(int mode, Tensor? dy, Tensor? dcells, Tensor? product, Tensor(a!) dh, Tensor(b!)? dc, "
    "Tensor h_prev, Tensor? c_prev, Tensor gates, Tensor? hidden, Tensor? rstd, Tensor? norm_hh, Tensor? norm_c, "
    "Tensor? bias_c, Tensor? h_mask, Tensor? keep_h, Tensor? keep_c, float zoneout_h, float zoneout_c, "
    "Tensor? lengths, int t, Tensor? resets_after, Tensor(c!)? dh_reset, Tensor(d!)? dc_reset, Tensor(e!)? d_norm_c, "
    "Tensor(f!)? d_bias_c, Tensor(g!) da, Tensor(h!)? db, Tensor(i!)? d_hidden) -> ()",
    "softmax_pool_forward(Tensor x, Tensor? v, Tensor? lengths, Tensor? mask, Tensor(a!)? scores, Tensor(b!) partial, "
    "Tensor(c!) partial_m, Tensor(d!) partial_sum, Tensor(e!) pooled, Tensor(f!) lse, Tensor(g!)? weights) -> ()",
    "linear_pool_backward(Tensor x, Tensor v, Tensor? lengths, Tensor? mask, Tensor d_pooled, Tensor? d_weights, "
    "Tensor delta, Tensor lse, Tensor(a!) dx, Tensor(b!) dv) -> ()",
    "additive_scores(Tensor x, Tensor w, Tensor? b, Tensor v, Tensor? lengths, Tensor? mask, Tensor(a!) scores) -> ()",
    "additive_pool_backward(Tensor product, Tensor x, Tensor v, Tensor? b, Tensor? keep, Tensor d_pooled, "
    "Tensor? d_weights, Tensor delta, Tensor lse, Tensor(a!) du, Tensor(b!) p, Tensor(c!) dv, Tensor(d!) db) -> ()",
};

}  // namespace rnnattn::cuda
