// The twins of the instructions for bfloat16 (csrc/cpu/bfloat16_twins.h) against Intel's manual, and the products made
// of them (bfloat16_product.h) against sums in double, for numbers of rows and steps of k about the tiles' sizes.
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cpu/bfloat16_product.h"
#include "../../csrc/cpu/panels.h"
#include "sixteen_bits.h"

namespace {

using namespace rnnattn::test;
constexpr int64_t L = kLanes<float>;
int failures = 0;

void expect(bool good, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  if (!good && ++failures < 20) std::printf("FAILED %s (%ld, %ld, %ld)\n", what, long(a), long(b), long(c));
}

uint16_t bfloat16(double value) { return encode(Stored::kBFloat16, rounded(Stored::kBFloat16, value)); }
int32_t pair(double first, double second) { return bfloat16(first) | static_cast<uint32_t>(bfloat16(second)) << 16; }
float dot(float sum, int32_t a, int32_t w) { return dot_pairs(splat(sum), IntVec{} + a, IntVec{} + w)[L - 1]; }

void check_dots() {
  expect(dot(1, pair(2, 3), pair(5, 7)) == 32, "a sum of two products");
  expect(dot(0x1p24f, pair(1, 1), pair(1, 1)) == 0x1p24f, "each product is added and rounded");
  expect(dot(-0x1p24f, pair(1, 0x1p24), pair(1, 1)) == 1, "the second product comes first");
  expect(std::isnan(dot(0, pair(0, NAN), 0)) && std::isnan(dot(NAN, 0, 0)), "NaN stays");
  expect(std::isnan(dot(0, pair(INFINITY, 0), 0)), "infinity times zero");
  expect(dot(0, pair(0x1p-130, 0), pair(0x1p100, 0)) == 0, "subnormal numbers read");
  expect(dot(0, pair(0x1p-80, 0), pair(0x1p-60, 0)) == 0, "subnormal numbers written");
}

TileShapes shapes(int rows, int row_bytes) {
  TileShapes s;
  for (int t = 0; t < kTiles; ++t) s.rows[t] = rows, s.row_bytes[t] = row_bytes;
  return s;
}

void check_tiles() {
  const auto is_valid = [](const auto& change) {
    TileShapes s = shapes(16, 64);
    change(s);
    return tile_shapes_are_valid(s);
  };
  expect(is_valid([](TileShapes& s) { s.rows[3] = s.row_bytes[3] = 0; }), "a tile that is not used");
  expect(!is_valid([](TileShapes& s) { s.rows[3] = 17; }) && !is_valid([](TileShapes& s) { s.row_bytes[3] = 68; }), "too large");
  expect(!is_valid([](TileShapes& s) { s.rows[3] = 0; }) && !is_valid([](TileShapes& s) { s.palette = 2; }), "no shape");
  expect(!is_valid([](TileShapes& s) { s.reserved[13] = 1; }) && !is_valid([](TileShapes& s) { s.rows[8] = 1; }), "reserved bytes");

  std::vector<uint32_t> memory(64, 1), out(64, 2);
  tile_configure(shapes(2, 8));
  std::fill_n(&tile_unit.words[1][0][0], kTileRows * kTileBytes / 4, 3u);
  tile_load<1>(memory.data() + 8, -16);
  tile_store<1>(out.data(), 12);
  for (int i = 0; i < 64; ++i) expect(out[i] == (i < 2 || i == 3 || i == 4 ? 1 : 2), "two rows of two words", i);
  for (int r = 0; r < kTileRows; ++r)
    for (int k = 0; k < kTileBytes / 4; ++k) expect(tile_unit.words[1][r][k] == (r < 2 && k < 2), "zeros beyond the shape", r, k);
  tile_release();
  expect(!tile_unit.configured, "released");
}

// Columns of V vectors, some of them beyond `width`.
template <int V>
void check_product(int64_t n, int64_t K, bool apart, bool with_init) {
  constexpr int64_t columns = V * L;
  std::mt19937 random(n * 1000 + K);
  const auto uniform = [&] { return std::ldexp(static_cast<double>(random()), -31) - 1; };
  const int64_t width = columns - 1, stride = K + apart;
  std::vector<float> w(K * width), init(columns), out(n * columns + 1, -1);
  for (float& value : w) value = rounded(Stored::kBFloat16, uniform());
  for (float& value : init) value = uniform();
  std::vector<uint16_t> a(n * stride);  // its last element is the last row's: reading beyond shows in a sanitizer
  for (uint16_t& value : a) value = bfloat16(uniform());
  const rnnattn::Packing<float> packing{w.data(), width, 1, K, width, 1, V, Panel::kBFloat16};
  std::vector<int32_t> panel(panel_depth(Panel::kBFloat16, K) * columns, -1);
  pack_panel(packing, 0, panel.data());
  std::vector<const uint16_t*> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = a.data() + i * stride + (apart && i % 2);  // at no constant stride
  const std::vector<const uint16_t*> given(rows);
  std::vector<uint16_t> copies(n * rnnattn::padded_row(K), 0xffff);
  BFloat16Tiles::arrange(rows.data(), n, K, copies.data());
  const Product<float, BFloat16Tiles> product{rows.data(), K, panel.data(), panel.data()};
  multiply<V, float, BFloat16Tiles>(product, 0, n, with_init ? init.data() : nullptr, out.data());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t column = 0; column < width; ++column) {
      double sum = with_init ? init[column] : 0;
      for (int64_t k = 0; k < K; ++k) sum += decode(Stored::kBFloat16, given[i][k]) * w[k * width + column];
      expect(std::fabs(out[i * columns + column] - sum) <= 1e-6 * (K + 1), "product", n, K, i * columns + column);
    }
  expect(out.back() == -1, "nothing written beyond", n, K);
  BFloat16Tiles::finish();
}

}  // namespace

int main() {
  check_dots();
  check_tiles();
  for (int64_t n : {1, 2, 4, 5, 15, 16, 17, 31, 32, 33, 48, 50})
    for (int64_t K : {1, 2, 3, 31, 32, 33, 64, 97})
      for (bool apart : {false, true})
        for (bool with_init : {false, true}) check_product<3>(n, K, apart, with_init), check_product<4>(n, K, apart, with_init);
  std::printf("products of bfloat16, vectors of %d bytes: %d failures\n", kVectorBytes, failures);
  return failures != 0;
}
