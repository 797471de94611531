// y = x W^T for few rows of x (N,K), float32, and a quantized W (O,K) (layers/weight_formats.py).
//
// Decoding reads every weight once, so the time is that of reading the codes and of widening them: they become floats in
// registers and are never written. A tile is one row of W with one row or four rows of x. W is read in the order in which
// it lies: with four rows of W at once the same sums took twice the time.
//
// The sum of one (x row, W row) pair has the same order in every tile, so a row's result has the same bits whatever rows
// come with it. The instruction set is chosen at run time; ATEN_CPU_CAPABILITY=avx2|default lowers the choice, as in
// PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define VECTORS 1
#include <immintrin.h>
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t GROUP = 32, TILE = 4;
constexpr int64_t PREFETCH = 1024;  // bytes ahead: 1.5 times as fast with AVX512 here, level with AVX2
constexpr int64_t MIN_WORK = 1 << 17;  // products that repay a thread

enum Isa : int64_t { BEST = 0, PLAIN = 1, AVX2 = 2, AVX512 = 3 };
enum Format : int64_t { INT8 = 0, INT4 = 1, NF4 = 2 };

// One product. levels: what NF4's codes stand for.
struct Product {
  Format format;
  const float* x;
  const uint8_t* q;
  const void* scale;
  const float* levels;
  float* y;
  int64_t rows, out, width;
};

struct Float32Scale {
  using Stored = float;
  static inline float widen(float scale) { return scale; }
};

struct BFloat16Scale {
  using Stored = uint16_t;
  static inline float widen(uint16_t scale) {
    const uint32_t bits = uint32_t(scale) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

template <class Scale>
inline const typename Scale::Stored* scales_of(const Product& p) {
  return static_cast<const typename Scale::Stored*>(p.scale);
}

namespace plain {
constexpr int64_t LANES = 8;
struct Floats { float lane[8]; };
struct Codes { int32_t lane[8]; };

inline Floats load(const float* x) {
  Floats v;
  std::memcpy(v.lane, x, sizeof v.lane);
  return v;
}
inline Floats broadcast(float value) {
  Floats v;
  for (float& lane : v.lane) lane = value;
  return v;
}
inline Floats widen(const int8_t* q) {
  Floats v;
  for (int i = 0; i < 8; i++) v.lane[i] = q[i];
  return v;
}
inline void unpack(const uint8_t* pairs, Codes& low, Codes& high) {
  for (int i = 0; i < 8; i++) low.lane[i] = pairs[i] & 15, high.lane[i] = pairs[i] >> 4;
}
inline Floats to_floats(const Codes& codes) {
  Floats v;
  for (int i = 0; i < 8; i++) v.lane[i] = float(codes.lane[i]);
  return v;
}
inline Floats look_up(const Codes& codes, const float* levels) {
  Floats v;
  for (int i = 0; i < 8; i++) v.lane[i] = levels[codes.lane[i]];
  return v;
}
inline Floats multiply_add(const Floats& a, const Floats& b, Floats c) {
  for (int i = 0; i < 8; i++) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline Floats add(Floats a, const Floats& b) {
  for (int i = 0; i < 8; i++) a.lane[i] += b.lane[i];
  return a;
}
inline float sum_lanes(const Floats& v) {
  return ((v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6])) + ((v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]));
}
#include "quantized_tiles.h"
}  // namespace plain

#ifdef VECTORS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int64_t LANES = 8;
using Floats = __m256;
using Codes = __m256i;

inline Codes load_bytes(const void* bytes) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(bytes))); }
inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline Floats broadcast(float value) { return _mm256_set1_ps(value); }
inline Floats widen(const int8_t* q) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
}
inline void unpack(const uint8_t* pairs, Codes& low, Codes& high) {
  const Codes both = load_bytes(pairs);
  low = _mm256_and_si256(both, _mm256_set1_epi32(15));
  high = _mm256_srli_epi32(both, 4);
}
inline Floats to_floats(Codes codes) { return _mm256_cvtepi32_ps(codes); }
// 16 levels are two registers, both indexed by the low 3 bits of a code; its 4th bit chooses.
inline Floats look_up(Codes codes, const float* levels) {
  const Floats low = _mm256_permutevar8x32_ps(load(levels), codes);
  const Floats high = _mm256_permutevar8x32_ps(load(levels + 8), codes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline float sum_lanes(Floats v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#include "quantized_tiles.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl")
namespace avx512 {
constexpr int64_t LANES = 16;
using Floats = __m512;
using Codes = __m512i;

inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Floats widen(const int8_t* q) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
}
inline void unpack(const uint8_t* pairs, Codes& low, Codes& high) {
  const Codes both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)));
  low = _mm512_and_si512(both, _mm512_set1_epi32(15));
  high = _mm512_srli_epi32(both, 4);
}
inline Floats to_floats(Codes codes) { return _mm512_cvtepi32_ps(codes); }
inline Floats look_up(Codes codes, const float* levels) { return _mm512_permutexvar_ps(codes, load(levels)); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline float sum_lanes(Floats v) { return _mm512_reduce_add_ps(v); }
#include "quantized_tiles.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

int64_t best_isa() {
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

template <class Scale>
void multiply_with(const Product& p, int64_t isa, int64_t begin, int64_t end) {
#ifdef VECTORS
  if (isa == AVX512) return avx512::multiply<Scale>(p, begin, end);
  if (isa == AVX2) return avx2::multiply<Scale>(p, begin, end);
#endif
  plain::multiply<Scale>(p, begin, end);
}

// x (N,K) float32, K a multiple of GROUP for 4 bits; q (O,K) or (O,K/2) int8; scale (O), (O,2,K/32) or (O,K/32);
// levels (16) float32.
Tensor quantized_rows(Tensor x, Tensor q, Tensor scale, Tensor levels, int64_t format, int64_t isa) {
  static const int64_t best = best_isa();
  const int64_t N = x.size(0), K = x.size(1), O = q.size(0);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && q.is_contiguous() && scale.is_contiguous(),
                  "quantized_rows: x is float32, and x, q and scale are contiguous");
  STD_TORCH_CHECK(q.size(1) == (format == INT8 ? K : K / 2) && (format == INT8 || K % GROUP == 0),
                  "quantized_rows: x and q have different widths");
  Tensor y = torch::stable::new_empty(x, {N, O});
  const Product p{Format(format), static_cast<const float*>(x.data_ptr()), static_cast<const uint8_t*>(q.data_ptr()),
                  scale.data_ptr(), static_cast<const float*>(levels.data_ptr()), static_cast<float*>(y.data_ptr()),
                  N, O, K};
  const int64_t chosen = isa == BEST ? best : std::min(isa, best);
  const bool narrow = scale.scalar_type() == ScalarType::BFloat16;
  const int64_t grain = std::max<int64_t>(1, MIN_WORK / std::max<int64_t>(1, K * N));
  torch::stable::parallel_for(0, O, grain, [&](int64_t begin, int64_t end) {
    narrow ? multiply_with<BFloat16Scale>(p, chosen, begin, end) : multiply_with<Float32Scale>(p, chosen, begin, end);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llm_quest, m) {
  m.def("quantized_rows(Tensor x, Tensor q, Tensor scale, Tensor levels, int format, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llm_quest, CPU, m) { m.impl("quantized_rows", TORCH_BOX(&quantized_rows)); }
