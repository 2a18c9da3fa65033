// The order in which scans take the rows of a batch, and the slots of their (step, row) pairs: for
// rows of one length simply t * B + b, for others the layout of a packed sequence, as which x may lie.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "../optional_tensor.h"
#include "../recurrent.h"

namespace rnnattn {

// The steps and rows of a layer's input x: [T, B, I], or a packed sequence [slots, I].
struct BatchShape {
  int64_t T, B;
  bool packed = false;
};

// Checks what comes with a packed sequence: its lengths, and no resets.
inline BatchShape batch_shape(const at::Tensor& x, int64_t B, const OptionalTensor& lengths, const OptionalTensor& resets) {
  if (x.dim() == 3) return {x.size(0), B};
  TORCH_CHECK(x.dim() == 2, "x: expected 3 dimensions, or 2 of a packed sequence, got shape ", x.sizes());
  TORCH_CHECK(!resets, "resets: expected none with a packed sequence");
  TORCH_CHECK(lengths && B > 0 && lengths->numel() == B, "lengths: expected those of the ", B, " rows of a packed sequence");
  const int64_t* length = lengths->const_data_ptr<int64_t>();
  TORCH_CHECK(length[B - 1] > 0 && std::is_sorted(length, length + B, std::greater<>()) &&
                  std::accumulate(length, length + B, int64_t{0}) == x.size(0),
              "lengths: expected positive ones of a packed sequence in falling order with a sum of ", x.size(0));
  return {length[0], B, true};
}

class RowOrder {
 public:
  RowOrder(const OptionalTensor& lengths, const BatchShape& shape, int groups)
      : ragged(lengths.has_value()), packed(shape.packed), offset_(shape.T) {
    const int64_t T = shape.T, B = shape.B;
    std::vector<int64_t> order(B), length(B, T);
    if (ragged)
      for (int64_t b = 0; b < B; ++b) length[b] = std::clamp<int64_t>(lengths->const_data_ptr<int64_t>()[b], 0, T);
    std::iota(order.begin(), order.end(), 0);
    if (ragged)
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    // Dealt out one by one, the groups have nearly the same number of rows at every step.
    for (int group = 0; group < groups; ++group) {
      first_.push_back(row_.size());
      for (int64_t place = group; place < B; place += groups) {
        row_.push_back(order[place]);
        length_.push_back(length[order[place]]);
        place_.push_back(place);
      }
    }
    first_.push_back(B);
    int64_t running = B;
    for (int64_t t = 0; t < T; ++t) {
      while (running && length[order[running - 1]] <= t) --running;
      offset_[t] = slots;
      slots += running;
    }
    places = packed ? slots : T * B;
    steps_ = first_elements(B, 1);
  }

  Rows group(int g, bool reverse) const {
    const int64_t first = first_[g];
    return {first_[g + 1] - first, row_.data() + first, length_.data() + first, place_.data() + first, offset_.data(), steps_.data(), reverse};
  }

  // The first element of each step of a tensor [T, B, n] with these strides, or of one laid out as x that is packed.
  std::vector<int64_t> first_elements(int64_t step, int64_t row) const {
    std::vector<int64_t> first(offset_.size());
    for (size_t t = 0; t < first.size(); ++t) first[t] = packed ? offset_[t] * row : t * step;
    return first;
  }

  // Calls body(b, length, place) for every row.
  template <typename Body>
  void for_rows(const Body& body) const {
    for (size_t i = 0; i < row_.size(); ++i) body(row_[i], length_[i], place_[i]);
  }

  int64_t slot(int64_t t, int64_t place) const { return offset_[t] + place; }
  int64_t at(int64_t t, int64_t b) const { return steps_[t] + b; }

  const bool ragged, packed;
  int64_t slots = 0, places;  // of (step, row) pairs: those inside their row's length, and those that x has

 private:
  std::vector<int64_t> row_, length_, place_, offset_, first_, steps_;
};

// The mean number of rows that run at a step of the longest; what a plan needs to know of lengths.
inline double mean_rows(const OptionalTensor& lengths, const BatchShape& shape) {
  if (!lengths || !shape.B) return static_cast<double>(shape.B);
  const int64_t *n = lengths->const_data_ptr<int64_t>(), *end = n + shape.B;
  const int64_t longest = std::max<int64_t>(1, std::min(shape.T, *std::max_element(n, end)));
  return static_cast<double>(std::accumulate(n, end, int64_t{0})) / static_cast<double>(longest);
}

}  // namespace rnnattn
