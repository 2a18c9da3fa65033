// The order in which scans take the rows of a batch, and the slots of their (step, row) pairs: for
// rows of one length simply t * B + b, for others the layout of a packed sequence.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../optional_tensor.h"
#include "../recurrent.h"

namespace rnnattn {

class RowOrder {
 public:
  RowOrder(const OptionalTensor& lengths, int64_t T, int64_t B, int groups) : ragged(lengths.has_value()), offset_(T) {
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
  }

  Rows group(int g, bool reverse) const {
    const int64_t first = first_[g];
    return {first_[g + 1] - first, row_.data() + first, length_.data() + first, place_.data() + first, offset_.data(), reverse};
  }

  // Calls body(b, length, place) for every row.
  template <typename Body>
  void for_rows(const Body& body) const {
    for (size_t i = 0; i < row_.size(); ++i) body(row_[i], length_[i], place_[i]);
  }

  int64_t slot(int64_t t, int64_t place) const { return offset_[t] + place; }

  const bool ragged;
  int64_t slots = 0;

 private:
  std::vector<int64_t> row_, length_, place_, offset_, first_;
};

// The mean number of rows that run at a step of the longest; what a plan needs to know of lengths.
inline double mean_rows(const OptionalTensor& lengths, int64_t T, int64_t B) {
  if (!lengths || !B) return static_cast<double>(B);
  const int64_t* n = lengths->const_data_ptr<int64_t>();
  const int64_t longest = std::max<int64_t>(1, std::min(T, *std::max_element(n, n + B)));
  return static_cast<double>(std::accumulate(n, n + B, int64_t{0})) / static_cast<double>(longest);
}

}  // namespace rnnattn
