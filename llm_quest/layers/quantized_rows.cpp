// y = x W^T for few rows of x (N,K), float32, and a quantized W (O,K): codes of 8 bits with a scale for each row, or
// pairs of 4-bit codes with a scale for each group of 32 (layers/weight_formats.py).
//
// Decoding reads every weight once, so the time is that of reading the codes; they are widened to floats in registers
// and never written. A tile is 4 rows of W with up to 4 rows of x: its sums are independent chains of additions, which
// hide the latency of a multiply-add. The sum of one (x row, W row) pair is computed in the same order in every tile, so
// a row's result has the same bits whatever rows come with it.
//
// The instruction set is chosen at run time: `__attribute__((target))` compiles a function for one whatever the compiler
// was told about the machine, and ATEN_CPU_CAPABILITY=avx2|default lowers the choice, as it does in PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#endif

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

namespace {

constexpr int64_t GROUP = 32, TILE = 4;
constexpr int64_t MIN_WORK = 1 << 17;  // products that repay a thread

enum Isa : int64_t { BEST = 0, PLAIN = 1, AVX2_FMA = 2, AVX512_BW = 3 };

// One product: the pointers of its tensors and their sizes. scale: float32, bfloat16 bits or float16.
struct Product {
  const float* x;
  const uint8_t* q;
  const void* scale;
  const float* levels;
  float* y;
  int64_t rows, out, width;
};

// Scales of the dtype that they are stored in, as float32.
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

// Plain C++: the same sums without vector instructions.
template <int M, int R, class Scale>
void int8_plain_tile(const Product& p, int64_t n, int64_t o) {
  const auto* q = reinterpret_cast<const int8_t*>(p.q);
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float sum = 0;
      for (int64_t k = 0; k < p.width; k++) sum += q[(o + r) * p.width + k] * p.x[(n + m) * p.width + k];
      p.y[(n + m) * p.out + o + r] = sum * Scale::widen(scales_of<Scale>(p)[o + r]);
    }
}

template <int M, int R, class Scale>
void int4_plain_tile(const Product& p, int64_t n, int64_t o) {
  const int64_t groups = p.width / GROUP;
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float total = 0;
      for (int64_t g = 0; g < groups; g++) {
        const uint8_t* pairs = p.q + ((o + r) * groups + g) * (GROUP / 2);
        const float* x = p.x + (n + m) * p.width + g * GROUP;
        float sum = 0;
        for (int j = 0; j < GROUP / 2; j++)
          sum += p.levels[pairs[j] & 15] * x[j] + p.levels[pairs[j] >> 4] * x[j + GROUP / 2];
        total += sum * Scale::widen(scales_of<Scale>(p)[(o + r) * groups + g]);
      }
      p.y[(n + m) * p.out + o + r] = total;
    }
}

#if defined(__x86_64__)

AVX2 inline float sum_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <int M, int R, class Scale>
AVX2 void int8_avx2_tile(const Product& p, int64_t n, int64_t o) {
  const int64_t K = p.width;
  const int8_t* q = reinterpret_cast<const int8_t*>(p.q) + o * K;
  const float* x = p.x + n * K;
  __m256 sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) {
    __m256 xs[M];
    for (int m = 0; m < M; m++) xs[m] = _mm256_loadu_ps(x + m * K + k);
    for (int r = 0; r < R; r++) {
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + r * K + k));
      const __m256 w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
      for (int m = 0; m < M; m++) sums[r][m] = _mm256_fmadd_ps(w, xs[m], sums[r][m]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float sum = sum_lanes(sums[r][m]);
      for (int64_t rest = k; rest < K; rest++) sum += q[r * K + rest] * x[m * K + rest];
      p.y[(n + m) * p.out + o + r] = sum * Scale::widen(scales_of<Scale>(p)[o + r]);
    }
}

// A table of 16 floats is two registers: both are indexed by the low 3 bits, and the 4th chooses between them.
AVX2 inline __m256 look_up(__m256i codes, __m256 low, __m256 high) {
  const __m256 bit = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), bit);
}

