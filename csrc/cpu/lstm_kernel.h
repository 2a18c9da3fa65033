// The pointwise part of an LSTM step, a row b at a time.
#pragma once

#include "../lstm.h"
#include "vec.h"

namespace {

template <typename F>
void lstm_forward(const rnnattn::LstmForwardStep<F>& s, int64_t b) {
  const int64_t H = s.H;
  F* a = s.gates + b * 4 * H;
  F* h = s.h + b * s.h_stride;
  const F* c_prev = s.c_prev + b * H;
  F* c = s.c + b * H;
  if (s.lengths && s.t >= s.lengths[b]) {
    std::memset(a, 0, 4 * H * sizeof(F));
    std::memset(h, 0, H * sizeof(F));
    std::memmove(c, c_prev, H * sizeof(F));
    return;
  }
  for_lanes<F>(0, H, [&](int64_t u, int64_t n) {
    const auto get = [&](const F* p) { return load(p + u, n); };
    const auto put = [&](F* p, Vec<F> v) { store<F>(p + u, v, n); };
    const Vec<F> i = sigmoid(get(a)), f = sigmoid(get(a + H));
    const Vec<F> g = tanh(get(a + 2 * H)), o = sigmoid(get(a + 3 * H));
    const Vec<F> c_t = f * get(c_prev) + i * g;
    put(a, i);
    put(a + H, f);
    put(a + 2 * H, g);
    put(a + 3 * H, o);
    put(c, c_t);
    put(h, o * tanh(c_t));
  });
}

template <typename F>
void lstm_backward(const rnnattn::LstmBackwardStep<F>& s, int64_t b) {
  const int64_t H = s.H;
  F* d = s.d_gates + b * 4 * H;
  if (s.lengths && s.t >= s.lengths[b]) {
    std::memset(d, 0, 4 * H * sizeof(F));
    return;
  }
  const F* gates = s.gates + b * 4 * H;
  const F *dh_row = s.dh + b * H, *c = s.c + b * H, *c_prev = s.c_prev + b * H;
  const F* dy = s.dy ? s.dy + b * s.dy_stride : nullptr;
  F* dc = s.dc + b * H;
  for_lanes<F>(0, H, [&](int64_t u, int64_t n) {
    const auto get = [&](const F* p) { return load(p + u, n); };
    const auto put = [&](F* p, Vec<F> v) { store<F>(p + u, v, n); };
    const Vec<F> i = get(gates), f = get(gates + H), g = get(gates + 2 * H), o = get(gates + 3 * H);
    const Vec<F> tanh_c = tanh(get(c));
    const Vec<F> dh = dy ? get(dh_row) + get(dy) : get(dh_row);
    const Vec<F> dc_t = get(dc) + dh * o * (F(1) - tanh_c * tanh_c);
    put(d, dc_t * g * i * (F(1) - i));
    put(d + H, dc_t * get(c_prev) * f * (F(1) - f));
    put(d + 2 * H, dc_t * i * (F(1) - g * g));
    put(d + 3 * H, dh * tanh_c * o * (F(1) - o));
    put(dc, dc_t * f);
  });
}

}  // namespace
