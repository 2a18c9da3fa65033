// The arithmetic of one hidden unit of each cell, and of the online softmax: no memory, no threads.
#pragma once

#include <cmath>

namespace rnnattn::cuda {

__host__ __device__ inline float sigmoid(float a) { return 1.0f / (1.0f + expf(-a)); }

// Of a unit, by gate: the sums a of the input product and b of the hidden one, what a step saves, and gradients of a
// and b. A cell uses as many as it has.
struct Gates {
  float at[4] = {};
};

// What a step starts from, or their gradients; RNN has no use for h_prev, and only LSTM has c.
struct States {
  float h = 0, c = 0;
};

struct StepOutput {
  Gates saved;
  States next;
};

struct StepGradient {
  Gates da, db;
  States previous;  // of h what does not pass through the hidden product
};

// Gates i, f, g, o; saved after the activation.
struct Lstm {
  static constexpr int kGates = 4, kSaved = 4;
  static constexpr bool kHasC = true, kShared = true;  // kShared: db is da

  __host__ __device__ static StepOutput forward(const Gates& a, const Gates& b, States before) {
    const float i = sigmoid(a.at[0] + b.at[0]), f = sigmoid(a.at[1] + b.at[1]), g = tanhf(a.at[2] + b.at[2]),
                o = sigmoid(a.at[3] + b.at[3]), c = f * before.c + i * g;
    return {{{i, f, g, o}}, {o * tanhf(c), c}};
  }

  // here: h_t and c_t; d: their gradients.
  __host__ __device__ static StepGradient backward(const Gates& saved, States before, States here, States d) {
    const float o = saved.at[3], tanh_c = tanhf(here.c);
    return backward_of_gates(saved, before, tanh_c, {d.h, d.c + d.h * o * (1.0f - tanh_c * tanh_c)});
  }

  // h_t = o * tanh_c; d.c: all of the gradient of c_t, what comes by way of tanh_c too.
  __host__ __device__ static StepGradient backward_of_gates(const Gates& saved, States before, float tanh_c, States d) {
    const auto& [i, f, g, o] = saved.at;
    return {{{d.c * g * i * (1.0f - i), d.c * before.c * f * (1.0f - f), d.c * i * (1.0f - g * g), d.h * tanh_c * o * (1.0f - o)}},
            {},
            {0.0f, d.c * f}};
  }
};

// Gates r, z, n; saved r, z, n and q = b_n, which stands inside r * q.
struct Gru {
  static constexpr int kGates = 3, kSaved = 4;
  static constexpr bool kHasC = false, kShared = false;

  __host__ __device__ static StepOutput forward(const Gates& a, const Gates& b, States before) {
    const float r = sigmoid(a.at[0] + b.at[0]), z = sigmoid(a.at[1] + b.at[1]), q = b.at[2], n = tanhf(a.at[2] + r * q);
    return {{{r, z, n, q}}, {(1.0f - z) * n + z * before.h, 0.0f}};
  }

  __host__ __device__ static StepGradient backward(const Gates& saved, States before, States, States d) {
    const auto& [r, z, n, q] = saved.at;
    const float dn = d.h * (1.0f - z) * (1.0f - n * n), dr = dn * q * r * (1.0f - r),
                dz = d.h * (before.h - n) * z * (1.0f - z);
    return {{{dr, dz, dn}}, {{dr, dz, dn * r}}, {d.h * z, 0.0f}};
  }
};

template <bool kRelu>
struct Rnn {
  static constexpr int kGates = 1, kSaved = 0;
  static constexpr bool kHasC = false, kShared = true;

  __host__ __device__ static StepOutput forward(const Gates& a, const Gates& b, States) {
    const float s = a.at[0] + b.at[0];
    return {{}, {kRelu ? (s < 0.0f ? 0.0f : s) : tanhf(s), 0.0f}};  // a NaN stays one
  }

  __host__ __device__ static StepGradient backward(const Gates&, States, States here, States d) {
    return {{{kRelu ? (here.h > 0.0f ? d.h : 0.0f) : d.h * (1.0f - here.h * here.h)}}, {}, {}};
  }
};

// What sums taken relative to the maximum m are multiplied by once the maximum is m_new >= m.
// m = m_new = -inf (nothing kept so far) gives 1, where the exponential would be NaN.
__host__ __device__ inline float rescale(float m, float m_new) { return m == m_new ? 1.0f : expf(m - m_new); }

// exp(score - m); zero for a step that is not kept, whose score is -inf.
__host__ __device__ inline float softmax_weight(float score, float m) {
  return score == -INFINITY ? 0.0f : expf(score - m);
}

}  // namespace rnnattn::cuda
