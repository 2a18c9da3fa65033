#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace rnnattn {
namespace {

// The usable tables, the best first.
std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(RNNATTN_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    tables.push_back(&kernels_avx512);
#endif
#if defined(RNNATTN_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kernels_avx2);
#endif
  tables.push_back(&kernels_baseline);
  return tables;
}

const KernelTable& choose() {
  const auto tables = usable_tables();
  const char* wanted = std::getenv("RNNATTN_CPU_ISA");
  if (!wanted) return *tables.front();
  std::string names;
  for (const KernelTable* table : tables) {
    if (std::string(wanted) == table->isa) return *table;
    names += names.empty() ? table->isa : std::string(", ") + table->isa;
  }
  throw std::invalid_argument("RNNATTN_CPU_ISA: expected one of " + names + " on this machine, got " + wanted);
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = choose();
  return table;
}

std::vector<const char*> compiled_isas() {
  return {
#if defined(RNNATTN_HAVE_AVX512)
      "avx512",
#endif
#if defined(RNNATTN_HAVE_AVX2)
      "avx2",
#endif
      "baseline"};
}

}  // namespace rnnattn