template <int M, int R, class Scale>
AVX2 void int4_avx2_tile(const Product& p, int64_t n, int64_t o) {
  const int64_t K = p.width, groups = K / GROUP;
  const uint8_t* q = p.q + o * (K / 2);
  const float* x = p.x + n * K;
  const auto* scale = scales_of<Scale>(p) + o * groups;
  const __m256 low = _mm256_loadu_ps(p.levels), high = _mm256_loadu_ps(p.levels + 8);
  __m256 sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; g++)
    for (int r = 0; r < R; r++) {
      __m256 w[4];
      for (int half = 0; half < 2; half++) {
        const uint8_t* pairs = q + r * (K / 2) + g * (GROUP / 2) + 8 * half;
        const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs)));
        w[half] = look_up(codes, low, high);
        w[half + 2] = look_up(_mm256_srli_epi32(codes, 4), low, high);
      }
      const __m256 s = _mm256_set1_ps(Scale::widen(scale[r * groups + g]));
      for (int m = 0; m < M; m++) {
        const float* group = x + m * K + g * GROUP;
        __m256 sum = _mm256_mul_ps(w[0], _mm256_loadu_ps(group));
        for (int i = 1; i < 4; i++) sum = _mm256_fmadd_ps(w[i], _mm256_loadu_ps(group + 8 * i), sum);
        sums[r][m] = _mm256_fmadd_ps(sum, s, sums[r][m]);
      }
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o + r] = sum_lanes(sums[r][m]);
}

template <int M, int R, class Scale>
AVX512 void int8_avx512_tile(const Product& p, int64_t n, int64_t o) {
  const int64_t K = p.width;
  const int8_t* q = reinterpret_cast<const int8_t*>(p.q) + o * K;
  const float* x = p.x + n * K;
  __m512 sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) {
    __m512 xs[M];
    for (int m = 0; m < M; m++) xs[m] = _mm512_loadu_ps(x + m * K + k);
    for (int r = 0; r < R; r++) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + r * K + k));
      const __m512 w = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
      for (int m = 0; m < M; m++) sums[r][m] = _mm512_fmadd_ps(w, xs[m], sums[r][m]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float sum = _mm512_reduce_add_ps(sums[r][m]);
      for (int64_t rest = k; rest < K; rest++) sum += q[r * K + rest] * x[m * K + rest];
      p.y[(n + m) * p.out + o + r] = sum * Scale::widen(scales_of<Scale>(p)[o + r]);
    }
}

// The table is one register, indexed by the low 4 bits of each lane: the high code of a pair needs a shift, the low one
// nothing.
template <int M, int R, class Scale>
AVX512 void int4_avx512_tile(const Product& p, int64_t n, int64_t o) {
  const int64_t K = p.width, groups = K / GROUP;
  const uint8_t* q = p.q + o * (K / 2);
  const float* x = p.x + n * K;
  const auto* scale = scales_of<Scale>(p) + o * groups;
  const __m512 levels = _mm512_loadu_ps(p.levels);
  __m512 sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++)
    for (int r = 0; r < R; r++) {
      const uint8_t* pairs = q + r * (K / 2) + g * (GROUP / 2);
      const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)));
      const __m512 first = _mm512_permutexvar_ps(codes, levels);
      const __m512 second = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), levels);
      const __m512 s = _mm512_set1_ps(Scale::widen(scale[r * groups + g]));
      for (int m = 0; m < M; m++) {
        const float* group = x + m * K + g * GROUP;
        __m512 sum = _mm512_mul_ps(first, _mm512_loadu_ps(group));
        sum = _mm512_fmadd_ps(second, _mm512_loadu_ps(group + GROUP / 2), sum);
        sums[r][m] = _mm512_fmadd_ps(sum, s, sums[r][m]);
      }
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o + r] = _mm512_reduce_add_ps(sums[r][m]);
}

#endif

