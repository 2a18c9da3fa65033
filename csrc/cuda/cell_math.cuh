// The arithmetic of one hidden unit, and of the online softmax: no memory, no threads.
#pragma once

#include <cmath>

namespace rnnattn::cuda {

__host__ __device__ inline float sigmoid(float a) { return 1.0f / (1.0f + expf(-a)); }

struct Gates {
  float i, f, g, o;
};

struct CellOutput {
  Gates gates;  // after the activation
  float c, h;
};

// a: the gates before the activation.
__host__ __device__ inline CellOutput cell_forward(Gates a, float c_prev) {
  const Gates s{sigmoid(a.i), sigmoid(a.f), tanhf(a.g), sigmoid(a.o)};
  const float c = s.f * c_prev + s.i * s.g;
  return {s, c, s.o * tanhf(c)};
}

struct CellGradient {
  Gates d_gates;  // before the activation
  float dc_prev;
};

// s: the gates after the activation; dh, dc: the gradients of h_t and c_t.
__host__ __device__ inline CellGradient cell_backward(Gates s, float c, float c_prev, float dh, float dc) {
  const float tanh_c = tanhf(c);
  const float dc_t = dc + dh * s.o * (1.0f - tanh_c * tanh_c);
  return {{dc_t * s.g * s.i * (1.0f - s.i), dc_t * c_prev * s.f * (1.0f - s.f), dc_t * s.i * (1.0f - s.g * s.g),
           dh * tanh_c * s.o * (1.0f - s.o)},
          dc_t * s.f};
}

// What sums taken relative to the maximum m are multiplied by once the maximum is m_new >= m.
// m = m_new = -inf (nothing kept so far) gives 1, where the exponential would be NaN.
__host__ __device__ inline float rescale(float m, float m_new) { return m == m_new ? 1.0f : expf(m - m_new); }

// exp(score - m); zero for a step that is not kept, whose score is -inf.
__host__ __device__ inline float softmax_weight(float score, float m) {
  return score == -INFINITY ? 0.0f : expf(score - m);
}

}  // namespace rnnattn::cuda
