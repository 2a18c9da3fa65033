// One direction of a recurrent layer for the scans of csrc/cpu without torch: its numbers in plain
// vectors, and the threads, as std::thread, that compute it together.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/cpu/barrier.h"
#include "../../csrc/cpu/isa.h"
#include "sixteen_bits.h"

namespace rnnattn::test {

struct Shape {
  Mode mode;
  Stored stored;
  int64_t T, B, I, H, R;  // R != H: with a projection
  bool biased, ragged, reverse, packed;
  int groups, members;
  int64_t chunk;
  Panel panel = Panel::kFull;
  bool resets = false, to_initial = false;

  bool projected() const { return R != H; }
  // Whether products take bfloat16 as it is stored.
  bool narrow() const {
    return kernel_table().bfloat16 && stored == Stored::kBFloat16 && panel == Panel::kBFloat16 && !projected();
  }
  int64_t gates() const { return weight_gates(mode); }
  int64_t columns() const { return gate_columns(mode); }
};

// Numbers in memory as a scan has them: as F, or in 16 bits.
template <typename F>
class Numbers {
 public:
  Numbers(Stored stored, int64_t n) : stored_(stored), full_(stored == Stored::kFull ? n : 0, NAN), narrow_(n - full_.size(), 0xffff) {}
  double operator[](int64_t i) const { return full_.empty() ? decode(stored_, narrow_[i]) : full_[i]; }
  void set(int64_t i, double value) {
    if (full_.empty()) narrow_[i] = encode(stored_, rounded(stored_, value));
    else full_[i] = value;
  }
  void* data() { return full_.empty() ? static_cast<void*>(narrow_.data()) : full_.data(); }
  int64_t size() const { return full_.size() + narrow_.size(); }

 private:
  Stored stored_;
  std::vector<F> full_;
  std::vector<uint16_t> narrow_;
};

template <typename F>
struct Layer {
  const Shape s;
  std::vector<int64_t> length;                        // [B]
  std::vector<F> w_ih, w_hh, w_hr, b_ih, b_hh, h0, c0;  // as torch holds them, and numbers that the panels can hold
  std::vector<F> dh_n, dc_n;
  std::unique_ptr<bool[]> resets;                     // [T, B], or null
  std::vector<F> h_reset, c_reset;                    // as h0 and c0
  Numbers<F> x, dy;                                   // [T, B, I], [T, B, R]
  Numbers<F> y, gates;                                // outputs, NaN before: [T, B, R], [T, B, columns * H]
  Numbers<F> d_gates;
  std::vector<F> cells, c_n, d_bias, dh_out, dh, dc, dh_reset, dc_reset;  // d_bias [groups, columns * H]
  std::vector<int64_t> order, offset;                 // rows, longest first; slot of the first row at step t
  std::vector<int64_t> first, x_first, dy_first;      // [T] the first row, and the first elements, of step t
  int64_t slots = 0;

