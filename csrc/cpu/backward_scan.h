// The backward scan of a group of rows, as one member of its threads runs it: for each step the
// product of the later step's gate gradients with the packed hidden weights gives the gradient of h,
// a tile of rows and units at a time, and the cell's derivative on it the next gate gradients.
#pragma once

#include "barrier.h"
#include "cells.h"
#include "overlap.h"
#include "product_kernel.h"

namespace {

using rnnattn::BackwardScan;
using rnnattn::Member;

// W is what the panels of w_hh hold, and the gates' gradients that they are multiplied with.
template <typename Cell, typename F, typename W>
class Backward {
  static constexpr int V = kWide;
  static constexpr int64_t L = kLanes<F>, kBlock = V * L;
  using Row = typename W::Row;
  static constexpr bool kTiles = W::kTileRows > 1;  // never with a projection

 public:
  Backward(const BackwardScan<F>& scan, const Member<F>& member)
      : p(scan), m(member), d_gates(static_cast<Row*>(p.d_gates)), d_rows(reinterpret_cast<const Row**>(m.pointers)),
        dh_rows(reinterpret_cast<const F**>(m.pointers + p.rows.n)), columns(gate_columns(p.mode) * p.H),
        depth(weight_gates(p.mode) * p.H), lines(p.w_hh) {}

  void run() {
    const int64_t steps = scan_steps(p.rows);
    int64_t running = 0;
    for (int64_t step = steps - 1; step >= 0; --step) {
      const int64_t later = running;  // rows that have run a later step; the others end here
      while (running < p.rows.n && p.rows.length[running] > step) ++running;
      point_at_later_step(step, later);
      if constexpr (kTiles) {
        for_blocks(m.first, m.last, step, [&](int64_t block, int64_t) { block_of_tiles(block, step, later, running); });
        overlap.finish();
      } else if (p.w_hr) {
        projected_gradient(step, later, running);
        for_blocks(m.first, m.last, step, [&](int64_t block, int64_t next) { units_projected(block, next, step, running); });
      } else {
        for_blocks(m.first, m.last, step, [&](int64_t block, int64_t next) {
          const auto lines = [&](int64_t i, int64_t rows) { return lines_of_cells(block, step, i, rows).fetched(); };
          state_gradients(block, next, step, later, running, lines, [&](int64_t i, int64_t unit, int64_t n, Vec<F> dh) {
            cell(i, step, unit, n, dh + output_gradient(i, step, unit, n));
          });
        });
      }
      wait();
    }
    if (!p.w_hh) return;
    point_at_later_step(-1, running);
    if constexpr (kTiles) {
      for_blocks(m.first, m.last, 0, [&](int64_t block, int64_t) { block_of_tiles(block, -1, running, running); });
      overlap.finish();
    } else {
      const bool apart = p.w_hr;  // with a projection h has other columns than the units
      for_blocks(apart ? m.first_projected : m.first, apart ? m.last_projected : m.last, 0, [&](int64_t block, int64_t next) {
        state_gradients(block, next, -1, running, running, NoLines{}, [&](int64_t i, int64_t column, int64_t n, Vec<F> dh) {
          store<F>(p.dh + p.rows.row[i] * p.R + column, dh, n);
        });
      });
    }
  }

 private:
  void wait() {
    if (p.barrier) meet(p.barrier, m.index);
  }

  // body(block, the one after it), there and back again: the panels read last are still in cache.
  template <typename Body>
  void for_blocks(int64_t first, int64_t last, int64_t step, const Body& body) {
    for (int64_t n = 0; n < last - first; ++n)
      if (step % 2) body(last - 1 - n, last - 2 - n);
      else body(first + n, first + n + 1);
  }

