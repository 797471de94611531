// y = x W^T for few rows of x (N,K), float32, and a W (O,K) that is quantized (layers/weight_formats.py), float32 or
// bfloat16.
//
// Decoding reads every weight once, so the time is that of reading W and of widening it: codes become floats in
// registers and are never written. For one row of x a tile has four rows of W, one from each quarter of W: a core reads
// four runs in distant pages twice as fast as one (25.8 against 11.2 GB/s from pages of 4 KB), and four neighboring rows
// half as fast. For four rows of x it has one row of W, and W is read in order.
//
// int4 is multiplied as integers, since widening its codes would be most of the work: 32 numbers of x, a group, are three
// digits of 8 bits each, which hold 2^-23 of the group's largest number, as float32 does of its own.
//
// The sum of one (x row, W row) pair has the same order in every tile, so a row's result has the same bits whatever rows
// come with it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t GROUP = 32, TILE = 4, STREAMS = 4;
constexpr float MOST_UNITS = 127 * 65536;  // of a group of x; three digits of 8 bits hold a little more
constexpr float SMALLEST = 1e-30f;  // a group of x with no larger number is 0
constexpr int64_t PREFETCH = 1024;  // bytes ahead: 1.5 times as fast with AVX512 here, level with AVX2
constexpr int64_t MIN_WORK = 1 << 17;  // products that repay a thread

enum Format : int64_t { INT8 = 0, INT4 = 1, NF4 = 2, FLOAT32 = 3, BFLOAT16 = 4 };

using BFloat16 = uint16_t;  // the upper half of a float's bits

inline float widen_one(float number) { return number; }
inline float widen_one(int8_t code) { return code; }
inline float widen_one(BFloat16 stored) {
  const uint32_t bits = uint32_t(stored) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline void prefetch_ahead(const void* read, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(read) + PREFETCH + line);
}

// One product. q: the matrix. levels: what NF4's codes stand for. digits: x, where codes are multiplied as integers.
struct Product {
  Format format;
  const float* x;
  const void* digits;
  const uint8_t* q;
  const void* scale;
  const float* levels;
  float* y;
  int64_t rows, out, width;
};

template <class Scale>
inline const Scale* scales_of(const Product& p) {
  return static_cast<const Scale*>(p.scale);
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
inline Floats spread(const Scale* scales) {
  Floats v;
  for (int i = 0; i < 8; i++) v.lane[i] = widen_one(scales[i / 4]);
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
template <class Scale>
inline Floats spread(const Scale* scales) {
  return _mm256_insertf128_ps(_mm256_set1_ps(widen_one(scales[0])), _mm_set1_ps(widen_one(scales[1])), 1);
}
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
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
inline Floats spread(__m128 scales) {
  const Codes lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(scales));
}
inline Floats spread(const float* scales) { return spread(_mm_loadu_ps(scales)); }
inline Floats spread(const BFloat16* scales) {
  const __m128i low = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
  return spread(_mm_castsi128_ps(_mm_slli_epi32(low, 16)));
}
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline float sum_lanes(Floats v) { return _mm512_reduce_add_ps(v); }
#include "quantized_tiles.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")
namespace vnni {  // as avx512, with an instruction for products of bytes
using avx512::LANES, avx512::Floats, avx512::Codes, avx512::load, avx512::broadcast, avx512::widen, avx512::unpack;
using avx512::to_floats, avx512::look_up, avx512::split, avx512::zero_codes, avx512::next_digit, avx512::spread;
using avx512::times, avx512::multiply_add, avx512::add, avx512::sum_lanes;

inline Codes dot_pairs(Codes low, Codes high, const int8_t* x, const int8_t* y, Codes sum) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, low, _mm512_load_si512(x)), high, _mm512_load_si512(y));
}
#include "quantized_tiles.h"
}  // namespace vnni
#pragma GCC pop_options
#endif

template <class Scale>
void multiply_with(const Product& p, int64_t isa, int64_t begin, int64_t end) {
#ifdef VECTORS
  if (isa == VNNI) return vnni::multiply<Scale>(p, begin, end);
  if (isa == AVX512) return avx512::multiply<Scale>(p, begin, end);
  if (isa == AVX2) return avx2::multiply<Scale>(p, begin, end);
#endif
  plain::multiply<Scale>(p, begin, end);
}