  Layer(const Shape& shape, unsigned seed)
      : s(shape), x(s.stored, s.T * s.B * s.I), dy(s.stored, s.T * s.B * s.R), y(s.stored, s.T * s.B * s.R),
        gates(s.stored, s.T * s.B * s.columns() * s.H), d_gates(s.stored, 0) {
    std::mt19937 random(seed);
    const auto uniform = [&](double bound) { return std::ldexp(static_cast<double>(random()), -31) * bound - bound; };
    const auto draw = [&](std::vector<F>& to, int64_t n, double bound) {
      to.resize(n);
      for (F& value : to) value = rounded(s.stored, uniform(bound));
    };
    const double bound = 1 / std::sqrt(static_cast<double>(s.H));
    draw(w_ih, s.gates() * s.H * s.I, bound), draw(w_hh, s.gates() * s.H * s.R, bound);
    if (s.panel != Panel::kFull)
      for (auto* w : {&w_ih, &w_hh})
        for (F& value : *w) value = s.panel == Panel::kBFloat16 ? rounded(Stored::kBFloat16, value) : std::nearbyint(value / bound * 127) * kScale;
    if (s.projected()) draw(w_hr, s.R * s.H, bound);
    if (s.biased) draw(b_ih, s.gates() * s.H, bound), draw(b_hh, s.gates() * s.H, bound);
    draw(h0, s.B * s.R, 1), draw(c0, s.B * s.H, 1), draw(dh_n, s.B * s.R, 1), draw(dc_n, s.B * s.H, 1);
    for (int64_t i = 0; i < x.size(); ++i) x.set(i, uniform(2));
    for (int64_t i = 0; i < dy.size(); ++i) dy.set(i, uniform(1));
    for (int64_t b = 0; b < s.B; ++b) length.push_back(s.ragged ? random() % (s.T + 1) : s.T);
    if (s.resets) {
      resets = std::make_unique<bool[]>(s.T * s.B);
      for (int64_t i = 0; i < s.T * s.B; ++i) resets[i] = random() % 3 == 0;
    }
    h_reset = s.to_initial ? h0 : std::vector<F>(h0.size()), c_reset = s.to_initial ? c0 : std::vector<F>(c0.size());
    order.resize(s.B);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    for (int64_t t = 0; t < s.T; ++t) {
      offset.push_back(slots), first.push_back(t * s.B), x_first.push_back(t * s.B * s.I), dy_first.push_back(t * s.B * s.R);
      slots += std::count_if(length.begin(), length.end(), [&](int64_t n) { return n > t; });
    }
  }

  int64_t time_of(int64_t b, int64_t step) const { return s.reverse ? length[b] - 1 - step : step; }
  bool is_reset(int64_t b, int64_t step) const {
    const int64_t border = time_of(b, step) + (s.reverse ? 1 : 0);
    return resets && border < length[b] && resets[border * s.B + b];
  }
  int64_t slot_of(int64_t b, int64_t t) const { return offset[t] + (std::find(order.begin(), order.end(), b) - order.begin()); }

