#include "plan.h"

#include <algorithm>
#include <cmath>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace rnnattn {
namespace {

// Measured on AVX-512 servers; only their proportions matter.
constexpr double kMultiplyAdds = 2;        // vectors a core multiplies and adds per cycle
constexpr double kNearBytes = 48;          // it reads per cycle from its own cache
constexpr double kFarBytes = 8;            // and from the shared one
constexpr double kMeeting = 1000;          // cycles of a barrier
constexpr double kVectorOfUnits = 150;     // cycles of the cell on one vector
constexpr double kStart = 10000;           // cycles until threads have begun

int64_t parts(int64_t n, int64_t of) { return (n + of - 1) / of; }

// Vectors of units in a block, and the blocks, which members share out.
int64_t block_vectors(const LayerShape& s) { return s.backward ? 4 : unit_vectors(s.mode); }
int64_t blocks_of_units(const LayerShape& s) { return parts(s.H, s.lanes * block_vectors(s)); }

// Cycles of one step of one member.
double step_cycles(const LayerShape& s, int groups, int members) {
  const double rows = std::max(1.0, s.mean_rows / groups);
  const int64_t gates = weight_gates(s.mode);
  const int64_t vectors = std::min(parts(s.H, s.lanes), parts(blocks_of_units(s), members) * block_vectors(s));  // of units
  const double panel_bytes = double(vectors) * gates * s.R * s.lanes * s.element;
  const double multiply = rows * vectors * gates * s.R / kMultiplyAdds;
  // A panel is read anew for every six rows or so, from the core's own cache once it is there.
  const double read = panel_bytes * std::ceil(rows / 6) / kNearBytes;
  // Half of the cache is for everything else; what is fetched ahead comes mostly in time.
  const double fetch = panel_bytes > private_cache() / 2 ? panel_bytes / kFarBytes : 0;
  return std::max({multiply, read, fetch}) + fetch / 8 + rows * vectors * kVectorOfUnits + (members > 1 ? kMeeting : 0);
}

}  // namespace

int64_t private_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
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