// A kernel names the function that computes a tile of M rows of x and R rows of W.
#define KERNEL(NAME)                                                                              \
  template <class Scale>                                                                          \
  struct NAME {                                                                                   \
    template <int M, int R>                                                                       \
    static void tile(const Product& p, int64_t n, int64_t o) { NAME##_tile<M, R, Scale>(p, n, o); } \
  }
KERNEL(int8_plain);
KERNEL(int4_plain);
#if defined(__x86_64__)
KERNEL(int8_avx2);
KERNEL(int4_avx2);
KERNEL(int8_avx512);
KERNEL(int4_avx512);
#endif

// All rows of x with R rows of W.
template <class Kernel, int R>
void strip(const Product& p, int64_t o) {
  int64_t n = 0;
  for (; n + TILE <= p.rows; n += TILE) Kernel::template tile<TILE, R>(p, n, o);
  if (p.rows - n == 3) Kernel::template tile<3, R>(p, n, o);
  if (p.rows - n == 2) Kernel::template tile<2, R>(p, n, o);
  if (p.rows - n == 1) Kernel::template tile<1, R>(p, n, o);
}

template <class Kernel>
void multiply(const Product& p) {
  const int64_t strips = (p.out + TILE - 1) / TILE;
  const int64_t grain = std::max<int64_t>(1, MIN_WORK / std::max<int64_t>(1, TILE * p.width * p.rows));
  torch::stable::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++)
      if (int64_t o = s * TILE; o + TILE <= p.out)
        strip<Kernel, TILE>(p, o);
      else
        for (; o < p.out; o++) strip<Kernel, 1>(p, o);
  });
}

int64_t best_isa() {
#if defined(__x86_64__)
  const char* named = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string capability = named ? named : "";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (capability == "default" || !avx2) return PLAIN;
  return capability == "avx2" || !avx512 ? AVX2_FMA : AVX512_BW;
#else
  return PLAIN;
#endif
}

template <class Scale>
void multiply_with(const Product& p, int64_t group_size, int64_t isa) {
  const bool bytes = group_size == 0;
#if defined(__x86_64__)
  if (isa == AVX512_BW) return bytes ? multiply<int8_avx512<Scale>>(p) : multiply<int4_avx512<Scale>>(p);
  if (isa == AVX2_FMA) return bytes ? multiply<int8_avx2<Scale>>(p) : multiply<int4_avx2<Scale>>(p);
#endif
  return bytes ? multiply<int8_plain<Scale>>(p) : multiply<int4_plain<Scale>>(p);
}

// x (N,K) float32, a multiple of GROUP wide where W has groups; q (O,K) or (O,K/2) int8; scale (O) or (O,K/32);
// levels (16) float32: what the 4-bit codes stand for.
Tensor quantized_rows(Tensor x, Tensor q, Tensor scale, Tensor levels, int64_t group_size, int64_t isa) {
  static const int64_t best = best_isa();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && q.is_contiguous() && scale.is_contiguous(),
                  "quantized_rows: x is float32, and x, q and scale are contiguous");
  STD_TORCH_CHECK(q.size(1) == (group_size ? x.size(1) / 2 : x.size(1)) && (group_size == 0 || group_size == GROUP),
                  "quantized_rows: x and q have different widths");
  Tensor y = torch::stable::new_empty(x, {x.size(0), q.size(0)});
  const Product p{static_cast<const float*>(x.data_ptr()),  static_cast<const uint8_t*>(q.data_ptr()),
                  scale.data_ptr(),                         static_cast<const float*>(levels.data_ptr()),
                  static_cast<float*>(y.data_ptr()),        x.size(0), q.size(0), x.size(1)};
  const int64_t chosen = isa == BEST ? best : std::min(isa, best);
  if (scale.scalar_type() == ScalarType::BFloat16)
    multiply_with<BFloat16Scale>(p, group_size, chosen);
  else
    multiply_with<Float32Scale>(p, group_size, chosen);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llm_quest, m) {
  m.def("quantized_rows(Tensor x, Tensor q, Tensor scale, Tensor levels, int group_size, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llm_quest, CPU, m) { m.impl("quantized_rows", TORCH_BOX(&quantized_rows)); }