  void forward() {
    const int64_t vectors = unit_vectors(s.mode), lanes = kernels<F>().lanes, block = s.gates() * vectors * lanes;
    const std::vector<F> held_ih = held(w_ih), held_hh = held(w_hh);
    const Packing<F> ih{held_ih.data(), 1, s.I, s.I, s.H, s.gates(), vectors, s.panel}, hh{held_hh.data(), 1, s.R, s.R, s.H, s.gates(), vectors, s.panel};
    const Panels panels_ih = pack(ih), panels_hh = pack(hh), panels_hr = pack({w_hr.data(), 1, s.H, s.H, s.R, 1, kernels<F>().wide_vectors});
    std::vector<F> sums(b_ih);  // of the biases that stand outside of GRU's r * q
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += s.mode == Mode::kGru && i >= size_t(2 * s.H) ? 0 : b_hh[i];
    const std::vector<F> scale(s.panel == Panel::kInt8 ? blocks_of(s.H, vectors) * block : 0, kScale);
    const Panels bias = pack({sums.data(), 0, 1, 1, s.H, s.gates(), vectors});
    const bool lstm = s.mode == Mode::kLstm;
    const auto as_rows = [&](const std::vector<F>& states) {
      Numbers<F> rows(s.narrow() ? s.stored : Stored::kFull, states.size());
      for (size_t i = 0; i < states.size(); ++i) rows.set(i, states[i]);
      return rows;
    };
    Numbers<F> h0_rows = as_rows(h0), h_reset_rows = as_rows(h_reset);
    std::vector<F> h(s.stored == Stored::kFull || s.narrow() ? 0 : 2 * s.B * s.R, NAN), h_raw(s.projected() ? s.B * s.H : 0, NAN);
    cells.assign(lstm ? s.T * s.B * s.H : 0, NAN), c_n = c0;
    const int64_t blocks = blocks_of(s.H, vectors), blocks_hr = s.projected() ? blocks_of(s.R, kernels<F>().wide_vectors) : 0;
    run([&](const Rows& rows, int index, Barrier* barrier) {
      const int64_t first = share(blocks, index), last = share(blocks, index + 1), chunk_rows = s.chunk * rows.n;
      std::vector<F> gates_x((s.chunk > 1 || s.narrow() ? last - first : 1) * chunk_rows * block, NAN), wide(s.stored == Stored::kFull || s.narrow() ? 0 : chunk_rows * s.I, NAN);
      std::vector<uint16_t> narrow(s.narrow() ? chunk_rows * padded_row(s.I) + rows.n * padded_row(s.R) : 0, 0xffff);
      std::vector<const void*> pointers(chunk_rows + 2 * rows.n);
      std::vector<F> panel(s.packed ? 0 : block * std::max(panel_depth(s.panel, s.I), panel_depth(s.panel, s.R)), NAN);
      const Member<F> member{.index = index, .first = first, .last = last, .first_projected = share(blocks_hr, index),
                             .last_projected = share(blocks_hr, index + 1), .gates_x = gates_x.data(),
                             .copies = s.narrow() ? static_cast<void*>(narrow.data()) : wide.data(),
                             .pointers = pointers.data(), .panel = panel.data()};
      const ForwardScan<F> scan{
          .mode = s.mode, .stored = s.stored, .T = s.T, .B = s.B, .I = s.I, .H = s.H, .R = s.R, .rows = rows, .barrier = barrier,
          .x = const_cast<Numbers<F>&>(x).data(), .x_first = x_first.data(), .x_row = s.I, .unpacked_ih = ih, .unpacked_hh = hh,
          .panel = s.panel, .w_ih = s.packed ? panels_ih.data() : nullptr, .w_hh = s.packed ? panels_hh.data() : nullptr,
          .scale_ih = scale.empty() ? nullptr : scale.data(), .scale_hh = scale.empty() ? nullptr : scale.data(), .bias = s.biased ? bias.floats() : nullptr, .bias_q = s.biased && s.mode == Mode::kGru ? b_hh.data() + 2 * s.H : nullptr,
          .w_hr = s.projected() ? panels_hr.floats() : nullptr, .h0 = h0_rows.data(), .h = h.empty() ? nullptr : h.data(),
          .h_raw = h_raw.empty() ? nullptr : h_raw.data(), .c = lstm ? c_n.data() : nullptr, .y = y.data(), .y_row = s.R,
          .gates = s.columns() > 1 ? gates.data() : nullptr, .cells = lstm ? cells.data() : nullptr, .chunk = s.chunk,
          .resets = {resets.get(), h_reset_rows.data(), c_reset.data()}};
      if constexpr (std::is_same_v<F, float>)
        if (s.narrow()) return kernel_table().bfloat16->forward_scan(scan, member);
      kernels<F>().forward_scan(scan, member);
    });
  }

  // From the outputs as they stand: the forward's, or those of the equations.
  void backward() {
    const int64_t wide = kernels<F>().wide_vectors;
    const bool lstm = s.mode == Mode::kLstm;
    const Panel panel = s.panel == Panel::kInt8 ? Panel::kFull : s.panel;  // int8 is for the forward alone
    const Panels panels_hh = pack({w_hh.data(), s.R, 1, s.gates() * s.H, s.R, 1, wide, panel});
    const Panels panels_hr = pack({w_hr.data(), s.H, 1, s.R, s.H, 1, wide});
    d_gates = Numbers<F>(s.narrow() ? s.stored : Stored::kFull, slots * s.columns() * s.H), d_bias.assign(s.groups * s.columns() * s.H, 0);
    dh_out.assign(s.projected() ? slots * s.R : 0, NAN);
    dh = dh_n, dc = dc_n, dh_reset.assign(dh.size(), 0), dc_reset.assign(dc.size(), 0);
    const int64_t blocks = blocks_of(s.H, wide), blocks_hr = s.projected() ? blocks_of(s.R, wide) : 0;
    run([&](const Rows& rows, int index, Barrier* barrier) {
      std::vector<const void*> pointers(2 * rows.n);
      std::vector<uint16_t> narrow(s.narrow() ? rows.n * padded_row(s.gates() * s.H) : 0, 0xffff);
      const Member<F> member{.index = index, .first = share(blocks, index), .last = share(blocks, index + 1),
                             .first_projected = share(blocks_hr, index), .last_projected = share(blocks_hr, index + 1),
                             .gates_x = nullptr, .copies = narrow.data(), .pointers = pointers.data()};
      const BackwardScan<F> scan{
          .mode = s.mode, .stored = s.stored, .T = s.T, .B = s.B, .H = s.H, .R = s.R, .rows = rows, .barrier = barrier,
          .panel = panel, .w_hh = panels_hh.data(), .w_hr = s.projected() ? panels_hr.floats() : nullptr, .dy = dy.data(),
          .dy_first = dy_first.data(), .dy_row = s.R, .y = y.data(), .y_row = s.R, .gates = gates.data(), .cells = lstm ? cells.data() : nullptr,
          .h0 = h0.data(), .c0 = c0.data(), .dh = dh.data(), .dc = lstm ? dc.data() : nullptr, .d_gates = d_gates.data(),
          .d_bias = rows.n ? d_bias.data() + rows.place[0] * s.columns() * s.H : nullptr,
          .dh_out = s.projected() ? dh_out.data() : nullptr, .resets = {resets.get(), h_reset.data(), c_reset.data()},
          .dh_reset = s.to_initial ? dh_reset.data() : nullptr, .dc_reset = s.to_initial && lstm ? dc_reset.data() : nullptr};
      if constexpr (std::is_same_v<F, float>)
        if (s.narrow()) return kernel_table().bfloat16->backward_scan(scan, member);
      kernels<F>().backward_scan(scan, member);
    });
  }

