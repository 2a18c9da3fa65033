// The forward scan of a regularised layer over the rows of one thread: the hidden products of a step for all rows, then
// row by row what needs a whole row at once.
#pragma once

#include "regularised_rows.h"

namespace {

using rnnattn::RegularisedForward;

template <typename Cell, typename F>
class RegularisedForwardScan {
  static constexpr int64_t L = kLanes<F>, kBlock = kWide * L;
  static constexpr bool kLstm = std::is_same_v<Cell, Lstm>;

 public:
  RegularisedForwardScan(const RegularisedForward<F>& scan, F* numbers, const void** pointers)
      : p(scan), GH(Cell::kGates * p.H), width((GH + kBlock - 1) / kBlock * kBlock), operands(reinterpret_cast<const F**>(pointers)),
        products(numbers), masked(products + p.rows.n * width), fresh_h(masked + p.rows.n * p.H), fresh_c(fresh_h + p.H),
        gates(fresh_c + p.H) {}

  void run() {
    const int64_t steps = scan_steps(p.rows);
    int64_t running = p.rows.n;
    for (int64_t step = 0; step < steps; ++step) {
      while (p.rows.length[running - 1] <= step) --running;
      for (int64_t i = 0; i < running; ++i) enter(i, step);
      for_blocks_of(p.w_hh, operands, running, p.H, GH, [&](int64_t first, int64_t n, int64_t column, const F* sums) {
        for (int64_t r = 0; r < n; ++r)
          std::memcpy(products + (first + r) * width + column, sums + r * kBlock, kBlock * sizeof(F));
      });
      for (int64_t i = 0; i < running; ++i) leave(i, step);
    }
  }

 private:
  // What the row starts the step from, and what the product takes of it.
  void enter(int64_t i, int64_t step) {
    const int64_t at = p.rows.row[i] * p.H;
    F* h = p.h + at;
    if (rnnattn::is_reset(p.resets, p.B, p.rows, i, step)) {
      std::memcpy(h, static_cast<const F*>(p.resets.h) + at, p.H * sizeof(F));
      if (kLstm) std::memcpy(p.c + at, p.resets.c + at, p.H * sizeof(F));
    }
    operands[i] = p.h_mask ? masked + i * p.H : h;
    if (!p.h_mask) return;
    for_lanes<F>(0, p.H, [&](int64_t k, int64_t n) { store<F>(masked + i * p.H + k, load(h + k, n) * load(p.h_mask + at + k, n), n); });
  }

  void leave(int64_t i, int64_t step) {
    const int64_t row = p.rows.row[i], at = row_at(p.rows, i, time_of(p.rows, i, step));
    F *b = products + i * width, *h = p.h + row * p.H, *c = p.c + row * p.H;
    if (p.norm_hh) normalise(b, at);
    for_lanes<F>(0, p.H, [&](int64_t unit, int64_t n) {
      alignas(64) F input[Cell::kGates * L], hidden[Cell::kGates * L];
      for (int g = 0; g < Cell::kGates; ++g) {
        const int64_t column = g * p.H + unit;
        const Vec<F> product = load(b + column, n);
        store<F>(input + g * L, load(p.a + at * GH + column, n));
        store<F>(hidden + g * L, p.b_hh ? product + load(p.b_hh + column, n) : product);
      }
      const Vec<F> fresh = Cell::template forward<F, F>(
          {unit, n, p.H, Stored::kFull, h, c, fresh_c, nullptr, gates, 0, input, hidden, nullptr});
      store<F>(fresh_h + unit, fresh, n);
    });
    if constexpr (!kLstm) {
      if (gate_columns(p.mode) == 1) std::memcpy(gates, fresh_h, p.H * sizeof(F));
    } else if (p.norm_c) {
      const Moments<F> m = moments(fresh_c, p.H);
      for_lanes<F>(0, p.H, [&](int64_t k, int64_t n) {
        const Vec<F> scaled = (load(fresh_c + k, n) - m.mean) * m.rstd * load(p.norm_c + k, n);
        store<F>(fresh_h + k, load(gates + 3 * p.H + k, n) * tanh(p.bias_c ? scaled + load(p.bias_c + k, n) : scaled), n);
      });
    }
    if (p.gates) save(at);
    for_lanes<F>(0, p.H, [&](int64_t k, int64_t n) {
      const Vec<F> next = zoned(p.keep_h, at * p.H + k, n, p.zoneout_h, load(h + k, n), load(fresh_h + k, n));
      store<F>(h + k, store_as(p.stored, p.y, at * p.H + k, next, n), n);
      if constexpr (kLstm) {
        const Vec<F> next_c = zoned(p.keep_c, at * p.H + k, n, p.zoneout_c, load(c + k, n), load(fresh_c + k, n));
        store<F>(c + k, next_c, n);
        store<F>(p.cells + at * p.H + k, next_c, n);
      }
    });
  }

  void normalise(F* b, int64_t at) {
    const Moments<F> m = moments(b, GH);
    if (p.rstd) p.rstd[at] = m.rstd;
    for_lanes<F>(0, GH, [&](int64_t k, int64_t n) {
      const Vec<F> normal = (load(b + k, n) - m.mean) * m.rstd;
      if (p.hidden) store_as(p.stored, p.hidden, at * GH + k, normal, n);
      store<F>(b + k, normal * load(p.norm_hh + k, n), n);
    });
  }

  void save(int64_t at) {
    const int64_t size = gate_columns(p.mode) * p.H;
    for_lanes<F>(0, size, [&](int64_t k, int64_t n) { store_as(p.stored, p.gates, at * size + k, load(gates + k, n), n); });
  }

  static Vec<F> zoned(const bool* keep, int64_t at, int64_t n, F zoneout, Vec<F> before, Vec<F> fresh) {
    if (!keep && zoneout == F(0)) return fresh;
    const Vec<F> k = share_kept(keep, at, n, zoneout);
    return keep ? (k != F(0) ? before : fresh) : k * before + (F(1) - k) * fresh;
  }

  const RegularisedForward<F>& p;
  const int64_t GH, width;
  const F** operands;  // of the hidden product
  F *products, *masked, *fresh_h, *fresh_c, *gates;
};

template <typename F>
void regularised_forward(const RegularisedForward<F>& scan, F* numbers, const void** pointers) {
  with_cell(scan.mode, [&](auto cell) { RegularisedForwardScan<decltype(cell), F>(scan, numbers, pointers).run(); });
}

}  // namespace
