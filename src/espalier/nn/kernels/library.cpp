// What the loader asks a library before it calls a kernel.

#include "parallel.hpp"
#include "vectors.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

Team espalier_team = nullptr;

namespace {
int64_t last_cache() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  for (const unsigned leaf : {0x8000001du, 4u})  // AMD's and Intel's, which describe the third cache alike
    if (__get_cpuid_count(leaf, 3, &a, &b, &c, &d) && (a >> 5 & 7) == 3)
      return int64_t((b >> 22) + 1) * ((b >> 12 & 0x3ff) + 1) * ((b & 0xfff) + 1) * (int64_t(c) + 1);
#endif
  return 0;
}
}  // namespace
// A server's larger ones are shared by many cores and lie far from each: to one, they are as good as this.
int64_t espalier_last_cache = std::min<int64_t>(last_cache(), 32 << 20);

ESPALIER_API void espalier_set_team(Team team) { espalier_team = team; }

ESPALIER_API int espalier_same(const void* a, const void* b, int64_t bytes) {
  return !std::memcmp(a, b, size_t(bytes));
}

// The highest level n of x86-64-vn that processor and operating system support, 5 for the fourth with AVX512-BF16, 0
// below the second and elsewhere. It is asked of the library of the lowest level, which is safe to run before the answer
// is known.
ESPALIER_API int espalier_processor_level() {
#if defined(__x86_64__)
  unsigned a, b, c, d, extended_b = 0, far_c = 0;
  const auto all = [](unsigned have, unsigned want) { return (have & want) == want; };
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const unsigned features = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) extended_b = b;
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) far_c = c;
  if (!all(features, bit_SSE3 | bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT | bit_CMPXCHG16B)) return 0;
  if (!all(features, bit_AVX | bit_FMA | bit_F16C | bit_MOVBE | bit_OSXSAVE)) return 2;
  if (!all(extended_b, bit_AVX2 | bit_BMI | bit_BMI2) || !all(far_c, bit_LZCNT)) return 2;
  // The operating system saves the registers only if it says so in XCR0: bits 1, 2 for AVX, 5 to 7 for AVX-512. macOS
  // turns the latter on at a thread's first use, so that they read as missing there and level 3 is the answer.
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!all(low, 0x06)) return 2;
  if (!all(extended_b, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL)) return 3;
  if (!all(low, 0xe6)) return 3;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && all(a, 1u << 5) ? 5 : 4;
#else
  return 0;
#endif
}

// Whether a product of pairs of bfloat16 beats two in single precision: on AMD; on Intel it takes a third longer.
ESPALIER_API int espalier_fast_pairs() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
#else
  return 0;
#endif
}
