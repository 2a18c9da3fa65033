// How the threads share one layer: each direction's rows are parted into groups, and the members of a
// group part its units among them. Members meet at every step; groups never do.
#pragma once

#include <cstdint>

#include "../recurrent.h"

namespace rnnattn {

struct LayerShape {
  Mode mode;
  int64_t T, B, I, H, R;
  int directions;
  double mean_rows;      // rows running at a step, over the steps of the longest
  int64_t element;       // bytes of a weight
  int64_t lanes;
  bool backward;
  bool tiles;            // products by a matrix unit
};

struct Plan {
  int groups = 1;   // of rows, per direction
  int members = 1;  // threads of a group
  int teams = 1;    // groups that run at the same time, of all directions
};

// Whether a matrix unit sums the input product of a step and the hidden one in its registers, not some steps' input products
// ahead: where rows fill its tiles and a member's weights are not much larger than its cache.
bool sums_both_products(double rows, double weight_bytes);

Plan plan_layer(const LayerShape& shape, int threads);

// Bytes of one core's second-level cache, as the system tells it.
int64_t private_cache();

}  // namespace rnnattn
