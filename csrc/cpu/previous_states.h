// The states that the steps of a layer started from, h_{t-1}, slot by slot as the gradients of the gates lie.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "layer.h"
#include "row_order.h"
#include "transposed.h"

namespace rnnattn {

// Where the (step, row) pairs inside their row's length stand in x and y, slot by slot.
struct Slots {
  Tensor all;            // [slots]
  Tensor first, rows;    // slots at which a scan starts from an initial state, and their rows b
  Tensor zero;           // slots at which it starts from zeros
  Tensor others, before; // the other slots, and where the step before stands

  Slots(const RowOrder& order, int64_t B, bool reverse, const bool* resets = nullptr, bool reset_to_initial = false) {
    const auto integers = at::TensorOptions().dtype(at::kLong);
    std::vector<int64_t> starts, start_rows, zeros, rest, previous;
    all = at::empty({order.slots}, integers);
    order.for_rows([&](int64_t b, int64_t length, int64_t place) {
      for (int64_t t = 0; t < length; ++t) {
        const int64_t slot = order.slot(t, place), before_t = reverse ? t + 1 : t - 1;
        all.data_ptr<int64_t>()[slot] = order.at(t, b);
        const bool anew = resets && is_reset(resets, B, b, length, reverse, t);
        if (anew && !reset_to_initial) zeros.push_back(slot);
        else if (anew || before_t < 0 || before_t >= length) starts.push_back(slot), start_rows.push_back(b);
        else rest.push_back(slot), previous.push_back(order.at(before_t, b));
      }
    });
    const auto tensor = [&](const std::vector<int64_t>& v) { return at::tensor(v, integers); };
    first = tensor(starts), rows = tensor(start_rows), zero = tensor(zeros), others = tensor(rest), before = tensor(previous);
  }
};

// out = the sum over the rows of a_i (x) b_i; for a single one a GEMM takes longer than writing it does.
inline Tensor outer_into(Tensor out, const Tensor& a, const Tensor& b) {
  return a.size(0) == 1 ? at::mul_out(out, a.t(), b) : at::mm_out(out, a.t(), b);
}

inline Tensor outer_sum(const Tensor& a, const Tensor& b) {
  return outer_into(workspace({a.size(1), b.size(1)}, a.options()), a, b);
}

// Those of one direction: y [T, B, R] or packed, h0 [B, R].
struct PreviousStates {
  const Tensor y, h0;
  const RowOrder& order;
  bool reverse;
  const OptionalTensor& resets;
  bool reset_to_initial;

  // Whether they are h0 and y but for the last step.
  bool in_order() const { return !order.ragged && !resets; }

  // out [slots, R]
  void copy_to(const Tensor& out) const {
    const int64_t T = y.size(0), B = h0.size(0), R = h0.size(1);
    if (in_order()) {
      out.narrow(0, reverse ? (T - 1) * B : 0, B).copy_(h0);
      out.narrow(0, reverse ? 0 : B, (T - 1) * B).view({T - 1, B, R}).copy_(y.narrow(0, reverse, T - 1));
      return;
    }
    const Slots slots(order, B, reverse, flags(resets), reset_to_initial);
    out.index_fill_(0, slots.zero, 0);
    out.index_copy_(0, slots.first, h0.index_select(0, slots.rows).to(out.scalar_type()));
    out.index_copy_(0, slots.others, y.reshape({-1, R}).index_select(0, slots.before).to(out.scalar_type()));
  }

  // out [R, slots], of bfloat16.
  void transpose_to(const Tensor& out) const {
    const int64_t T = y.size(0), B = h0.size(0), R = h0.size(1);
    if (in_order()) {
      transpose_into(out.narrow(1, reverse ? (T - 1) * B : 0, B), h0.to(out.scalar_type()).contiguous());
      transpose_into(out.narrow(1, reverse ? 0 : B, (T - 1) * B), y.narrow(0, reverse, T - 1).reshape({(T - 1) * B, R}));
      return;
    }
    const Tensor h = workspace({order.slots, R}, out.options());
    copy_to(h);
    transpose_into(out, h);
  }

  // The sum over all steps of d_t (x) h_{t-1}, [columns of d, R].
  Tensor product(const Tensor& d) const {
    const int64_t T = y.size(0), B = h0.size(0), R = h0.size(1);
    if (!in_order()) {
      const Tensor h = workspace({order.slots, R}, d.options());
      copy_to(h);
      return outer_sum(d, h);
    }
    const Tensor sum = outer_sum(d.narrow(0, reverse ? (T - 1) * B : 0, B), h0.to(d.scalar_type()));
    if (T == 1) return sum;
    const Tensor h = y.narrow(0, reverse, T - 1).reshape({(T - 1) * B, R}).to(d.scalar_type());
    return sum.addmm_(d.narrow(0, reverse ? 0 : B, (T - 1) * B).t(), h);
  }
};

}  // namespace rnnattn