// All rows of W, on as many threads as repay it.
void multiply_rows(const Product& p, int64_t isa, bool narrow_scales) {
  const int64_t grain = std::max<int64_t>(1, MIN_WORK / std::max<int64_t>(1, p.width * p.rows));
  torch::stable::parallel_for(0, p.out, grain, [&](int64_t begin, int64_t end) {
    narrow_scales ? multiply_with<BFloat16>(p, isa, begin, end) : multiply_with<float>(p, isa, begin, end);
  });
}

// The same with x as digits.
template <class Digits>
void multiply_digits(Product p, const std::vector<Digits>& digits, int64_t isa, bool narrow_scales) {
  p.digits = digits.data();
  multiply_rows(p, isa, narrow_scales);
}

void multiply_all(const Product& p, int64_t isa, bool narrow_scales) {
  static const int64_t best = best_byte_isa();
  const int64_t chosen = isa == BEST ? best : std::min(isa, best);
  if (p.format != INT4) return multiply_rows(p, chosen, narrow_scales);
#ifdef VECTORS
  if (chosen == VNNI) return multiply_digits(p, vnni::to_digits(p), chosen, narrow_scales);
  if (chosen == AVX512) return multiply_digits(p, avx512::to_digits(p), chosen, narrow_scales);
  if (chosen == AVX2) return multiply_digits(p, avx2::to_digits(p), chosen, narrow_scales);
#endif
  multiply_digits(p, plain::to_digits(p), chosen, narrow_scales);
}

// x (N,K) float32, K a multiple of GROUP for 4 bits; q (O,K) or (O,K/2) int8; scale (O), (O,2,K/32) or (O,K/32);
// levels (16) float32.
Tensor quantized_rows(Tensor x, Tensor q, Tensor scale, Tensor levels, int64_t format, int64_t isa) {
  const int64_t N = x.size(0), K = x.size(1), O = q.size(0);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && q.is_contiguous() && scale.is_contiguous(),
                  "quantized_rows: x is float32, and x, q and scale are contiguous");
  STD_TORCH_CHECK(q.size(1) == (format == INT8 ? K : K / 2) && (format == INT8 || K % GROUP == 0),
                  "quantized_rows: x and q have different widths");
  Tensor y = torch::stable::new_empty(x, {N, O});
  const Product p{Format(format), static_cast<const float*>(x.data_ptr()), nullptr, static_cast<const uint8_t*>(q.data_ptr()),
                  scale.data_ptr(), static_cast<const float*>(levels.data_ptr()), static_cast<float*>(y.data_ptr()),
                  N, O, K};
  multiply_all(p, isa, scale.scalar_type() == ScalarType::BFloat16);
  return y;
}

// x (...,K) float32, weight (O,K) float32 or bfloat16 -> (...,O).
Tensor float_rows(Tensor x, Tensor weight, int64_t isa) {
  const bool narrow = weight.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && (narrow || weight.scalar_type() == ScalarType::Float) &&
                      x.is_contiguous() && weight.is_contiguous() && x.dim() && x.size(-1) == weight.size(1),
                  "float_rows: x is float32, W is float32 or bfloat16, of one width, and both are contiguous");
  std::vector<int64_t> shape(x.dim(), weight.size(0));
  for (int64_t axis = 0; axis + 1 < x.dim(); axis++) shape[axis] = x.size(axis);
  Tensor y = torch::stable::new_empty(x, shape);
  const int64_t N = y.numel() / std::max<int64_t>(1, weight.size(0));
  const Product p{narrow ? BFLOAT16 : FLOAT32, static_cast<const float*>(x.data_ptr()), nullptr,
                  static_cast<const uint8_t*>(weight.data_ptr()), nullptr, nullptr, static_cast<float*>(y.data_ptr()),
                  N, weight.size(0), weight.size(1)};
  multiply_all(p, isa, false);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llm_quest, m) {
  m.def("quantized_rows(Tensor x, Tensor q, Tensor scale, Tensor levels, int format, int isa) -> Tensor");
  m.def("float_rows(Tensor x, Tensor weight, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llm_quest, CPU, m) {
  m.impl("quantized_rows", TORCH_BOX(&quantized_rows));
  m.impl("float_rows", TORCH_BOX(&float_rows));
}
