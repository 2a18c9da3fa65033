// The twins of the instructions for bfloat16 (csrc/cpu/bfloat16_twins.h) against Intel's manual, and the products made
// of them (bfloat16_product.h) against sums in double, for numbers of rows and steps of k about the tiles' sizes.
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cpu/bfloat16_product.h"
#include "../../csrc/cpu/panels.h"
#include "../../csrc/cpu/transpose.h"
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
  // Twice the same product: sums go on from one to the next. Some columns in a call of their own, and all rows in it.
  const Product<float, BFloat16Tiles> products[2] = {{rows.data(), K, panel.data(), nullptr}, {rows.data(), K, panel.data(), nullptr}};
  const float* from = with_init ? init.data() : nullptr;
  int64_t calls = 0;
  const auto beside = [&] { ++calls; };
  BFloat16Tiles::multiply<V, 0, V - 1>(products, 2, 0, n, from, 0, out.data(), beside);
  BFloat16Tiles::multiply<V, V - 1, 1>(products, 2, 0, n, from, 0, out.data(), beside);
  expect(calls == 2 * (BFloat16Tiles::steps<V - 1>(n, K) + BFloat16Tiles::steps<1>(n, K)), "steps", n, K, calls);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t column = 0; column < width; ++column) {
      double sum = with_init ? init[column] : 0;
      for (int64_t k = 0; k < K; ++k) sum += 2 * decode(Stored::kBFloat16, given[i][k]) * w[k * width + column];
      expect(std::fabs(out[i * columns + column] - sum) <= 2e-6 * (K + 1), "product", n, K, i * columns + column);
    }
  expect(out.back() == -1, "nothing written beyond", n, K);
  BFloat16Tiles::finish();
}

// Sums that begin with a row each, those of the rows from `begin` on.
void check_rows_of_init() {
  constexpr int64_t V = 4, K = 32, n = 5, begin = 2;
  std::vector<uint16_t> a((n + begin) * K, bfloat16(1));
  std::vector<int32_t> panel(K / 2 * V * L, pair(1, 1));
  std::vector<float> init(n * V * L), out(init.size());
  for (size_t i = 0; i < init.size(); ++i) init[i] = i;
  std::vector<const uint16_t*> rows(n + begin);
  for (int64_t i = 0; i < n + begin; ++i) rows[i] = a.data() + i * K;
  for (int64_t i = begin * K; i < (n + begin) * K; ++i) a[i] = bfloat16(2);
  TileShapes s = shapes(n, L * 4);
  for (int t = 4; t < kTiles; ++t) s.rows[t] = t < 6 ? n : 16, s.row_bytes[t] = t < 6 ? kTileBytes : L * 4;
  tile_configure(s);
  const Product<float, BFloat16Tiles> product{rows.data(), K, panel.data(), nullptr};
  BFloat16Tiles::multiply<V, 0, V>(&product, 1, begin, n, init.data(), V * L, out.data(), [] {});
  for (size_t i = 0; i < out.size(); ++i) expect(out[i] == init[i] + 2 * K, "rows of init", i);
  BFloat16Tiles::finish();
}

// Weights that are bfloat16 are packed as those are that become it, rows and columns.
void check_packing() {
  for (int64_t K : {1, 2, 15, 16, 31, 32, 33, 70})
    for (int64_t width : {1, 7, 64})
      for (bool by_rows : {false, true}) {
        std::mt19937 random(K * 100 + width);
        std::vector<uint16_t> w(K * width);
        std::vector<float> wide(w.size());
        for (size_t i = 0; i < w.size(); ++i) w[i] = bfloat16(std::ldexp(random(), -31)), wide[i] = decode(Stored::kBFloat16, w[i]);
        rnnattn::Packing<float> packing{wide.data(), by_rows ? width : 1, by_rows ? 1 : K, K, width, 1, 3, Panel::kBFloat16};
        std::vector<int32_t> want(panel_depth(Panel::kBFloat16, K) * 3 * L, -1), got(want);
        const int64_t blocks = (width + 3 * L - 1) / (3 * L);
        want.resize(want.size() * blocks, -1), got.resize(want.size(), -1);
        for (int64_t block = 0; block < blocks; ++block) pack_panel(packing, block, want.data());
        packing.w = w.data(), packing.stored = Stored::kBFloat16;
        for (int64_t block = 0; block < blocks; ++block) pack_panel(packing, block, got.data());
        expect(got == want, "packing", K, width, by_rows);
      }
}

void check_transpose() {
  for (int64_t n : {1, 16, 31, 33, 70})
    for (int64_t width : {1, 15, 17, 40}) {
      const int64_t row = width + 3, out_row = n + 5;
      std::vector<uint16_t> rows(n * row), out(width * out_row, 0xffff);
      for (size_t i = 0; i < rows.size(); ++i) rows[i] = i * 2654435761u >> 8;
      transpose_rows(rows.data(), row, n, width, out.data(), out_row);
      for (int64_t c = 0; c < width; ++c)
        for (int64_t r = 0; r < out_row; ++r) expect(out[c * out_row + r] == (r < n ? rows[r * row + c] : 0xffff), "transpose", n, width, r);
    }
}

}  // namespace

int main() {
  check_dots();
  check_tiles();
  check_rows_of_init();
  check_packing();
  check_transpose();
  for (int64_t n : {1, 2, 4, 5, 15, 16, 17, 31, 32, 33, 48, 50})
    for (int64_t K : {1, 2, 3, 31, 32, 33, 64, 97})
      for (bool apart : {false, true})
        for (bool with_init : {false, true}) check_product<3>(n, K, apart, with_init), check_product<4>(n, K, apart, with_init);
  std::printf("products of bfloat16, vectors of %d bytes: %d failures\n", kVectorBytes, failures);
  return failures != 0;
}
