// A matrix of 16-bit numbers with its rows as columns.
#pragma once

#include "panels.h"

namespace {

// out[c][r] = rows[r][c] for n rows of some width.
inline void transpose_rows(const uint16_t* rows, int64_t row, int64_t n, int64_t width, uint16_t* out, int64_t out_row) {
  constexpr int64_t L = kLanes<float>, kLine = 64 / sizeof *out;  // numbers of a cache line, which is written at once
  for (int64_t first = 0; first < n; first += kLine)
    for (int64_t c = 0; c < width; c += L) {
      const int64_t columns = lanes_left<float>(width, c);
      for (int64_t r = first; r < n && r < first + kLine; r += L) {
        const int64_t count = lanes_left<float>(n, r);
        FloatVec block[L];
        for (int64_t i = 0; i < L; ++i) block[i] = i < count ? from_bits(load_narrow(rows + (r + i) * row + c, columns)) : FloatVec{};
        transpose<float>(block);
        for (int64_t i = 0; i < columns; ++i)
          store_narrow(out + (c + i) * out_row + r, bits(block[i]), count);
      }
    }
}

}  // namespace
