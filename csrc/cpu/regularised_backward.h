// The backward scan of a regularised layer over the rows of one thread: row by row from the gradients of a step's states
// those of its pre-activations, then for all rows the products that hand them on to the step before.
#pragma once

#include "regularised_rows.h"

namespace {

using rnnattn::RegularisedBackward;

template <typename Cell, typename F>
class RegularisedBackwardScan {
  static constexpr int64_t L = kLanes<F>, kBlock = kWide * L;
  static constexpr bool kLstm = std::is_same_v<Cell, Lstm>, kGru = std::is_same_v<Cell, Gru>;

 public:
  RegularisedBackwardScan(const RegularisedBackward<F>& scan, F* numbers, const void** pointers)
      : p(scan), GH(Cell::kGates * p.H), saved(gate_columns(p.mode) * p.H), d_rows(reinterpret_cast<const F**>(pointers)),
        d_fresh(numbers), dc_fresh(d_fresh + p.H), c_fresh(dc_fresh + p.H), normal_c(c_fresh + p.H), carry(normal_c + p.H),
        gates(carry + p.H), columns(gates + 4 * p.H) {}

  void run() {
    int64_t running = 0;
    for (int64_t step = scan_steps(p.rows) - 1; step >= 0; --step) {
      while (running < p.rows.n && p.rows.length[running] > step) ++running;
      for (int64_t i = 0; i < running; ++i) enter(i, step);
      for_blocks_of(p.w_hh, d_rows, running, GH, p.H, [&](int64_t first, int64_t n, int64_t column, const F* sums) {
        for (int64_t r = 0; r < n; ++r) add_product(p.rows.row[first + r] * p.H, column, sums + r * kBlock);
      });
      for (int64_t i = 0; i < running; ++i) leave(i, step);
    }
  }

 private:
  void enter(int64_t i, int64_t step) {
    const int64_t row = p.rows.row[i], at = row_at(p.rows, i, time_of(p.rows, i, step));
    F *dh = p.dh + row * p.H, *dc = kLstm ? p.dc + row * p.H : nullptr;
    for_lanes<F>(0, saved, [&](int64_t k, int64_t n) { store<F>(gates + k, load_stored<F>(p.stored, p.gates, at * saved + k, n), n); });
    for_lanes<F>(0, p.H, [&](int64_t k, int64_t n) {
      part(dh + k, d_fresh + k, p.dy, p.keep_h, at * p.H + k, n, p.zoneout_h);
      if constexpr (kLstm) {
        part(dc + k, dc_fresh + k, p.dcells, p.keep_c, at * p.H + k, n, p.zoneout_c);
        const Vec<F> c_prev = load(p.c_prev + at * p.H + k, n);
        store<F>(c_fresh + k, load(gates + p.H + k, n) * c_prev + load(gates + k, n) * load(gates + 2 * p.H + k, n), n);
      }
    });
    if constexpr (kLstm)
      if (p.norm_c) normal_cell(row);
    F *da = p.da + at * GH, *out = kGru ? columns : da;
    for_lanes<F>(0, p.H, [&](int64_t unit, int64_t n) { cell(at, unit, n, out); });
    add(dh, carry, kGru);
    if constexpr (kLstm) add(dc, dc_fresh, true);
    F* db = da;
    if constexpr (kGru) {  // columns n, r, z, q
      db = p.db + at * GH;
      std::memcpy(da, columns + p.H, 2 * p.H * sizeof(F)), std::memcpy(da + 2 * p.H, columns, p.H * sizeof(F));
      std::memcpy(db, columns + p.H, 3 * p.H * sizeof(F));
    }
    d_rows[i] = db;
    if (!p.norm_hh) return;
    F* d_hidden = p.d_hidden + at * GH;
    d_rows[i] = d_hidden;
    for_lanes<F>(0, GH, [&](int64_t k, int64_t n) { store<F>(d_hidden + k, load(db + k, n) * load(p.norm_hh + k, n), n); });
    normal_backward(d_hidden, [&](int64_t k, int64_t n) { return load_stored<F>(p.stored, p.hidden, at * GH + k, n); }, p.rstd[at], GH);
  }

