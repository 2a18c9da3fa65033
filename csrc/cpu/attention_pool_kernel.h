// Attention pooling over one tile of steps; tiles are small enough to stay in the first cache.
#pragma once

#include "../attention_pool.h"
#include "vec.h"

namespace {

// s[r] = x[r] . v for every step r of the tile.
template <typename F>
void pool_dot(const rnnattn::PoolTile<F>& tile, const F* v, F* s) {
  const int64_t step = 4 * kLanes<F>, D = tile.D;
  for (int64_t r = 0; r < tile.steps; ++r) {
    const F* x = tile.x + r * tile.x_stride;
    Vec<F> sum[4] = {};  // four chains hide the latency of the multiply-add
    int64_t d = 0;
    for (; d + step <= D; d += step)
      for (int k = 0; k < 4; ++k) sum[k] += load(x + d + k * kLanes<F>) * load(v + d + k * kLanes<F>);
    for (; d + kLanes<F> <= D; d += kLanes<F>) sum[0] += load(x + d) * load(v + d);
    if (d < D) sum[1] += load(x + d, D - d) * load(v + d, D - d);
    s[r] = total<F>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// out[d] += sum_r weights[r] x[r][d]
template <typename F>
void pool_add(const rnnattn::PoolTile<F>& tile, const F* weights, F* out) {
  const int64_t D = tile.D;
  int64_t d = 0;
  for (; d + 4 * kLanes<F> <= D; d += 4 * kLanes<F>) {
    Vec<F> sum[4];
    for (int k = 0; k < 4; ++k) sum[k] = load(out + d + k * kLanes<F>);
    for (int64_t r = 0; r < tile.steps; ++r)
      for (int k = 0; k < 4; ++k) sum[k] += weights[r] * load(tile.x + r * tile.x_stride + d + k * kLanes<F>);
    for (int k = 0; k < 4; ++k) store<F>(out + d + k * kLanes<F>, sum[k]);
  }
  for_lanes<F>(d, D, [&](int64_t k, int64_t n) {
    Vec<F> sum = load(out + k, n);
    for (int64_t r = 0; r < tile.steps; ++r) sum += weights[r] * load(tile.x + r * tile.x_stride + k, n);
    store<F>(out + k, sum, n);
  });
}

// Takes the tile's scores into the running softmax of the row.
template <typename F>
void pool_softmax(const rnnattn::PoolTile<F>& tile, const F* s, F* p, rnnattn::PoolState<F>& state) {
  F max = state.max;
  for (int64_t r = 0; r < tile.steps; ++r) max = s[r] > max || s[r] != s[r] ? s[r] : max;  // NaN wins
  const F scale = state.sum > 0 ? std::exp(state.max - max) : F(0);
  if (max != state.max)
    for (int64_t d = 0; d < tile.D; ++d) state.acc[d] *= scale;
  F sum = state.sum * scale;
  for (int64_t r = 0; r < tile.steps; ++r) sum += p[r] = std::exp(s[r] - max);
  state.max = max;
  state.sum = sum;
  pool_add(tile, p, state.acc);
}

// dx[r] = p[r] g + ds[r] v;  g or v may be null, for zero.
template <typename F>
void pool_outer(const rnnattn::PoolTile<F>& tile, const F* p, const F* g, const F* ds, const F* v, F* dx, int64_t dx_stride) {
  for (int64_t r = 0; r < tile.steps; ++r) {
    F* out = dx + r * dx_stride;
    for (int64_t d = 0; d < tile.D; ++d) out[d] = (g ? p[r] * g[d] : F(0)) + (v ? ds[r] * v[d] : F(0));
  }
}

template <typename F>
void additive_scores(const rnnattn::AdditiveScores<F>& a) {
  for (int64_t r = 0; r < a.steps; ++r) {
    F* u = a.u + r * a.A;
    Vec<F> sum{};
    for_lanes<F>(0, a.A, [&](int64_t k, int64_t n) {
      Vec<F> t = load(u + k, n);
      if (a.b) t += load(a.b + k, n);
      t = tanh(t);
      store<F>(u + k, t, n);
      sum += t * load(a.v + k, n);
    });
    a.s[r] = total<F>(sum);
  }
}

template <typename F>
void additive_gradient(const rnnattn::AdditiveGradient<F>& a) {
  for_lanes<F>(0, a.A, [&](int64_t k, int64_t n) {
    const Vec<F> v = load(a.v + k, n);
    Vec<F> dv = load(a.dv + k, n), db = load(a.db + k, n);
    for (int64_t r = 0; r < a.steps; ++r) {
      F* row = a.u + r * a.A + k;
      const Vec<F> u = load(row, n);
      const Vec<F> du = a.ds[r] * v * (F(1) - u * u);
      dv += a.ds[r] * u;
      db += du;
      store<F>(row, du, n);
    }
    store<F>(a.dv + k, dv, n);
    store<F>(a.db + k, db, n);
  });
}

}  // namespace
