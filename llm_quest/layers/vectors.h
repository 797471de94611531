// Vectors of 8 or 16 float32 for the operators, by the same names for each instruction set: namespaces plain, avx2,
// avx512 and vnni. A file with tiles is included once in each of them, between that set's pragmas (quantized_rows.cpp).
//
//   LANES, Floats, Codes                      8 or 16 float32, or int32
//   UNROLL                                    for loops over the rows of a tile, whose vectors stay in registers
//   load(const float*), store(float*, Floats), broadcast(float)
//   widen(const int8_t*), widen(const BFloat16*)     LANES codes of 8 bits, LANES stored numbers
//   unpack(const uint8_t*, Codes& low, Codes& high)    LANES pairs of 4-bit codes, a code a lane
//   split(const uint8_t*, Codes& low, Codes& high)     4 LANES pairs of 4-bit codes, a code a byte
//   dot_pairs(Codes low, Codes high, const int8_t* x, const int8_t* y, Codes sum)    sum + low x + high y, 8 products a lane
//   to_floats(Codes), look_up(Codes, const float* levels), zero_codes(), next_digit(Codes)    256 times as much
//   to_codes(Floats)                          the nearest integers
//   store_digit(Codes, int8_t*)               the lowest digit of 8 bits, a byte a lane; returns what is left
//   load_first(const Scale*, count)           the first of LANES scales, 0 in the lanes behind them
//   spread(Floats, quarter)                   the lanes of one quarter, each in four lanes
//   multiply_add(Floats a, Floats b, Floats c)         a * b + c
//   times, add, divide, larger (the second where it is NaN), absolute, sum_lanes, largest_lane
//   nearest(Floats), times_power(Floats a, Floats n)    a * 2^n for integers n from -126 to 127
//   vnni alone: load_codes, store_codes, add_codes, all_bytes, load_unsigned(const int8_t*), dot_bytes
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace {

using BFloat16 = uint16_t;  // the upper half of a float's bits

inline float widen_one(float number) { return number; }
inline float widen_one(int8_t code) { return code; }
inline float widen_one(BFloat16 stored) {
  const uint32_t bits = uint32_t(stored) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

namespace plain {
constexpr int64_t LANES = 8;
constexpr int UNROLL = 1;
struct Floats { float lane[8]; };
struct Codes { int32_t lane[8]; };

inline Floats load(const float* x) {
  Floats v;
  std::memcpy(v.lane, x, sizeof v.lane);
  return v;
}
inline void store(float* x, const Floats& v) { std::memcpy(x, v.lane, sizeof v.lane); }
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
inline Floats widen(const float* w) { return load(w); }
inline Floats widen(const BFloat16* w) {
  Floats v;
  for (int i = 0; i < 8; i++) v.lane[i] = widen_one(w[i]);
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
inline void split(const uint8_t* pairs, Codes& low, Codes& high) {
  std::memcpy(low.lane, pairs, sizeof low.lane);
  for (int i = 0; i < 8; i++) high.lane[i] = (low.lane[i] >> 4) & 0x0f0f0f0f, low.lane[i] &= 0x0f0f0f0f;
}
inline Codes zero_codes() { return {}; }
inline Codes next_digit(Codes sum) {
  for (int32_t& lane : sum.lane) lane *= 256;
  return sum;
}
inline Codes dot_pairs(const Codes& low, const Codes& high, const int8_t* x, const int8_t* y, Codes sum) {
  for (int i = 0; i < 32; i++)
    sum.lane[i / 4] += (low.lane[i / 4] >> i % 4 * 8 & 15) * x[i] + (high.lane[i / 4] >> i % 4 * 8 & 15) * y[i];
  return sum;
}
template <class Scale>
__attribute__((noinline)) Floats load_first(const Scale* scales, int64_t count) {
  Floats v{};
  for (int64_t i = 0; i < count; i++) v.lane[i] = widen_one(scales[i]);
  return v;
}
inline Floats spread(const Floats& from, int quarter) {
  Floats v;
  for (int i = 0; i < 8; i++) v.lane[i] = from.lane[2 * quarter + i / 4];
  return v;
}
inline Floats times(Floats a, const Floats& b) {
  for (int i = 0; i < 8; i++) a.lane[i] *= b.lane[i];
  return a;
}
inline Floats multiply_add(const Floats& a, const Floats& b, Floats c) {
  for (int i = 0; i < 8; i++) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline Floats add(Floats a, const Floats& b) {
  for (int i = 0; i < 8; i++) a.lane[i] += b.lane[i];
  return a;
}
inline Floats divide(Floats a, const Floats& b) {
  for (int i = 0; i < 8; i++) a.lane[i] /= b.lane[i];
  return a;
}
inline float sum_lanes(const Floats& v) {
  return ((v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6])) + ((v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]));
}
inline Floats larger(const Floats& a, Floats b) {
  for (int i = 0; i < 8; i++) b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return b;
}
inline Floats absolute(Floats v) {
  for (float& lane : v.lane) lane = std::fabs(lane);
  return v;
}
inline float largest_lane(const Floats& v) { return *std::max_element(v.lane, v.lane + 8); }
inline Floats nearest(Floats v) {
  for (float& lane : v.lane) lane = std::nearbyintf(lane);
  return v;
}
inline Floats times_power(Floats v, const Floats& n) {
  for (int i = 0; i < 8; i++) v.lane[i] = std::ldexp(v.lane[i], int(n.lane[i]));
  return v;
}
inline Codes to_codes(const Floats& v) {
  Codes codes;
  for (int i = 0; i < 8; i++) codes.lane[i] = int32_t(std::nearbyintf(v.lane[i]));
  return codes;
}
inline Codes store_digit(Codes codes, int8_t* to) {
  for (int i = 0; i < 8; i++) to[i] = int8_t(codes.lane[i]), codes.lane[i] = (codes.lane[i] + 128) >> 8;
  return codes;
}
}  // namespace plain

#ifdef VECTORS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int64_t LANES = 8;
constexpr int UNROLL = 4;
using Floats = __m256;
using Codes = __m256i;

inline Codes load_bytes(const void* bytes) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(bytes))); }
inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* x, Floats v) { _mm256_storeu_ps(x, v); }
inline Floats broadcast(float value) { return _mm256_set1_ps(value); }
inline Floats widen(const int8_t* q) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
}
inline Floats widen(const float* w) { return load(w); }
inline Floats widen(const BFloat16* w) {
  const Codes low = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
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
inline void split(const uint8_t* pairs, Codes& low, Codes& high) {
  const Codes both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)), mask = _mm256_set1_epi8(15);
  low = _mm256_and_si256(both, mask);
  high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
}
inline Codes zero_codes() { return _mm256_setzero_si256(); }
inline Codes next_digit(Codes sum) { return _mm256_slli_epi32(sum, 8); }
inline Codes dot_pairs(Codes low, Codes high, const int8_t* x, const int8_t* y, Codes sum) {  // at most 4 x 15 x 128 in 16 bits
  const Codes of_low = _mm256_maddubs_epi16(low, _mm256_load_si256(reinterpret_cast<const __m256i*>(x)));
  const Codes of_high = _mm256_maddubs_epi16(high, _mm256_load_si256(reinterpret_cast<const __m256i*>(y)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(of_low, of_high), _mm256_set1_epi16(1)));
}
inline Floats load_first(const float* scales, int64_t count) {
  const Codes lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_maskload_ps(scales, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lanes));
}
inline Floats load_first(const BFloat16* scales, int64_t count) {
  if (count >= LANES) return widen(scales);
  BFloat16 first[LANES] = {};
  std::copy_n(scales, count, first);
  return widen(first);
}
inline Floats spread(Floats v, int quarter) {
  const Codes lanes = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
  return _mm256_permutevar8x32_ps(v, _mm256_add_epi32(lanes, _mm256_set1_epi32(2 * quarter)));
}
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline float sum_lanes(Floats v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats absolute(Floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
inline float largest_lane(Floats v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Floats nearest(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power(Floats v, Floats n) {
  const Codes exponents = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponents, 23)));
}
inline Codes to_codes(Floats v) { return _mm256_cvtps_epi32(v); }
inline Codes store_digit(Codes codes, int8_t* to) {
  const Codes lowest = _mm256_set1_epi32(0x0c080400);
  const Codes bytes = _mm256_shuffle_epi8(codes, lowest);
  const int32_t first = _mm256_extract_epi32(bytes, 0), second = _mm256_extract_epi32(bytes, 4);
  std::memcpy(to, &first, sizeof first);
  std::memcpy(to + 4, &second, sizeof second);
  return _mm256_srai_epi32(_mm256_add_epi32(codes, _mm256_set1_epi32(128)), 8);
}
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl")
namespace avx512 {
constexpr int64_t LANES = 16;
constexpr int UNROLL = 4;
using Floats = __m512;
using Codes = __m512i;

inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, Floats v) { _mm512_storeu_ps(x, v); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Floats widen(const int8_t* q) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
}
inline Floats widen(const float* w) { return load(w); }
inline Floats widen(const BFloat16* w) {
  const Codes low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
}
inline void unpack(const uint8_t* pairs, Codes& low, Codes& high) {
  const Codes both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)));
  low = _mm512_and_si512(both, _mm512_set1_epi32(15));
  high = _mm512_srli_epi32(both, 4);
}
inline Floats to_floats(Codes codes) { return _mm512_cvtepi32_ps(codes); }
inline Floats look_up(Codes codes, const float* levels) { return _mm512_permutexvar_ps(codes, load(levels)); }
inline void split(const uint8_t* pairs, Codes& low, Codes& high) {
  const Codes both = _mm512_loadu_si512(pairs), mask = _mm512_set1_epi8(15);
  low = _mm512_and_si512(both, mask);
  high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
inline Codes zero_codes() { return _mm512_setzero_si512(); }
inline Codes next_digit(Codes sum) { return _mm512_slli_epi32(sum, 8); }
inline Codes dot_pairs(Codes low, Codes high, const int8_t* x, const int8_t* y, Codes sum) {
  const Codes of_low = _mm512_maddubs_epi16(low, _mm512_load_si512(x)), of_high = _mm512_maddubs_epi16(high, _mm512_load_si512(y));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_add_epi16(of_low, of_high), _mm512_set1_epi16(1)));
}
inline Floats load_first(const float* scales, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), scales);
}
inline Floats load_first(const BFloat16* scales, int64_t count) {
  const Codes low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1 << count) - 1), scales));
  return _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
}
inline Floats spread(Floats v, int quarter) {
  const Codes lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(4 * quarter)), v);
}
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline float sum_lanes(Floats v) { return _mm512_reduce_add_ps(v); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats absolute(Floats v) { return _mm512_abs_ps(v); }
inline float largest_lane(Floats v) { return _mm512_reduce_max_ps(v); }
inline Floats nearest(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }
inline Codes to_codes(Floats v) { return _mm512_cvtps_epi32(v); }
inline Codes store_digit(Codes codes, int8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes));
  return _mm512_srai_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(128)), 8);
}
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")
namespace vnni {  // as avx512, with an instruction for products of bytes
using namespace avx512;

inline Codes load_codes(const void* codes) { return _mm512_load_si512(codes); }
inline void store_codes(void* to, Codes codes) { _mm512_store_si512(to, codes); }
inline Codes add_codes(Codes a, Codes b) { return _mm512_add_epi32(a, b); }
inline Codes subtract_codes(Codes a, Codes b) { return _mm512_sub_epi32(a, b); }
inline Codes all_bytes(int8_t byte) { return _mm512_set1_epi8(byte); }
// Codes of 8 bits, each + 128.
inline Codes load_unsigned(const int8_t* codes) { return _mm512_xor_si512(_mm512_loadu_si512(codes), all_bytes(-128)); }
inline Codes dot_bytes(Codes w, const int8_t* x, Codes sum) { return _mm512_dpbusd_epi32(sum, w, _mm512_load_si512(x)); }
inline Codes dot_pairs(Codes low, Codes high, const int8_t* x, const int8_t* y, Codes sum) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, low, _mm512_load_si512(x)), high, _mm512_load_si512(y));
}
}  // namespace vnni
#pragma GCC pop_options
#endif

}  // namespace
