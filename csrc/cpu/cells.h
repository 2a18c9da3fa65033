// The pointwise part of each recurrent cell, for one vector of units of one row: what follows the
// products in the forward scan and precedes them in the backward scan.
#pragma once

#include <type_traits>

#include "stored.h"

namespace {

using rnnattn::Mode;

// How exact the elementary functions of a cell are whose rows are of Row.
template <typename Row> using Bits = std::conditional_t<sizeof(Row) == 2, ThirteenBits, AllBits>;

// One vector of units of one row at one step, forward; the rows of states are of Row.
template <typename F, typename Row>
struct ForwardUnits {
  int64_t unit, n;   // first unit, and how many of the lanes are units
  int64_t H;
  Stored stored;
  const Row* h_prev;  // the row's states, from unit 0 on; all pointers below likewise
  const F* c_prev;   // may be c
  F* c;              // out
  F* cells;          // out: c as well, or null
  void* gates;       // out, or null
  int64_t gates_at;  // index of the row's first gate
  const F* input;    // input products with their biases, [kGates][lanes]
  const F* hidden;   // hidden products, likewise
  const F* bias_q;   // GRU: b_hn, or null
  bool summed = false;  // the input products of the first kSummed gates are in `hidden` already

  RNNATTN_INLINE Vec<F> sum(int gate) const {
    const Vec<F> product = load(hidden + gate * kLanes<F>);
    return summed ? product : load(input + gate * kLanes<F>) + product;
  }
  RNNATTN_INLINE void save(int gate, Vec<F> value) const { store_as(stored, gates, gates_at + gate * H + unit, value, n); }
};

// One vector of units of one row at one step, backward; the rows of gradients are of Row.
template <typename F, typename Row>
struct BackwardUnits {
  int64_t unit, n, H;
  Stored stored;
  const void* gates;
  int64_t gates_at;
  const F *c, *c_prev;
  const F* d_cells;  // gradient of c as a result of its own, or null
  Vec<F> h, h_prev;  // states after and before the step
  F* dc;             // in: gradient of c as a state; out: of c_prev
  Row* d_gates;      // out
  F* d_bias;         // added to: the sum of d_gates, or null
  F* carry;          // out: the part of the gradient of h_prev that takes no product

  RNNATTN_INLINE Vec<F> gate(int g) const { return load_stored<F>(stored, gates, gates_at + g * H + unit, n); }
  RNNATTN_INLINE void put(int column, Vec<F> value) const {
    store_row(d_gates + column * H + unit, value, n);
    if (d_bias) store<F>(d_bias + column * H + unit, load(d_bias + column * H + unit, n) + value, n);
  }
};

// V vectors of pre-activations per block of units: kGates for each of kUnits vectors of units.
struct Lstm {
  static constexpr int kGates = 4, kUnits = 1, kSummed = 4;
  static constexpr bool kNeedsH = false, kNeedsPrevious = false, kCarry = false;  // what its backward reads and writes

  // i, f, o = sigmoid(a), g = tanh(a);  c = f * c_prev + i * g;  h = o * tanh(c)
  template <typename F, typename Row>
  RNNATTN_INLINE static Vec<F> forward(const ForwardUnits<F, Row>& at) {
    const Bits<Row> bits;
    // c is not rounded from step to step: with f near 1 what f lacks of it counts as often as there are steps.
    const Vec<F> i = sigmoid(at.sum(0), bits), f = sigmoid(at.sum(1)), g = tanh(at.sum(2), bits), o = sigmoid(at.sum(3), bits);
    const Vec<F> c = f * load(at.c_prev + at.unit, at.n) + i * g;
    store<F>(at.c + at.unit, c, at.n);
    if (at.cells) store<F>(at.cells + at.unit, c, at.n);
    if (at.gates) at.save(0, i), at.save(1, f), at.save(2, g), at.save(3, o);
    return o * tanh(c, bits);
  }

  template <typename F, typename Row>
  RNNATTN_INLINE static void backward(const BackwardUnits<F, Row>& at, Vec<F> dh) {
    const Vec<F> tanh_c = tanh(load(at.c + at.unit, at.n), Bits<Row>());
    Vec<F> dc = load(at.dc + at.unit, at.n) + dh * at.gate(3) * (F(1) - tanh_c * tanh_c);
    if (at.d_cells) dc += load(at.d_cells + at.unit, at.n);
    backward_through(at, dh, tanh_c, dc);
  }

