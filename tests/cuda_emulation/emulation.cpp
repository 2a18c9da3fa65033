// The CUDA sources as CPU operators, torch.ops.rnnattn_cuda_emulation.*
#define RNNATTN_EMULATE_CUDA
#include "recurrent_step.cu"
//
#include "attention_pool.cu"
#include "regularised_step.cu"
#include "schemas.h"

STABLE_TORCH_LIBRARY(rnnattn_cuda_emulation, m) {
  for (const char* schema : rnnattn::cuda::kCudaSchemas) m.def(schema);
}
