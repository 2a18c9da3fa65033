// Parameters of the scans of a recurrent layer on a CPU: one direction, and those of its rows that a
// group of threads computes together. Pointers are borrowed for the call; F is the accumulation type
// (float or double). Letters: B batch, T time, I input size, H hidden size, R output size (H, or the
// projection size), G gates per unit.
#pragma once

#include <cstdint>

namespace rnnattn {

class Barrier;

enum class Mode { kLstm, kGru, kTanh, kRelu };

// How x, y, the gates and their gradients are held in memory: as F, or rounded to 16 bits.
enum class Stored { kFull, kBFloat16, kHalf };

// How packed weights are held: as F, rounded to bfloat16, or as int8 with a scale for each column.
enum class Panel { kFull, kBFloat16, kInt8 };

// Columns of the pre-activations' gradients, those of the input product first: LSTM i, f, g, o;
// GRU n, r, z, q, of which the hidden product has r, z, q (q = W_hn h + b_hn); RNN its only one.
// static: an inline function compiled for AVX-512 must not be the one that the linker keeps for all.
static constexpr int64_t gate_columns(Mode mode) { return mode == Mode::kLstm || mode == Mode::kGru ? 4 : 1; }
static constexpr int64_t weight_gates(Mode mode) { return mode == Mode::kLstm ? 4 : mode == Mode::kGru ? 3 : 1; }
static constexpr int64_t unit_vectors(Mode mode) { return weight_gates(mode) == 1 ? 4 : 1; }  // of a block of units
static constexpr int64_t hidden_column(Mode mode) { return mode == Mode::kGru ? 1 : 0; }

// Numbers of F, or words of 32 bits, that a panel has for K numbers of a column: of bfloat16 as many as fill the tiles
// of a matrix unit, with zeros. Rows that it reads are as long or a cache line longer: an odd number of lines, so that they spread over the cache.
static constexpr int64_t panel_depth(Panel panel, int64_t K) {
  return panel == Panel::kInt8 ? (K + 3) / 4 : panel == Panel::kBFloat16 ? (K + 31) / 32 * 16 : K;
}
static constexpr int64_t padded_row(int64_t K) { return (2 * panel_depth(Panel::kBFloat16, K) / 32 | 1) * 32; }

// The rows of a group, longest first, so that those still running at a scan step are the first ones.
// A slot is the place of a (step, row) pair among those inside their row's length, ordered by step.
struct Rows {
  int64_t n;
  const int64_t* row;     // [n] index in the batch
  const int64_t* length;  // [n] steps of the row
  const int64_t* place;   // [n] place among all rows of the batch, longest first
  const int64_t* offset;  // [T] slot of the first row at step t
  const int64_t* first;   // [T] where step t begins in y, gates and cells: t * B, or in a packed sequence its slot
  bool reverse;           // a row's scan starts at its last step
};

// The steps of a scan, and where row i of a group is in its input at a scan step.
static inline int64_t scan_steps(const Rows& rows) { return rows.n ? rows.length[0] : 0; }
static inline int64_t time_of(const Rows& rows, int64_t i, int64_t step) {
  return rows.reverse ? rows.length[i] - 1 - step : step;
}
static inline int64_t slot_of(const Rows& rows, int64_t i, int64_t t) { return rows.offset[t] + rows.place[i]; }
static inline int64_t row_at(const Rows& rows, int64_t i, int64_t t) { return rows.first[t] + rows.row[i]; }

// Whether a scan replaces row b's state before its step at time t. resets [T, B] tells where episodes begin; a reverse
// scan crosses the border before such a step when it enters the one before.
static inline bool is_reset(const bool* resets, int64_t B, int64_t b, int64_t length, bool reverse, int64_t t) {
  return t + reverse < length && resets[(t + reverse) * B + b];
}

// Where states are replaced, and by what.
template <typename F>
struct Resets {
  const bool* at;    // [T, B], or null for nowhere
  const void* h;     // [B, R], as ForwardScan::h0, or BackwardScan::h0
  const F* c;        // [B, H]
};

// Whether row i of a group starts a scan step from them.
template <typename F>
static inline bool is_reset(const Resets<F>& resets, int64_t B, const Rows& rows, int64_t i, int64_t step) {
  return resets.at && is_reset(resets.at, B, rows.row[i], rows.length[i], rows.reverse, time_of(rows, i, step));
}

// What one member of a group computes, and its own memory. A block is what one pass over a panel of
// packed weights gives; blocks of the projection (which are columns of R) are counted apart.
template <typename F>
struct Member {
  int index;
  int64_t first, last;  // blocks of units
  int64_t first_projected, last_projected;
  F* gates_x;           // forward: [blocks][rows][vectors][lanes]; of one block where ForwardScan::chunk is 1 and no matrix unit
  void* copies;         // of rows: forward: of x as F [rows of a chunk, I], where it is stored in 16 bits; products in
                        // bfloat16: [rows of a chunk, padded I] and [n, padded R]; backward: [n, padded K of w_hh]
  const void** pointers;  // [rows of a chunk + 2 n]
  void* panel = nullptr;  // forward, without packed weights: a panel of I or R rows
};

// A matrix to be packed as panels, [block][panel_depth(K)][vectors of a block][lanes], zero beyond the matrix.
template <typename F>
struct Packing {
  const void* w;        // element (k, column) at k * k_stride + column * column_stride
  int64_t k_stride, column_stride;
  int64_t K, width;     // width: units, or columns
  int64_t gates;        // column of a unit's gate g: g * width + unit
  int64_t units;        // vectors of units in a block, each with its gates
  Panel panel = Panel::kFull;  // how the panels hold it; int8: w has whole numbers from -127 to 127
  Stored stored = Stored::kFull;  // how w does
};

// [T, B] stands for [rows of a packed sequence] as well: Rows::first tells where the steps begin.
template <typename F>
struct ForwardScan {
  Mode mode;
  Stored stored;
  int64_t T, B, I, H, R;
  Rows rows;
  Barrier* barrier;     // of the group's members; null for one
  const void* x;        // stored [T, B, I], elements of a row contiguous
  const int64_t* x_first;  // [T] the first element of step t
  int64_t x_row;
  Packing<F> unpacked_ih, unpacked_hh;
  Panel panel;          // what w_ih and w_hh hold
  const void* w_ih;     // panels, K = I, or null: the product takes the matrices unpacked
  const void* w_hh;     // panels, K = R, or null
  const F* scale_ih;    // int8: [blocks][vectors][lanes], else null
  const F* scale_hh;
  const F* bias;        // [blocks][vectors][lanes], added to the input product, or null
  const F* bias_q;      // GRU: b_hn [H], or null
  const F* w_hr;        // panels, K = H, or null without projection
  const void* h0;       // [B, R], of F; products in bfloat16: of that
  F* h;                 // [2, B, R], the states of two steps; null where products read them in y
  F* h_raw;             // [B, H], before the projection; null without
  F* c;                 // [B, H] in: c0; out: the last cell state; LSTM
  void* y;              // stored [T, B, y_row], from this direction's first column on
  int64_t y_row;
  void* gates;          // stored [T, B, gate columns * H] after the activation, or null; LSTM, GRU
  F* cells;             // [T, B, H], or null; LSTM
  int64_t chunk;        // scan steps whose input product is computed at once; 1: block by block, by a matrix unit with the
                        // hidden product in one sum
  int64_t calls = 0;    // with these weights before: blocks are taken there and back again, from call to call as well
  Resets<F> resets = {};
};

template <typename F>
struct BackwardScan {
  Mode mode;
  Stored stored;
  int64_t T, B, H, R;
  Rows rows;
  Barrier* barrier;
  Panel panel;        // what w_hh holds
  const void* w_hh;   // panels of R columns, K = hidden gates * H; or null for a single step: dh then has but GRU's z * dh
  const F* w_hr;      // panels of H columns, K = R, or null without projection
  const void* dy;     // stored [T, B, R], or null
  const int64_t* dy_first;  // [T] the first element of step t
  int64_t dy_row;
  const void* y;      // stored [T, B, y_row]
  int64_t y_row;
  const void* gates;  // stored [T, B, gate columns * H]
  const F* cells;     // [T, B, H]
  const F *h0, *c0;   // [B, R], [B, H]
  F* dh;              // [B, R] in: gradient of h_n; out: of h0
  F* dc;              // [B, H] in: gradient of c_n; out: of c0
  void* d_gates;      // [slots, gate columns * H] out, of F; products in bfloat16: of that
  F* d_bias;          // [gate columns * H] the group's sum of d_gates is added to it, or null
  F* dh_out;          // [slots, R] out, the whole gradient of h_t; null without projection
  Resets<F> resets = {};
  F *dh_reset = nullptr, *dc_reset = nullptr;  // [B, R], [B, H] in/out: the gradients of resets.h and c are added, or null
  const F* d_cells = nullptr;  // [T, B, H] gradient of cells, not read behind a row's length, or null
};

}  // namespace rnnattn
