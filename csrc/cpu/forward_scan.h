// The forward scan of a group of rows, as one member of its threads runs it: for each step the
// product of the states with the packed hidden weights, a tile of rows and units at a time, and the
// cell on the sums while they are in cache. The input products of some steps are computed ahead.
#pragma once

#include "barrier.h"
#include "cells.h"
#include "overlap.h"
#include "panels.h"
#include "product_kernel.h"

namespace {

using rnnattn::ForwardScan;
using rnnattn::Member;

// W is what the panels of w_ih and w_hh hold, and the rows that they are multiplied with.
template <typename Cell, typename F, typename W>
class Forward {
  static constexpr int V = Cell::kGates * Cell::kUnits;
  static constexpr int64_t L = kLanes<F>, kBlock = V * L;
  using Word = typename W::Word;
  using Row = typename W::Row;
  static constexpr bool kNarrow = sizeof(Row) < sizeof(F);  // products take x, h0 and y as they are stored
  static constexpr bool kTiles = W::kTileRows > 1;

 public:
  Forward(const ForwardScan<F>& scan, const Member<F>& member)
      : p(scan), m(member), h_rows(reinterpret_cast<const Row**>(m.pointers)),
        raw_rows(reinterpret_cast<const F**>(m.pointers + p.rows.n)), x_rows(h_rows + 2 * p.rows.n),
        copies(static_cast<Row*>(m.copies)), lines(p.w_hh) {}

  void run() {
    const int64_t steps = scan_steps(p.rows), blocks = m.last - m.first;
    const bool ahead = p.chunk > 1;
    int64_t running = p.rows.n;
    for (int64_t step = 0, chunk = p.calls; step < steps; ++chunk) {
      const int64_t end = step + p.chunk < steps ? step + p.chunk : steps, chunk_rows = gather(step, end);
      for (int64_t n = 0; ahead && n < blocks; ++n) {
        const Turn turn = there_and_back(n, chunk);
        input_product(turn.block, chunk_rows, w_ih(turn.next), m.gates_x + (turn.block - m.first) * chunk_rows * kBlock);
      }
      for (int64_t first_row = 0; step < end; ++step, first_row += running) {
        while (p.rows.length[running - 1] <= step) --running;
        for (int64_t i = 0; i < running; ++i)
          h_rows[i] = is_reset(i, step) ? static_cast<const Row*>(p.resets.h) + p.rows.row[i] * p.R : state(i, step - 1);
        if constexpr (kTiles) W::arrange(h_rows, running, p.R, copies + p.chunk * p.rows.n * rnnattn::padded_row(p.I));
        for (int64_t n = 0; n < blocks; ++n) {
          const Turn turn = there_and_back(n, step + p.calls);
          block_of_units(turn, step, running, m.gates_x + (kTiles || ahead ? (turn.block - m.first) * chunk_rows + first_row : 0) * kBlock);
        }
        if constexpr (kTiles) overlap.finish();
        if (p.w_hr) project(step, running);
        wait();
      }
    }
  }

 private:
  void wait() {
    if (p.barrier) meet(p.barrier, m.index);
  }

  // The n-th block of a turn and the one after it: each turn goes back where the last one came from, as the panels read
  // last are still in cache.
  struct Turn {
    int64_t block, next;
  };
  Turn there_and_back(int64_t n, int64_t turn) const {
    return turn % 2 ? Turn{m.last - 1 - n, m.last - 2 - n} : Turn{m.first + n, m.first + n + 1};
  }

  // Points x_rows at the rows of x that the steps [step, end) take, in the scan's order.
  int64_t gather(int64_t step, int64_t end) {
    int64_t count = 0;
    for (; step < end; ++step)
      for (int64_t i = 0; i < p.rows.n && p.rows.length[i] > step; ++i, ++count) {
        const int64_t at = p.x_first[time_of(p.rows, i, step)] + p.rows.row[i] * p.x_row;
        const bool widen = !kNarrow && p.stored != Stored::kFull;
        Row* copy = copies + count * p.I;
        x_rows[count] = widen ? copy : static_cast<const Row*>(p.x) + at;
        if (!widen) continue;
        for_lanes<F>(0, p.I, [&](int64_t k, int64_t n) {
          store_row(copy + k, load_stored<F>(p.stored, p.x, at + k, n), n);
        });
      }
    if constexpr (kTiles) W::arrange(x_rows, count, p.I, copies);
    return count;
  }