 private:
  static constexpr F kScale = 0x1p-10;  // of int8 weights

  static int64_t blocks_of(int64_t width, int64_t vectors) {
    const int64_t lanes = kernels<F>().lanes * vectors;
    return (width + lanes - 1) / lanes;
  }

  int64_t share(int64_t n, int index) const { return n * index / s.members; }

  // The panels; their memory is of words, as large as the scan's comment has it.
  struct Panels {
    Panel panel;
    std::vector<F> full;
    std::vector<int32_t> words;
    const void* data() const { return panel == Panel::kFull ? static_cast<const void*>(full.data()) : words.data(); }
    const F* floats() const { return full.data(); }
  };

  static Panels pack(const Packing<F>& packing) {
    const int64_t blocks = packing.w ? blocks_of(packing.width, packing.units) : 0;
    const bool full = packing.panel == Panel::kFull;
    const int64_t size = blocks * panel_depth(packing.panel, packing.K) * packing.gates * packing.units * kernels<F>().lanes;
    Panels out{packing.panel, std::vector<F>(full ? size : 0, NAN), std::vector<int32_t>(full ? 0 : size, -1)};
    for (int64_t block = 0; block < blocks; ++block) kernels<F>().pack_panel(packing, block, const_cast<void*>(out.data()));
    return out;
  }

  // The matrix as it is packed: int8 panels hold whole numbers, to be multiplied by kScale.
  std::vector<F> held(const std::vector<F>& w) const {
    std::vector<F> out(w);
    if (s.panel == Panel::kInt8)
      for (F& value : out) value /= kScale;
    return out;
  }

  // scan(rows, member, barrier) on a thread each for all members of all groups, all at once.
  void run(const std::function<void(const Rows&, int, Barrier*)>& scan) const {
    struct Group {
      std::vector<int64_t> row, length, place;
      std::unique_ptr<Barrier> barrier;
    };
    std::vector<Group> groups(s.groups);
    std::vector<std::thread> threads;
    for (int g = 0; g < s.groups; ++g) {
      Group& group = groups[g];
      for (int64_t place = g; place < s.B; place += s.groups) {
        group.row.push_back(order[place]), group.length.push_back(length[order[place]]), group.place.push_back(place);
      }
      if (s.members > 1) group.barrier = std::make_unique<Barrier>(s.members);
      const Rows rows{static_cast<int64_t>(group.row.size()), group.row.data(), group.length.data(), group.place.data(), offset.data(), first.data(), s.reverse};
      for (int index = 0; index < s.members; ++index)
        threads.emplace_back([&scan, &group, rows, index] { scan(rows, index, group.barrier.get()); });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace rnnattn::test
