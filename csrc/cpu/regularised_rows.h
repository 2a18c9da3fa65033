// What the scans of a regularised layer do with whole rows: moments, zoneout, products.
#pragma once

#include "../regularised.h"
#include "cells.h"
#include "product_kernel.h"

namespace {

using rnnattn::kNormEpsilon;

template <typename F>
struct Moments {
  F mean, rstd;  // one over the standard deviation
};

template <typename F>
inline Moments<F> moments(const F* row, int64_t n) {
  Vec<F> sum{}, squares{};
  for_lanes<F>(0, n, [&](int64_t k, int64_t lanes) { sum += load(row + k, lanes); });
  const F mean = total<F>(sum) / F(n);
  F rest = 0;
  for_lanes<F>(0, n, [&](int64_t k, int64_t lanes) {
    const Vec<F> d = load(row + k, lanes) - mean;
    if (lanes == kLanes<F>) squares += d * d;
    else for (int64_t j = 0; j < lanes; ++j) rest += d[j] * d[j];
  });
  return {mean, F(1) / std::sqrt((total<F>(squares) + rest) / F(n) + F(kNormEpsilon))};
}

// d = rstd (d - mean(d) - x mean(d x)): from the gradient of normalised values x that of what was normalised.
template <typename F, typename Normalised>
inline void normal_backward(F* d, const Normalised& x, F rstd, int64_t n) {
  Vec<F> sum{}, product{};
  for_lanes<F>(0, n, [&](int64_t k, int64_t lanes) {
    const Vec<F> d_k = load(d + k, lanes);
    sum += d_k, product += d_k * x(k, lanes);
  });
  const F mean = total<F>(sum) / F(n), along = total<F>(product) / F(n);
  for_lanes<F>(0, n, [&](int64_t k, int64_t lanes) {
    store<F>(d + k, rstd * (load(d + k, lanes) - mean - x(k, lanes) * along), lanes);
  });
}

// The k of zoneout for a vector of units.
template <typename F>
inline Vec<F> share_kept(const bool* keep, int64_t at, int64_t n, F zoneout) {
  if (!keep) return splat(zoneout);
  alignas(64) F k[kLanes<F>] = {};
  for (int64_t j = 0; j < n; ++j) k[j] = F(keep[at + j]);
  return load(k);
}

// body(first row, rows, column, sums [rows][V][lanes]) for each block of columns of the products of K numbers of rows.
template <typename F, typename Body>
inline void for_blocks_of(const F* panels, const F* const* rows, int64_t n, int64_t K, int64_t width, const Body& body) {
  constexpr int64_t kBlock = kWide * kLanes<F>;
  for (int64_t column = 0; column < width; column += kBlock) {
    const F* panel = panels + column * K;
    const F* next = column + kBlock < width ? panel + kBlock * K : panels;
    for_products<kWide, F, Full<F>>({rows, K, panel, next}, 0, n, [&](int64_t first, int64_t count, const F* sums) {
      body(first, count, column, sums);
    });
  }
}

// Numbers that a thread's scan of so many rows needs: forward, products and masked states of all rows, and a row's
// states and gates; backward, a row's gradients.
template <typename F>
int64_t regularised_numbers(rnnattn::Mode mode, int64_t rows, int64_t H) {
  constexpr int64_t kBlock = kWide * kLanes<F>;
  return rows * ((rnnattn::weight_gates(mode) * H + kBlock - 1) / kBlock * kBlock + H) + 13 * H;
}

}  // namespace