  // A block's panel, or null where none was packed.
  const Word* w_ih(int64_t block) const { return panel_in(p.w_ih, p.I, block); }
  const Word* w_hh(int64_t block) const { return panel_in(p.w_hh, p.R, block); }
  static const Word* panel_in(const void* panels, int64_t K, int64_t block) {
    return panels ? static_cast<const Word*>(panels) + block * words<W>(K) * kBlock : nullptr;
  }
  static const F* scale(const F* scales, int64_t block) { return scales ? scales + block * kBlock : nullptr; }

  // A block's weights: packed before, or into memory that they leave in cache where a step or two is all they are for;
  // null for so few rows that they are multiplied as they lie.
  const Word* panel_of(const Word* packed, const Packing<F>& packing, int64_t block, int64_t rows) {
    if (packed || rows <= kMostUnpacked) return packed;
    pack_panel_as<W>(packing, block, static_cast<Word*>(m.panel));
    return static_cast<const Word*>(m.panel);
  }

  void input_product(int64_t block, int64_t n, const Word* ahead, F* out) {
    const Word* panel = panel_of(w_ih(block), p.unpacked_ih, block, n);
    const Product<F, W> product{x_rows, p.I, panel, p.w_ih ? ahead : panel, scale(p.scale_ih, block)};
    if (!panel) multiply_unpacked(p.unpacked_ih, block, x_rows, n, bias(block), out);
    else if constexpr (kTiles) W::template multiply<V, 0, V>(&product, 1, 0, n, bias(block), 0, out, [] {});
    else multiply<V, F, W>(product, 0, n, bias(block), out);
  }

  const F* bias(int64_t block) const { return p.bias ? p.bias + block * kBlock : nullptr; }

  // The hidden products and the cells of a block; gates_x [running][vectors][lanes] has the input products if they were
  // computed ahead, or memory for them.
  void block_of_units(const Turn& turn, int64_t step, int64_t running, F* gates_x) {
    const int64_t block = turn.block;
    const bool ahead = p.chunk > 1;
    const Word* packed = w_hh(block);
    if constexpr (kTiles)
      if (packed || running > kMostUnpacked) return block_of_tiles(block, step, running, gates_x);
    if (!ahead) input_product(block, running, packed, gates_x);
    const auto put = [&](int64_t first, int64_t rows, const F* sums) {
      units(block, step, first, rows, gates_x + first * kBlock, sums);
    };
    const Word* panel = panel_of(packed, p.unpacked_hh, block, running);
    const Word* after = !p.w_hh ? panel : ahead ? w_hh(turn.next) : w_ih(turn.next);
    const Product<F, W> product{h_rows, p.R, panel, after, scale(p.scale_hh, block)};
    if (!panel) return for_unpacked(block, running, put);
    if constexpr (!kTiles) {
      if (!p.gates) for_products<V, F, W>(product, 0, running, put);
      else for_products<V, F, W>(product, 0, running, [&](int64_t i, int64_t rows) { return lines_of_cells(block, step, i, rows).fetched(); }, put);
    }
  }

