#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnnattn {
namespace {

// Whether tiles of bfloat16 are there, and the system lets this process use them (asked for once, for all its threads).
[[maybe_unused]] bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE: xgetbv may be asked
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;  // the system keeps tiles and their configuration
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The table of the vectors with products in bfloat16 beside.
[[maybe_unused]] KernelTable extended(KernelTable table, const char* isa, const BFloat16Scans& scans) {
  table.isa = isa;
  table.bfloat16 = &scans;
  return table;
}

// The usable tables, the best first, and last what nobody gets without asking for it.
std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(RNNATTN_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(RNNATTN_HAVE_AVX512_BF16)
    if (__builtin_cpu_supports("avx512bf16")) {
#if defined(RNNATTN_HAVE_AMX)
      static const KernelTable amx = extended(kernels_avx512, "amx", bfloat16_scans_amx);
      if (has_amx()) tables.push_back(&amx);
#endif
      static const KernelTable avx512_bf16 = extended(kernels_avx512, "avx512_bf16", bfloat16_scans_avx512_bf16);
      tables.push_back(&avx512_bf16);
    }
#endif
    tables.push_back(&kernels_avx512);
  }
#endif
#if defined(RNNATTN_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kernels_avx2);
#endif
  tables.push_back(&kernels_baseline);
#if defined(RNNATTN_HAVE_EMULATED)
  static const KernelTable emulated = extended(kernels_baseline, "emulated", bfloat16_scans_emulated);
  tables.push_back(&emulated);
#endif
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
#if defined(RNNATTN_HAVE_AMX)
      "amx",
#endif
#if defined(RNNATTN_HAVE_AVX512_BF16)
      "avx512_bf16",
#endif
#if defined(RNNATTN_HAVE_AVX512)
      "avx512",
#endif
#if defined(RNNATTN_HAVE_AVX2)
      "avx2",
#endif
      "baseline",
#if defined(RNNATTN_HAVE_EMULATED)
      "emulated",
#endif
  };
}

}  // namespace rnnattn
