// y = x W^T for few rows of x (N,K), float32, and a W (O,K) that is quantized (layers/weight_formats.py), float32 or
// bfloat16.
//
// Decoding reads every weight once, so the time is that of reading W and of widening it: codes become floats in
// registers and are never written. For one row of x a tile has four rows of W, one from each quarter of W: a core reads
// four runs in distant pages twice as fast as one (25.8 against 11.2 GB/s from pages of 4 KB), and four neighboring rows
// half as fast. For four rows of x it has one row of W, and W is read in order.
//
// int4 is multiplied as integers, and so is int8 where the processor multiplies bytes (VNNI), since widening codes would be
// most of the work: 32 numbers of x, a group, are three digits of 8 bits each, which hold 2^-23 of the group's largest
// number, as float32 does of its own.
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
#include "tensors.h"
#include "vectors.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t GROUP = 32, TILE = 4, STREAMS = 4;
constexpr float MOST_UNITS = 127 * 65536;  // of a group of x; three digits of 8 bits hold a little more
constexpr float SMALLEST = 1e-30f;  // a group of x with no larger number is 0
constexpr int64_t PREFETCH = 1024;  // bytes ahead: 1.5 times as fast with AVX512 here, level with AVX2
constexpr int64_t RUN_BYTES = 16 << 10;  // of W that are multiplied with one row of x after the other
constexpr int64_t MIN_WORK = 1 << 17;  // products that repay a thread

enum Format : int64_t { INT8 = 0, INT4 = 1, NF4 = 2, FLOATS = 3 };

inline void prefetch_ahead(const void* read, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(read) + PREFETCH + line);
}

// One product. q: the matrix; FLOATS are of the type Scale. levels: what NF4's codes stand for. digits: x, where codes are
// multiplied as integers.
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

// The bytes of a row of W, without its scales.
template <class Scale>
inline int64_t row_bytes(const Product& p) {
  return p.format == FLOATS ? p.width * sizeof(Scale) : p.format == INT8 ? p.width : p.width / 2;
}

#define TILES "quantized_tiles.h"
#include "tiles_by_isa.h"

#ifdef VECTORS
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")
namespace vnni {
#define BYTE_PRODUCTS
#include "quantized_tiles.h"
#undef BYTE_PRODUCTS
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
void multiply_rows(const Product& p, int64_t isa, bool narrow) {
  const int64_t grain = std::max<int64_t>(1, MIN_WORK / std::max<int64_t>(1, p.width * p.rows));
  torch::stable::parallel_for(0, p.out, grain, [&](int64_t begin, int64_t end) {
    narrow ? multiply_with<BFloat16>(p, isa, begin, end) : multiply_with<float>(p, isa, begin, end);
  });
}

// The same with x as digits.
template <class Digits>
void multiply_digits(Product p, const std::vector<Digits>& digits, int64_t isa, bool narrow) {
  p.digits = digits.data();
  multiply_rows(p, isa, narrow);
}

void multiply_all(const Product& p, int64_t isa, bool narrow) {
  static const int64_t best = best_byte_isa();
  const int64_t chosen = isa == BEST ? best : std::min(isa, best);
#ifdef VECTORS
  if (chosen == VNNI && p.format == INT8) return multiply_digits(p, vnni::to_bytes(p), chosen, narrow);
#endif
  if (p.format != INT4) return multiply_rows(p, chosen, narrow);
#ifdef VECTORS
  if (chosen == VNNI) return multiply_digits(p, vnni::to_digits(p), chosen, narrow);
  if (chosen == AVX512) return multiply_digits(p, avx512::to_digits(p), chosen, narrow);
  if (chosen == AVX2) return multiply_digits(p, avx2::to_digits(p), chosen, narrow);
#endif
  multiply_digits(p, plain::to_digits(p), chosen, narrow);
}

// x (N,K) float32, K a multiple of GROUP for 4 bits; q (O,K) or (O,K/2) int8; scale (O), (O,2,K/32) or (O,K/32);
// levels (16) float32.
Tensor quantized_rows(Tensor x, Tensor q, Tensor scale, Tensor levels, int64_t format, int64_t isa) {
  const int64_t N = x.size(0), K = x.size(1), O = q.size(0);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && q.is_contiguous() && scale.is_contiguous(),
                  "quantized_rows: x is float32, and x, q and scale are contiguous");
  STD_TORCH_CHECK(q.size(1) == (format == INT8 ? K : K / 2) && (format == INT8 || K % GROUP == 0),
                  "quantized_rows: x and q have different widths");
  Tensor y = empty_on_host(x, {N, O});
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
  Tensor y = empty_on_host(x, shape);
  const int64_t N = y.numel() / std::max<int64_t>(1, weight.size(0));
  const Product p{FLOATS, static_cast<const float*>(x.data_ptr()), nullptr,
                  static_cast<const uint8_t*>(weight.data_ptr()), nullptr, nullptr, static_cast<float*>(y.data_ptr()),
                  N, weight.size(0), weight.size(1)};
  multiply_all(p, isa, narrow);
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