  // Parts a state's gradient between the state before, of which zoneout kept a share, and the fresh one.
  static void part(F* d, F* fresh, const F* given, const bool* keep, int64_t at, int64_t n, F zoneout) {
    Vec<F> whole = load(d, n);
    if (given) whole += load(given + at, n);
    const Vec<F> k = share_kept(keep, at, n, zoneout);
    store<F>(d, k * whole, n);
    store<F>(fresh, (F(1) - k) * whole, n);
  }

  // Through the norm of c' and tanh: dc_fresh becomes the whole gradient of c', normal_c the argument of tanh.
  void normal_cell(int64_t row) {
    const Moments<F> m = moments(c_fresh, p.H);
    const auto normal = [&](int64_t k, int64_t n) { return (load(c_fresh + k, n) - m.mean) * m.rstd; };
    for_lanes<F>(0, p.H, [&](int64_t k, int64_t n) {
      const Vec<F> gain = load(p.norm_c + k, n), x = normal(k, n), shift = p.bias_c ? load(p.bias_c + k, n) : Vec<F>{};
      const Vec<F> tanh_c = tanh(x * gain + shift), d = load(d_fresh + k, n) * load(gates + 3 * p.H + k, n) * (F(1) - tanh_c * tanh_c);
      sum_up(p.d_norm_c, row * p.H + k, d * x, n), sum_up(p.d_bias_c, row * p.H + k, d, n);
      store<F>(normal_c + k, tanh_c, n);
      store<F>(carry + k, d * gain, n);
    });
    normal_backward(carry, normal, m.rstd, p.H);
    add(dc_fresh, carry, true);
  }

  static void sum_up(F* sums, int64_t at, Vec<F> d, int64_t n) {
    if (sums) store<F>(sums + at, load(sums + at, n) + d, n);
  }

  void add(F* sums, const F* d, bool is) {
    if (is) for_lanes<F>(0, p.H, [&](int64_t k, int64_t n) { sum_up(sums, k, load(d + k, n), n); });
  }

  void cell(int64_t at, int64_t unit, int64_t n, F* out) {
    Vec<F> h{}, h_prev{};
    if constexpr (Cell::kNeedsH) h = load(gates + unit, n);
    if constexpr (Cell::kNeedsPrevious) h_prev = load_stored<F>(p.stored, p.h_prev, at * p.H + unit, n);
    const BackwardUnits<F, F> units{unit, n, p.H, Stored::kFull, gates, 0, c_fresh, kLstm ? p.c_prev + at * p.H : nullptr,
                                    nullptr, h, h_prev, dc_fresh, out, nullptr, carry};
    const Vec<F> dh = load(d_fresh + unit, n);
    if constexpr (kLstm) {
      if (p.norm_c) return Lstm::backward_through(units, dh, load(normal_c + unit, n), load(dc_fresh + unit, n));
    }
    Cell::template backward<F, F>(units, dh);
  }

  void add_product(int64_t row, int64_t column, const F* sums) {
    const int64_t end = p.H - column < kBlock ? p.H - column : kBlock;
    for_lanes<F>(0, end, [&](int64_t k, int64_t n) {
      const int64_t at = row + column + k;
      const Vec<F> d = load(sums + k, n);
      sum_up(p.dh, at, p.h_mask ? d * load(p.h_mask + at, n) : d, n);
    });
  }

  // The step before a reset gets nothing of the gradients of its states; what took their place gets them.
  void leave(int64_t i, int64_t step) {
    if (!rnnattn::is_reset(p.resets, p.B, p.rows, i, step)) return;
    const int64_t at = p.rows.row[i] * p.H;
    cut(p.dh + at, p.dh_reset ? p.dh_reset + at : nullptr);
    if constexpr (kLstm) cut(p.dc + at, p.dc_reset ? p.dc_reset + at : nullptr);
  }

  void cut(F* d, F* replacement) {
    if (replacement) add(replacement, d, true);
    std::memset(d, 0, p.H * sizeof(F));
  }

  const RegularisedBackward<F>& p;
  const int64_t GH, saved;
  const F** d_rows;  // gradients of the hidden products
  F *d_fresh, *dc_fresh, *c_fresh, *normal_c, *carry, *gates, *columns;
};

template <typename F>
void regularised_backward(const RegularisedBackward<F>& scan, F* numbers, const void** pointers) {
  with_cell(scan.mode, [&](auto cell) { RegularisedBackwardScan<decltype(cell), F>(scan, numbers, pointers).run(); });
}

}  // namespace
