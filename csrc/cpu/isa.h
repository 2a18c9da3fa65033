// The kernels of one instruction set as a table, and the choice of a table at run time.
// Knows no torch.
#pragma once

#include <vector>

#include "../attention_pool.h"
#include "../regularised.h"

// A name that ends in that of the instruction set in RNNATTN_ISA.
#define RNNATTN_CONCAT_(a, b) a##b
#define RNNATTN_CONCAT(a, b) RNNATTN_CONCAT_(a, b)

namespace rnnattn {

template <typename F>
struct Kernels {
  int64_t lanes;         // of a vector
  int64_t wide_vectors;  // of a panel that has plain columns
  void (*pack_panel)(const Packing<F>&, int64_t block, void* panels);
  void (*forward_scan)(const ForwardScan<F>&, const Member<F>&);
  void (*backward_scan)(const BackwardScan<F>&, const Member<F>&);
  int64_t (*regularised_numbers)(Mode, int64_t rows, int64_t H);  // that either scan of so many rows needs
  void (*regularised_forward)(const RegularisedForward<F>&, F* numbers, const void** pointers);
  void (*regularised_backward)(const RegularisedBackward<F>&, F* numbers, const void** pointers);
  void (*pool_dot)(const PoolTile<F>&, const F* v, F* s);
  void (*pool_add)(const PoolTile<F>&, const F* weights, F* out);
  F (*pool_exp)(int64_t steps, const F* s, F shift, F* p);
  void (*pool_softmax)(const PoolTile<F>&, const F* s, F* p, PoolState<F>&);
  void (*pool_outer)(const PoolTile<F>&, const F* p, const F* g, const F* ds, const F* v, F* dx, int64_t dx_stride);
  void (*additive_scores)(const AdditiveScores<F>&);
  void (*additive_gradient)(const AdditiveGradient<F>&);
};

// Scans whose products take bfloat16 as it is stored: x, h0 and y, and the gates' gradients; the panels hold bfloat16.
// For packed weights without a projection.
struct BFloat16Scans {
  bool tiles;  // a matrix unit's
  void (*forward_scan)(const ForwardScan<float>&, const Member<float>&);
  void (*backward_scan)(const BackwardScan<float>&, const Member<float>&);
  void (*transpose_rows)(const uint16_t* rows, int64_t row, int64_t n, int64_t width, uint16_t* out, int64_t out_row);
};

struct KernelTable {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
  const BFloat16Scans* bfloat16 = nullptr;  // where the instruction set has such products
};

// One per instruction set that was compiled (kernels.cpp, bfloat16_kernels.cpp).
extern const KernelTable kernels_baseline;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const BFloat16Scans bfloat16_scans_avx512_bf16;
extern const BFloat16Scans bfloat16_scans_amx;
extern const BFloat16Scans bfloat16_scans_emulated;

// The best table this machine can run, or the lower one that RNNATTN_CPU_ISA names; chosen once.
const KernelTable& kernel_table();

// The names of all compiled tables, usable here or not.
std::vector<const char*> compiled_isas();

template <typename F> const Kernels<F>& kernels();
template <> inline const Kernels<float>& kernels<float>() { return kernel_table().f32; }
template <> inline const Kernels<double>& kernels<double>() { return kernel_table().f64; }

}  // namespace rnnattn