  // body(row, column, lanes, vector) for the columns below width of a tile's sums.
  template <typename Body>
  void for_vectors(const F* sums, int64_t block, int64_t first, int64_t rows, int64_t width, const Body& body) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < V; ++v) {
        const int64_t column = (block * V + v) * L, left = width - column;
        if (left > 0) body(first + r, column, left < L ? left : L, load(sums + (r * V + v) * L));
      }
  }

  // What the cells of a tile are to read: it was written long ago, and as units of many rows lies too scattered for
  // the hardware to foresee.
  const LineList& lines_of_cells(int64_t block, int64_t step, int64_t first, int64_t rows) {
    const int64_t unit = block * V * L, element = p.stored == Stored::kFull ? sizeof(F) : 2;
    lines.clear();
    for (int64_t i = first; i < first + rows; ++i) {
      const int64_t t = time_of(p.rows, i, step), at = row_at(p.rows, i, t);
      for (int64_t g = 0; p.gates && g < gate_columns(p.mode); ++g) lines.add(p.gates, at * columns + g * p.H + unit, element, V * L);
      if (p.dy) lines.add(p.dy, p.dy_first[t] + p.rows.row[i] * p.dy_row + unit, element, V * L);
      if (p.cells && step) lines.add(p.cells, row_at(p.rows, i, time_of(p.rows, i, step - 1)) * p.H + unit, sizeof(F), V * L);
    }
    return lines;
  }

  void point_at_later_step(int64_t step, int64_t later) {
    for (int64_t i = 0; i < later; ++i)
      d_rows[i] = d_gates + slot_of(p.rows, i, time_of(p.rows, i, step + 1)) * columns + hidden_column(p.mode) * p.H;
    if constexpr (W::kTileRows > 1) W::arrange(d_rows, later, depth, static_cast<Row*>(m.copies));
  }

  bool is_reset(int64_t i, int64_t step) const { return rnnattn::is_reset(p.resets, p.B, p.rows, i, step); }

  // What the step before a reset gets of the gradient of its state: nothing. What took the state's place gets it.
  static Vec<F> cut(F* replacement, int64_t at, int64_t n, Vec<F> d) {
    if (replacement) store<F>(replacement + at, load(replacement + at, n) + d, n);
    return Vec<F>{};
  }

  Vec<F> given(int64_t i, int64_t column, int64_t n) const { return load(p.dh + p.rows.row[i] * p.R + column, n); }

  const typename W::Word* panel(int64_t block) const {
    return static_cast<const typename W::Word*>(p.w_hh) + block * words<W>(depth) * kBlock;
  }

  // The gradient of h after a step that has a later one, from its product.
  RNNATTN_INLINE Vec<F> through_later_step(int64_t i, int64_t step, int64_t column, int64_t n, Vec<F> dh) {
    if constexpr (Cell::kCarry) dh += given(i, column, n);
    return is_reset(i, step + 1) ? cut(p.dh_reset, p.rows.row[i] * p.R + column, n, dh) : dh;
  }

  // body(row, column, lanes, gradient of h after a step) for a block's columns of rows that end at the step: it is that of h_n.
  template <typename Body>
  void for_ending(int64_t block, int64_t later, int64_t end, const Body& body) {
    for (int64_t i = later; i < end; ++i)
      for (int64_t v = 0; v < V; ++v) {
        const int64_t column = (block * V + v) * L, left = p.R - column, n = left < L ? left : L;
        if (left > 0) body(i, column, n, given(i, column, n));
      }
  }

  // The same for rows [0, later), which have it from their later step, and rows [later, end), which end here.
  template <typename Fetch, typename Body>
  void state_gradients(int64_t block, int64_t next, int64_t step, int64_t later, int64_t end, const Fetch& lines, const Body& body) {
    for_products<V, F, W>({d_rows, depth, panel(block), panel(next)}, 0, later, lines, [&](int64_t first, int64_t rows, const F* sums) {
      for_vectors(sums, block, first, rows, p.R, [&](int64_t i, int64_t column, int64_t n, Vec<F> dh) {
        body(i, column, n, through_later_step(i, step, column, n, dh));
      });
    });
    for_ending(block, later, end, body);
  }

  // The cells of a block by a matrix unit; step -1 is that before the first, which has no cells.
  void block_of_tiles(int64_t block, int64_t step, int64_t later, int64_t end) {
    const Product<F, W> product{d_rows, depth, panel(block), nullptr};
    const auto fetched = [&](int64_t first, int64_t rows) -> const LineList& {
      return step >= 0 ? lines_of_cells(block, step, first, rows) : lines.clear();
    };
    overlap.run(later, [&](int64_t rows) { return W::template steps<V>(rows, depth); }, fetched,
        [&](int64_t first, int64_t rows, F* sums, const auto& beside) {
          W::template multiply<V, 0, V>(&product, 1, first, rows, nullptr, 0, sums, beside);
        },
        [&](int64_t first, int64_t rows, const F* sums) { return Cells{this, sums, block, step, first, 0, rows * V}; });
    if (step >= 0)
      for_ending(block, later, end, [&](int64_t i, int64_t unit, int64_t n, Vec<F> dh) {
        cell(i, step, unit, n, dh + output_gradient(i, step, unit, n));
      });
  }

  // The cells of a tile's rows, for an Overlap.
  struct Cells {
    Backward* scan = nullptr;
    const F* sums = nullptr;
    int64_t block = 0, step = 0, first = 0, next = 0, end = 0;

    int64_t left() const { return end - next; }

    RNNATTN_INLINE void one() {
      const int64_t n_th = next++, i = first + n_th / V, unit = (block * V + n_th % V) * L, left = scan->p.R - unit;
      if (left <= 0) return;
      const int64_t n = left < L ? left : L;
      const Vec<F> dh = scan->through_later_step(i, step, unit, n, load(sums + n_th * L));
      if (step < 0) store<F>(scan->p.dh + scan->p.rows.row[i] * scan->p.R + unit, dh, n);
      else scan->cell(i, step, unit, n, dh + scan->output_gradient(i, step, unit, n));
    }
  };

  Vec<F> output_gradient(int64_t i, int64_t step, int64_t column, int64_t n) {
    if (!p.dy) return Vec<F>{};
    const int64_t at = p.dy_first[time_of(p.rows, i, step)] + p.rows.row[i] * p.dy_row;
    return load_stored<F>(p.stored, p.dy, at + column, n);
  }

  // With a projection: first the whole gradient of h, R columns, then through w_hr that of the units.
  void projected_gradient(int64_t step, int64_t later, int64_t running) {
    for (int64_t i = 0; i < running; ++i) dh_rows[i] = p.dh_out + slot_of(p.rows, i, time_of(p.rows, i, step)) * p.R;
    for_blocks(m.first_projected, m.last_projected, step, [&](int64_t block, int64_t next) {
      state_gradients(block, next, step, later, running, NoLines{}, [&](int64_t i, int64_t column, int64_t n, Vec<F> dh) {
        store<F>(const_cast<F*>(dh_rows[i]) + column, dh + output_gradient(i, step, column, n), n);
      });
    });
    wait();
  }

  void units_projected(int64_t block, int64_t next, int64_t step, int64_t running) {
    for_products<V, F, Full<F>>({dh_rows, p.R, p.w_hr + block * p.R * kBlock, p.w_hr + next * p.R * kBlock}, 0, running,
                       [&](int64_t first, int64_t rows, const F* sums) {
                         for_vectors(sums, block, first, rows, p.H, [&](int64_t i, int64_t unit, int64_t n, Vec<F> dh) {
                           cell(i, step, unit, n, dh);
                         });
                       });
  }

  RNNATTN_INLINE void cell(int64_t i, int64_t step, int64_t unit, int64_t n, Vec<F> dh) {
    const int64_t b = p.rows.row[i], t = time_of(p.rows, i, step), at = row_at(p.rows, i, t);
    const int64_t before = step ? row_at(p.rows, i, time_of(p.rows, i, step - 1)) : 0;
    const bool anew = is_reset(i, step);
    Vec<F> h{}, h_prev{};
    if constexpr (Cell::kNeedsH) h = load_stored<F>(p.stored, p.y, at * p.y_row + unit, n);
    if constexpr (Cell::kNeedsPrevious)
      h_prev = step && !anew ? load_stored<F>(p.stored, p.y, before * p.y_row + unit, n)
                             : load((anew ? static_cast<const F*>(p.resets.h) : p.h0) + b * p.R + unit, n);
    const F *c = nullptr, *c_prev = nullptr, *d_cells = p.d_cells ? p.d_cells + at * p.H : nullptr;
    if (p.cells) c = p.cells + at * p.H, c_prev = anew ? p.resets.c + b * p.H : step ? p.cells + before * p.H : p.c0 + b * p.H;
    Cell::template backward<F, Row>({unit, n, p.H, p.stored, p.gates, at * columns, c, c_prev, d_cells, h, h_prev, p.dc + b * p.H,
                                     d_gates + slot_of(p.rows, i, t) * columns, p.d_bias, p.dh + b * p.R}, dh);
    if (p.cells && anew) {
      F* dc = p.dc + b * p.H + unit;
      store<F>(dc, cut(p.dc_reset, b * p.H + unit, n, load(dc, n)), n);
    }
  }

  const BackwardScan<F>& p;
  const Member<F>& m;
  Row* const d_gates;
  const Row** d_rows;
  const F** dh_rows;
  const int64_t columns, depth;
  static_assert(kRows<V> * V * 6 <= kDepth);
  LineList lines;  // of a tile
  OverlapOfTiles<V, W, Cells> overlap;
};

template <typename W, typename F>
void scan_backward(const BackwardScan<F>& scan, const Member<F>& member) {
  with_cell(scan.mode, [&](auto cell) { Backward<decltype(cell), F, W>(scan, member).run(); });
}

template <typename F>
void backward_scan(const BackwardScan<F>& scan, const Member<F>& member) {
  if constexpr (sizeof(F) == sizeof(float))
    if (scan.panel == Panel::kBFloat16) return scan_backward<PairsOfBFloat16>(scan, member);
  scan_backward<Full<F>>(scan, member);
}

}  // namespace
