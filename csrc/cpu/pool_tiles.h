// Which steps of x the threads take, and in which portions.
//
// A piece is what one thread takes at a time: a part of a row, or several whole rows. Its steps are
// numbered from its first row on, step n being step n % T of row b + n / T. A tile is a few kept steps of
// a piece, in the accumulation type and small enough for a cache.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../attention_pool.h"
#include "../optional_tensor.h"

namespace rnnattn {

struct Piece {
  int64_t b, begin, end;  // steps [begin, end), numbered from row b on
  int64_t rows;           // rows it touches
  int64_t first;          // how many rows the pieces before it touch
};

// Pieces of roughly equal work, several per thread so that ragged rows balance. Short rows share a
// piece where they follow one another in memory, so that their scores are one product.
inline std::vector<Piece> cut(const at::Tensor& x, const OptionalTensor& lengths, int64_t tile_steps) {
  constexpr int64_t kGrain = 1 << 15;  // elements of x below which a second thread costs more than it saves
  const int64_t B = x.size(0), T = x.size(1);
  std::vector<int64_t> steps(B, T);
  if (lengths) std::copy_n(lengths->const_data_ptr<int64_t>(), B, steps.begin());
  int64_t all = 0;
  for (int64_t& n : steps) all += n = std::clamp<int64_t>(n, 0, T);
  if (all == 0) return {};
  const int64_t size = std::max({tile_steps, kGrain / x.size(2), all / (8 * at::get_num_threads())});
  const bool shared = !lengths && x.stride(0) == T * x.stride(1);
  const int64_t rows = shared ? std::max<int64_t>(1, size / T) : 1;
  std::vector<Piece> pieces;
  int64_t first = 0;
  for (int64_t b = 0; b < B; b += rows) {
    const int64_t n = std::min(rows, B - b), end = n > 1 ? n * T : steps[b];
    for (int64_t t = 0; t < end; t += n > 1 ? end : size) {
      pieces.push_back({b, t, n > 1 ? end : std::min(t + size, end), n, first});
      first += n;
    }
  }
  return pieces;
}

// Walks the kept steps of a piece in tiles; x is stored as S.
template <typename F, typename S>
class Tiles {
 public:
  Tiles(const at::Tensor& x, const OptionalTensor& mask, int64_t size)
      : x_(x), mask_(mask ? mask->const_data_ptr<bool>() : nullptr), D_(x.size(2)), size_(size), kept_(size) {
    if (gathers()) scratch_.resize(size * D_);
  }

  // Tiles are copies where steps are left out or x is not of type F.
  bool gathers() const { return mask_ || !std::is_same_v<F, S>; }

  // Calls body(tile, kept), kept[r] being the number in the piece of the tile's step r.
  template <typename Body>
  void walk(const Piece& piece, const Body& body) {
    const S* start = x_.const_data_ptr<S>() + piece.b * x_.stride(0);
    for (int64_t t = piece.begin; t < piece.end;) {
      int64_t n = 0;
      for (; t < piece.end && n < size_; ++t)
        if (!mask_ || mask_[piece.b * x_.size(1) + t]) kept_[n++] = t;
      if (n == 0) return;
      PoolTile<F> tile{n, D_, nullptr, x_.stride(1)};
      if constexpr (std::is_same_v<F, S>) tile.x = start + kept_[0] * x_.stride(1);
      if (gathers()) {
        for (int64_t r = 0; r < n; ++r) {
          const S* from = start + kept_[r] * x_.stride(1);
          std::transform(from, from + D_, scratch_.data() + r * D_, [](S value) { return static_cast<F>(value); });
        }
        tile.x = scratch_.data();
        tile.x_stride = D_;
      }
      body(tile, kept_.data());
    }
  }

  // Calls body(row, r, part) for every row that a tile touches: row counts from the piece's first, and
  // part is the row's share of the tile, from the tile's step r on.
  template <typename Body>
  void for_rows(const PoolTile<F>& tile, const int64_t* kept, const Body& body) const {
    const int64_t T = x_.size(1);
    for (int64_t r = 0; r < tile.steps;) {
      const int64_t row = kept[r] / T;
      const int64_t next = std::lower_bound(kept + r, kept + tile.steps, (row + 1) * T) - kept;
      body(row, r, PoolTile<F>{next - r, D_, tile.x + r * tile.x_stride, tile.x_stride});
      r = next;
    }
  }

 private:
  const at::Tensor& x_;
  const bool* mask_;
  int64_t D_, size_;
  std::vector<int64_t> kept_;
  std::vector<F> scratch_;
};

}  // namespace rnnattn