  // The same by a matrix unit. Input products that were not computed ahead are summed with the hidden ones in its registers.
  void block_of_tiles(int64_t block, int64_t step, int64_t running, F* gates_x) {
    constexpr int kSummed = Cell::kSummed * Cell::kUnits, kApart = V - kSummed;
    const bool ahead = p.chunk > 1 || !p.w_ih;
    if (ahead && p.chunk == 1) input_product(block, running, nullptr, gates_x);
    const Product<F, W> products[] = {{x_rows, p.I, w_ih(block), nullptr}, {h_rows, p.R, panel_of(w_hh(block), p.unpacked_hh, block, running), nullptr}};
    const auto *first_product = products + ahead, *hidden = products + 1;
    const auto steps = [&](int64_t rows) {
      const auto of = [&](int64_t K) { return W::template steps<kSummed>(rows, K) + (kApart ? W::template steps<kApart>(rows, K) : 0); };
      return of(p.R) + (ahead ? 0 : of(p.I));
    };
    const auto multiply = [&](int64_t first, int64_t rows, F* sums, const auto& beside) {
      F* inputs = gates_x + first * kBlock;
      W::template multiply<V, 0, kSummed>(first_product, 2 - ahead, first, rows, ahead ? inputs : bias(block), ahead ? kBlock : 0, sums, beside);
      if constexpr (kApart > 0) {
        W::template multiply<V, kSummed, kApart>(hidden, 1, first, rows, nullptr, 0, sums, beside);
        if (!ahead) W::template multiply<V, kSummed, kApart>(products, 1, first, rows, bias(block), 0, inputs, beside);
      }
    };
    const auto fetched = [&](int64_t first, int64_t rows) -> const LineList& {
      return p.gates ? lines_of_cells(block, step, first, rows) : lines.clear();
    };
    overlap.run(running, steps, fetched, multiply, [&](int64_t first, int64_t rows, const F* sums) {
      return Cells{this, gates_x + first * kBlock, sums, block, step, first, 0, rows * Cell::kUnits};
    });
  }

  // What the cells of a tile are to write besides y, which the next step reads: memory that nobody has touched for long.
  const LineList& lines_of_cells(int64_t block, int64_t step, int64_t first, int64_t rows) {
    const int64_t unit = block * Cell::kUnits * L, element = p.stored == Stored::kFull ? sizeof(F) : 2;
    lines.clear();
    for (int64_t i = first; i < first + rows; ++i) {
      const int64_t at = row_at(p.rows, i, time_of(p.rows, i, step));
      for (int64_t g = 0; g < gate_columns(p.mode); ++g)
        lines.add(p.gates, (at * gate_columns(p.mode) + g) * p.H + unit, element, Cell::kUnits * L);
      if (p.cells) lines.add(p.cells, at * p.H + unit, sizeof(F), Cell::kUnits * L);
      lines.add(p.y, at * p.y_row + unit, element, Cell::kUnits * L);
    }
    return lines;
  }

  template <typename Body>
  void for_unpacked(int64_t block, int64_t n, const Body& body) {
    alignas(64) F sums[kMostUnpacked * kBlock];
    for (int64_t first = 0; first < n; first += kMostUnpacked) {
      const int64_t rows = n - first < kMostUnpacked ? n - first : kMostUnpacked;
      multiply_unpacked(p.unpacked_hh, block, h_rows + first, rows, static_cast<const F*>(nullptr), sums);
      body(first, rows, sums);
    }
  }

  bool is_reset(int64_t i, int64_t step) const { return rnnattn::is_reset(p.resets, p.B, p.rows, i, step); }

  // Where products read row i's state after a scan step; step -1 is the initial state.
  const Row* state(int64_t i, int64_t step) const {
    const int64_t b = p.rows.row[i];
    if (step < 0) return static_cast<const Row*>(p.h0) + b * p.R;
    if constexpr (!kNarrow)
      if (p.h) return kept(b, step);
    return static_cast<const Row*>(p.y) + row_at(p.rows, i, time_of(p.rows, i, step)) * p.y_row;
  }

  F* kept(int64_t b, int64_t step) const { return p.h + (step % 2 * p.B + b) * p.R; }

  // h leaves the step: into y, and into the states to be read as F where y is rounded and products are not.
  RNNATTN_INLINE void put(int64_t i, int64_t step, int64_t unit, int64_t n, Vec<F> h) {
    const int64_t at = row_at(p.rows, i, time_of(p.rows, i, step)) * p.y_row;
    const Vec<F> rounded = store_as(p.stored, p.y, at + unit, h, n);
    if (p.h) store<F>(kept(p.rows.row[i], step) + unit, rounded, n);
  }

