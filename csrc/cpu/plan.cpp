#include "plan.h"

#include <algorithm>
#include <cmath>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace rnnattn {
namespace {

// Measured on AVX-512 servers, one of them with AMX; only their proportions matter.
struct Rates {
  double rows_of_tile;    // rows of a product are computed so many at a time
  double multiply_adds;   // vectors a core multiplies and adds per cycle
  double near_bytes;      // it reads per cycle from its own cache
  double rows_of_read;    // for which a panel is read once
  double far_bytes;       // it reads per cycle from the shared cache
  double vector_of_units; // cycles of the cell on one vector
  double kept;            // the part of its cache that holds panels from step to step
  double meeting;         // cycles of a barrier, and until what others have written is there
};
constexpr Rates kVectors = {1, 2, 48, 6, 8, 150, 0.5, 1000};
constexpr Rates kTiles = {16, 30, 56, 32, 10, 60, 0.75, 2000};  // the cells run beside the products
constexpr double kStart = 10000;           // cycles until threads have begun

int64_t parts(int64_t n, int64_t of) { return (n + of - 1) / of; }

// Vectors of units in a block, and the blocks, which members share out.
int64_t block_vectors(const LayerShape& s) { return s.backward ? 4 : unit_vectors(s.mode); }
int64_t blocks_of_units(const LayerShape& s) { return parts(s.H, s.lanes * block_vectors(s)); }

// Cycles of one step of one member.
double step_cycles(const LayerShape& s, int groups, int members) {
  const Rates& rates = s.tiles ? kTiles : kVectors;
  const double rows = std::max(1.0, s.mean_rows / groups), tiles = std::ceil(rows / rates.rows_of_tile);
  const int64_t gates = weight_gates(s.mode);
  const int64_t vectors = std::min(parts(s.H, s.lanes), parts(blocks_of_units(s), members) * block_vectors(s));  // of units
  const double inputs = s.tiles && !s.backward ? s.I : 0;  // of the input product, which the same unit multiplies
  const double column_bytes = double(vectors) * gates * s.lanes * s.element;
  const bool at_once = sums_both_products(rows, column_bytes * (s.R + inputs));
  const double panel_bytes = column_bytes * (s.R + (at_once ? inputs : inputs / 4));  // else read once for some steps
  const double multiply = (tiles * rates.rows_of_tile * s.R + rows * inputs) * vectors * gates / rates.multiply_adds;
  // A panel is read anew for every few rows, from the core's own cache once it is there.
  const double read = panel_bytes * std::ceil(rows / rates.rows_of_read) / rates.near_bytes;
  // A part of the cache is for everything else; what is fetched ahead comes mostly in time.
  const double kept = rates.kept * private_cache(), fetch = panel_bytes > kept ? (panel_bytes - (s.tiles ? kept : 0)) / rates.far_bytes : 0;
  const double products = std::max({multiply, read, fetch}), cells = rows * vectors * rates.vector_of_units;
  return (s.tiles ? std::max(products, cells) : products + cells) + fetch / 8 + (members > 1 ? rates.meeting : 0);
}

}  // namespace

int64_t private_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

bool sums_both_products(double rows, double weight_bytes) {
  return rows >= 2 * kTiles.rows_of_tile && weight_bytes <= 2 * private_cache();
}

Plan plan_layer(const LayerShape& s, int threads) {
  Plan best;
  double least = INFINITY;
  const int64_t blocks = blocks_of_units(s);
  for (int members = 1; members <= std::min<int64_t>(threads, blocks); ++members)
    for (int groups = 1; groups <= std::min<int64_t>(threads / members, std::max<int64_t>(1, s.B)); ++groups) {
      const int teams = std::min(threads / members, groups * s.directions);
      const double cycles = step_cycles(s, groups, members) * double(s.T) * double(parts(groups * s.directions, teams)) +
                            (teams * members > 1 ? kStart : 0);
      if (cycles < least) least = cycles, best = {groups, members, teams};
    }
  return best;
}

}  // namespace rnnattn
