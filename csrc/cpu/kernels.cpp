// Compiled once per instruction set, with -DRNNATTN_ISA=baseline|avx2|avx512 and its flags.
#include "attention_pool_kernel.h"
#include "backward_scan.h"
#include "forward_scan.h"
#include "isa.h"
#include "panels.h"
#include "regularised_backward.h"
#include "regularised_forward.h"

#define RNNATTN_TEXT_(a) #a
#define RNNATTN_TEXT(a) RNNATTN_TEXT_(a)

namespace {

template <typename F>
constexpr rnnattn::Kernels<F> table() {
  return {kLanes<F>,           kWide,           pack_panel<F>, forward_scan<F>, backward_scan<F>, regularised_numbers<F>,
          regularised_forward<F>, regularised_backward<F>, pool_dot<F>, pool_add<F>, pool_exp<F>, pool_softmax<F>,
          pool_outer<F>, additive_scores<F>, additive_gradient<F>};
}

}  // namespace

namespace rnnattn {

extern const KernelTable RNNATTN_CONCAT(kernels_, RNNATTN_ISA);
const KernelTable RNNATTN_CONCAT(kernels_, RNNATTN_ISA) = {RNNATTN_TEXT(RNNATTN_ISA), table<float>(), table<double>()};

}  // namespace rnnattn