  void units(int64_t block, int64_t step, int64_t first, int64_t rows, const F* gates_x, const F* sums) {
    for (int64_t n = 0; n < rows * Cell::kUnits; ++n) cell(block, step, first, n, gates_x, sums, false);
  }

  // The n-th vector of units of a tile's rows.
  RNNATTN_INLINE void cell(int64_t block, int64_t step, int64_t first, int64_t n_th, const F* gates_x, const F* sums, bool summed) {
    const int64_t u = n_th % Cell::kUnits, i = first + n_th / Cell::kUnits;
    const int64_t unit = (block * Cell::kUnits + u) * L, left = p.H - unit, n = left < L ? left : L;
    if (n <= 0) return;
    const int64_t b = p.rows.row[i], at = row_at(p.rows, i, time_of(p.rows, i, step)), vectors = n_th * Cell::kGates * L;
    const F* c_prev = (is_reset(i, step) ? p.resets.c : p.c) + b * p.H;
    const Vec<F> h = Cell::template forward<F, Row>(
        {unit, n, p.H, p.stored, h_rows[i], c_prev, p.c + b * p.H, p.cells ? p.cells + at * p.H : nullptr, p.gates,
         at * gate_columns(p.mode) * p.H, gates_x + vectors, sums + vectors, p.bias_q, summed});
    if (p.h_raw) store_rounded(p.h_raw + b * p.H + unit, h, n);
    else put(i, step, unit, n, h);
  }

  // The cells of a tile's rows, for an Overlap.
  struct Cells {
    Forward* scan = nullptr;
    const F *gates_x = nullptr, *sums = nullptr;
    int64_t block = 0, step = 0, first = 0, next = 0, end = 0;

    int64_t left() const { return end - next; }
    RNNATTN_INLINE void one() { scan->cell(block, step, first, next++, gates_x, sums, true); }
  };

  void store_rounded(F* out, Vec<F> h, int64_t n) {
    F rounded[L];
    if (p.stored != Stored::kFull) h = store_as(p.stored, rounded, 0, h, n);
    store<F>(out, h, n);
  }

  void project(int64_t step, int64_t running) {
    constexpr int P = kWide;
    wait();
    for (int64_t i = 0; i < running; ++i) raw_rows[i] = p.h_raw + p.rows.row[i] * p.H;
    for (int64_t block = m.first_projected; block < m.last_projected; ++block) {
      const F* panel = p.w_hr + block * p.H * P * L;
      for_products<P, F, Full<F>>({raw_rows, p.H, panel, panel}, 0, running, [&](int64_t first, int64_t rows, const F* sums) {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t v = 0; v < P; ++v) {
            const int64_t unit = (block * P + v) * L, left = p.R - unit;
            if (left > 0) put(first + r, step, unit, left < L ? left : L, load(sums + (r * P + v) * L));
          }
      });
    }
  }

  const ForwardScan<F>& p;
  const Member<F>& m;
  const Row** h_rows;
  const F** raw_rows;
  const Row** x_rows;
  Row* copies;
  LineList lines;  // of a tile
  OverlapOfTiles<V, W, Cells> overlap;
};

template <typename W, typename F>
void scan_forward(const ForwardScan<F>& scan, const Member<F>& member) {
  with_cell(scan.mode, [&](auto cell) { Forward<decltype(cell), F, W>(scan, member).run(); });
}

template <typename F>
void forward_scan(const ForwardScan<F>& scan, const Member<F>& member) {
  if constexpr (sizeof(F) == sizeof(float)) {
    if (scan.panel == Panel::kBFloat16) return scan_forward<PairsOfBFloat16>(scan, member);
    if (scan.panel == Panel::kInt8) return scan_forward<FoursOfInt8>(scan, member);
  }
  scan_forward<Full<F>>(scan, member);
}

}  // namespace
