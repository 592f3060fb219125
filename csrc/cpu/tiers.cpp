#include "tiers.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ckd::cpu {

// setup.py defines CKD_HAS_... for the tiers whose flags the compiler knows.
#if defined(CKD_HAS_AMX)
namespace amx {
extern const Kernels kernels;
}
#endif
#if defined(CKD_HAS_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#if defined(CKD_HAS_AVX512)
namespace avx512 {
extern const Kernels kernels;
}
#endif
#if defined(CKD_HAS_AVX2)
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

namespace {

struct Processor {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
  bool fast_avx512_bf16 = false;
};

#if defined(__x86_64__)

bool bit(unsigned word, int n) { return (word >> n & 1) != 0; }

// Linux grants the 8 KiB of AMX state only to processes that request it.
bool permit_amx() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
  return false;
#endif
}

Processor processor() {
  Processor has;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return has;
  const bool intel = b == signature_INTEL_ebx;
  __get_cpuid(1, &a, &b, &c, &d);
  const bool fma = bit(c, 12), f16c = bit(c, 29), xsave = bit(c, 27);
  if (!xsave) return has;
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
  const bool tiles = (low & 0x60000) == 0x60000;

  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return has;
  has.avx2 = ymm && fma && f16c && bit(b, 5);
  // F, DQ, BW, VL.
  has.avx512 = has.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  const bool amx = bit(d, 22) && bit(d, 24);
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return has;
  has.avx512_bf16 = has.avx512 && bit(a, 5);
  // On Sapphire Rapids vdpbf16ps has half the throughput of float32 FMA, on Zen 4 twice.
  has.fast_avx512_bf16 = has.avx512_bf16 && !intel;
  has.amx = has.avx512_bf16 && amx && tiles && permit_amx();
  return has;
}

#else

Processor processor() { return {}; }

#endif

std::vector<Tier> find_tiers() {
  const Processor has = processor();
  std::vector<Tier> found;
#if defined(CKD_HAS_AMX)
  if (has.amx) found.push_back({"amx", &amx::kernels});
#endif
#if defined(CKD_HAS_AVX512_BF16)
  if (has.fast_avx512_bf16) found.push_back({"avx512_bf16", &avx512_bf16::kernels});
#endif
#if defined(CKD_HAS_AVX512)
  if (has.avx512) found.push_back({"avx512", &avx512::kernels});
#endif
#if defined(CKD_HAS_AVX512_BF16)
  if (has.avx512_bf16 && !has.fast_avx512_bf16) {
    found.push_back({"avx512_bf16", &avx512_bf16::kernels});
  }
#endif
#if defined(CKD_HAS_AVX2)
  if (has.avx2) found.push_back({"avx2", &avx2::kernels});
#endif
  found.push_back({"portable", &portable::kernels});
  (void)has;
  return found;
}

}  // namespace

const std::vector<Tier>& tiers() {
  static const std::vector<Tier> found = find_tiers();
  return found;
}

const Tier& tier(const std::string& name) {
  std::string known;
  for (const Tier& tier : tiers()) {
    if (tier.name == name) return tier;
    known += (known.empty() ? "" : ", ") + tier.name;
  }
  throw std::invalid_argument("tier '" + name + "' does not run here; these do: " + known);
}

}  // namespace ckd::cpu