  // With dc the whole gradient of c.
  template <typename F, typename Row>
  RNNATTN_INLINE static void backward_through(const BackwardUnits<F, Row>& at, Vec<F> dh, Vec<F> tanh_c, Vec<F> dc) {
    const Vec<F> i = at.gate(0), f = at.gate(1), g = at.gate(2), o = at.gate(3), c_prev = load(at.c_prev + at.unit, at.n);
    at.put(0, dc * g * i * (F(1) - i));
    at.put(1, dc * c_prev * f * (F(1) - f));
    at.put(2, dc * i * (F(1) - g * g));
    at.put(3, dh * tanh_c * o * (F(1) - o));
    store<F>(at.dc + at.unit, dc * f, at.n);
  }
};

struct Gru {
  static constexpr int kGates = 3, kUnits = 1, kSummed = 2;
  static constexpr bool kNeedsH = false, kNeedsPrevious = true, kCarry = true;

  // r, z = sigmoid(a);  q = W_hn h_prev + b_hn;  n = tanh(W_in x + b_in + r * q);  h = (1 - z) * n + z * h_prev
  template <typename F, typename Row>
  RNNATTN_INLINE static Vec<F> forward(const ForwardUnits<F, Row>& at) {
    const Bits<Row> bits;
    const Vec<F> r = sigmoid(at.sum(0), bits), z = sigmoid(at.sum(1), bits);
    Vec<F> q = load(at.hidden + 2 * kLanes<F>);
    if (at.bias_q) q += load(at.bias_q + at.unit, at.n);
    const Vec<F> n = precise_tanh(load(at.input + 2 * kLanes<F>) + r * q, bits);
    if (at.gates) at.save(0, r), at.save(1, z), at.save(2, n), at.save(3, q);
    return (F(1) - z) * n + z * load_row(at.h_prev + at.unit, at.n);
  }

  template <typename F, typename Row>
  RNNATTN_INLINE static void backward(const BackwardUnits<F, Row>& at, Vec<F> dh) {
    const Vec<F> r = at.gate(0), z = at.gate(1), n = at.gate(2), q = at.gate(3);
    const Vec<F> dn = dh * (F(1) - z) * (F(1) - n * n);
    at.put(0, dn);
    at.put(1, dn * q * r * (F(1) - r));
    at.put(2, dh * (at.h_prev - n) * z * (F(1) - z));
    at.put(3, dn * r);
    store<F>(at.carry + at.unit, dh * z, at.n);
  }
};

// h = tanh(a) or relu(a); the derivative comes from h itself, all of it through 1 - h^2.
template <Mode mode>
struct Rnn {
  static constexpr int kGates = 1, kUnits = 4, kSummed = 1;
  static constexpr bool kNeedsH = true, kNeedsPrevious = false, kCarry = false;

  template <typename F, typename Row>
  RNNATTN_INLINE static Vec<F> forward(const ForwardUnits<F, Row>& at) {
    const Vec<F> a = at.sum(0);
    if constexpr (mode == Mode::kTanh) return precise_tanh(a, Bits<Row>());
    else return a <= F(0) ? Vec<F>{} : a;  // NaN stays
  }

  template <typename F, typename Row>
  RNNATTN_INLINE static void backward(const BackwardUnits<F, Row>& at, Vec<F> dh) {
    if constexpr (mode == Mode::kTanh) at.put(0, dh * (F(1) - at.h * at.h));
    else at.put(0, at.h <= F(0) ? Vec<F>{} : dh);
  }
};

static_assert(Gru::kGates == rnnattn::weight_gates(Mode::kGru) && Rnn<Mode::kRelu>::kUnits == rnnattn::unit_vectors(Mode::kRelu));

template <typename Body>
inline void with_cell(Mode mode, const Body& body) {
  switch (mode) {
    case Mode::kLstm: return body(Lstm{});
    case Mode::kGru: return body(Gru{});
    case Mode::kTanh: return body(Rnn<Mode::kTanh>{});
    case Mode::kRelu: return body(Rnn<Mode::kRelu>{});
  }
}

}  // namespace
