// Products of a matrix unit, and beside each the work on the sums of the one before: the unit has registers of its own, and
// the vectors would idle meanwhile.
#pragma once

#include <type_traits>

#include "product_kernel.h"

namespace {

// W multiplies tiles of rows. Work is what is to be done with the sums of some rows: left() pieces, by one() after the other.
template <int V, typename W, typename Work>
class Overlap {
  static constexpr int64_t kBlock = V * kLanes<float>;
  static constexpr int64_t kTogether = 2 * W::kTileRows;
  static constexpr int64_t kMost = kTogether + W::kTileRows - 1;  // what would not fill a tile joins the last

 public:
  // For n rows, some at a time, calls products(first row, rows, sums [rows][V][lanes], beside), which is to make the sums and
  // to call beside() some `steps` times, and begin(first row, rows, sums), whose Work is done beside products to come, or by
  // finish(). lines(first row, rows) is a LineList of what that Work will want from memory.
  template <typename Steps, typename Fetch, typename Products, typename Begin>
  void run(int64_t n, const Steps& steps, const Fetch& lines, const Products& products, const Begin& begin) {
    for (int64_t first = 0, last; first < n; first = last) {
      last = n - first > kMost ? first + kTogether : n;
      float* sums = sums_[turn_ ^= 1];
      const int64_t calls = steps(last - first), pieces = work_.left();
      const LineList& list = lines(first, last - first);
      Lines fetched = list.fetched();
      int64_t due = calls / 2, lines_due = 0;  // all spread evenly
      products(first, last - first, sums, [&] {
        for (lines_due += list.size(); lines_due >= calls; lines_due -= calls) fetched.fetch();
        for (due += pieces; due >= calls; due -= calls) work_.one();
      });
      finish();
      work_ = begin(first, last - first, sums);
    }
  }

  void finish() {
    while (work_.left()) work_.one();
  }

 private:
  alignas(64) float sums_[2][kMost * kBlock];
  int turn_ = 0;
  Work work_{};
};

// What a scan has of it: nothing where its products are the vectors' own.
struct NoOverlap {};
template <int V, typename W, typename Work>
using OverlapOfTiles = std::conditional_t<(W::kTileRows > 1), Overlap<V, W, Work>, NoOverlap>;

}  // namespace
