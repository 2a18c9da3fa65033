// Compiled once per way to multiply bfloat16, with -DRNNATTN_ISA=avx512_bf16|amx|emulated and its flags. The scans
// alone: the rest of a table is that of the vectors they are made of (isa.cpp).
#include "backward_scan.h"
#include "bfloat16_product.h"
#include "forward_scan.h"
#include "isa.h"
#include "transpose.h"

namespace {

void forward_scan_of_bfloat16(const ForwardScan<float>& scan, const Member<float>& member) {
  scan_forward<BFloat16Rows>(scan, member);
  BFloat16Rows::finish();
}

void backward_scan_of_bfloat16(const BackwardScan<float>& scan, const Member<float>& member) {
  scan_backward<BFloat16Rows>(scan, member);
  BFloat16Rows::finish();
}

}  // namespace

namespace rnnattn {

extern const BFloat16Scans RNNATTN_CONCAT(bfloat16_scans_, RNNATTN_ISA);
const BFloat16Scans RNNATTN_CONCAT(bfloat16_scans_, RNNATTN_ISA) = {
    BFloat16Rows::kTileRows > 1, forward_scan_of_bfloat16, backward_scan_of_bfloat16, transpose_rows};

}  // namespace rnnattn
