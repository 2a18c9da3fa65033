// Attention pooling over one tile of steps; tiles are small enough to stay in the first cache.
#pragma once

#include "../attention_pool.h"
#include "vec.h"

namespace {

// s[0..R) = x[0..R) . v, R rows at a time: the rows share the loads of v, and their separate sums hide
// the latency of the multiply-add.
template <int R, typename F>
inline void dot_rows(const F* x, int64_t stride, int64_t D, const F* v, F* s) {
  Vec<F> sum[R][2] = {};
  int64_t d = 0;
  for (; d + 2 * kLanes<F> <= D; d += 2 * kLanes<F>)
    for (int k = 0; k < 2; ++k) {
      const Vec<F> v_d = load(v + d + k * kLanes<F>);
      for (int r = 0; r < R; ++r) sum[r][k] += load(x + r * stride + d + k * kLanes<F>) * v_d;
    }
  for_lanes<F>(d, D, [&](int64_t k, int64_t n) {
    const Vec<F> v_k = load(v + k, n);
    for (int r = 0; r < R; ++r) sum[r][0] += load(x + r * stride + k, n) * v_k;
  });
  for (int r = 0; r < R; ++r) s[r] = total<F>(sum[r][0] + sum[r][1]);
}

// s[r] = x[r] . v for every step r of the tile.
template <typename F>
void pool_dot(const rnnattn::PoolTile<F>& tile, const F* v, F* s) {
  int64_t r = 0;
  for (; r + 4 <= tile.steps; r += 4) dot_rows<4>(tile.x + r * tile.x_stride, tile.x_stride, tile.D, v, s + r);
  for (; r < tile.steps; ++r) dot_rows<1>(tile.x + r * tile.x_stride, tile.x_stride, tile.D, v, s + r);
}

// p[r] = exp(s[r] - shift), and their sum.
template <typename F>
F pool_exp(int64_t steps, const F* s, F shift, F* p) {
  for_lanes<F>(0, steps, [&](int64_t k, int64_t n) { store<F>(p + k, exp(load(s + k, n) - shift), n); });
  F sum = 0;
  for (int64_t r = 0; r < steps; ++r) sum += p[r];
  return sum;
}

// out[d] += sum_r weights[r] x[r][d], for at most eight steps: more would be too many lines at the same
// place of the first cache. They are in cache by then, so that memory would be idle: the steps that
// follow are fetched meanwhile (where none follow, a prefetch does nothing).
template <typename F>
inline void add_steps(const rnnattn::PoolTile<F>& tile, const F* weights, F* out) {
  const int64_t D = tile.D;
  const F* next = tile.x + tile.steps * tile.x_stride;
  int64_t d = 0;
  for (; d + 4 * kLanes<F> <= D; d += 4 * kLanes<F>) {
    Vec<F> sum[4];
    for (int k = 0; k < 4; ++k) sum[k] = load(out + d + k * kLanes<F>);
    for (int64_t r = 0; r < tile.steps; ++r)
      for (int k = 0; k < 4; ++k) {
        sum[k] += weights[r] * load(tile.x + r * tile.x_stride + d + k * kLanes<F>);
        __builtin_prefetch(next + r * tile.x_stride + d + k * kLanes<F>);
      }
    for (int k = 0; k < 4; ++k) store<F>(out + d + k * kLanes<F>, sum[k]);
  }
  for_lanes<F>(d, D, [&](int64_t k, int64_t n) {
    Vec<F> sum = load(out + k, n);
    for (int64_t r = 0; r < tile.steps; ++r) sum += weights[r] * load(tile.x + r * tile.x_stride + k, n);
    store<F>(out + k, sum, n);
  });
}

// The same for any number of steps.
template <typename F>
void pool_add(const rnnattn::PoolTile<F>& tile, const F* weights, F* out) {
  for (int64_t r = 0; r < tile.steps; r += 8) {
    const int64_t steps = tile.steps - r < 8 ? tile.steps - r : 8;
    add_steps<F>({steps, tile.D, tile.x + r * tile.x_stride, tile.x_stride}, weights + r, out);
  }
}

// Takes the tile's scores into the running softmax of the row.
template <typename F>
void pool_softmax(const rnnattn::PoolTile<F>& tile, const F* s, F* p, rnnattn::PoolState<F>& state) {
  F max = state.max;
  for (int64_t r = 0; r < tile.steps; ++r) max = s[r] > max || s[r] != s[r] ? s[r] : max;  // NaN wins
  const F scale = state.sum > 0 ? std::exp(state.max - max) : F(0);
  if (max != state.max)
    for (int64_t d = 0; d < tile.D; ++d) state.acc[d] *= scale;
  state.max = max;
  state.sum = state.sum * scale + pool_exp(tile.steps, s, max, p);
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
