// The instruction set that the operators take, chosen when they are called. ATEN_CPU_CAPABILITY=avx2|default lowers the
// choice, as in PyTorch.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define VECTORS 1
#ifndef __clang__  // of GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

enum Isa : int64_t { BEST = 0, PLAIN = 1, AVX2 = 2, AVX512 = 3, VNNI = 4 };

inline int64_t best_isa() {
#ifdef VECTORS
  const char* named = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string capability = named ? named : "";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (capability == "default" || !avx2) return PLAIN;
  return capability == "avx2" || !avx512 ? AVX2 : AVX512;
#else
  return PLAIN;
#endif
}

// The same, with AVX512 told apart by its products of bytes.
inline int64_t best_byte_isa() {
  const int64_t best = best_isa();
#ifdef VECTORS
  if (best == AVX512 && __builtin_cpu_supports("avx512vnni")) return VNNI;
#endif
  return best;
}
