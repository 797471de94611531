// A step of Muon (train/newton_schulz.py): the momentum, the iterations on the Gram matrix and the weights of one matrix
// after the other, each in the cache of one core.
//
// P, G, T and Q are polynomials of one symmetric matrix: they commute and their products are symmetric, so that half of
// each is computed and then mirrored. Each is stored less its scalar part, which is kept apart in float32: near the end
// they are nearly multiples of 1, and in bfloat16 the small rest would be lost.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "vectors.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr float COEFFICIENTS[] = {3.4445f, -4.7750f, 2.0315f}, SMALLEST_NORM = 1e-7f;
constexpr size_t LINE = 64, KEPT_BYTES = 64 << 20;

struct Job {
  float *weight, *average;
  const float* gradient;
  int64_t rows, columns;
  float momentum, factor, decay;
  int64_t steps, group_steps;
};

// Memory of one thread. Fresh pages for every matrix would take a tenth of its time.
struct Arena {
  std::unique_ptr<char[]> bytes;
  size_t size = 0, used = 0;

  void begin(size_t wanted) {
    wanted += 16 * LINE;
    if (wanted > size) bytes.reset(new char[wanted]), size = wanted;
    used = (LINE - reinterpret_cast<uintptr_t>(bytes.get()) % LINE) % LINE;
  }
  template <class T>
  T* take(int64_t count) {
    T* place = reinterpret_cast<T*>(bytes.get() + used);
    used += (count * sizeof(T) + LINE - 1) / LINE * LINE;
    return place;
  }
  void end() {
    if (size > KEPT_BYTES) bytes.reset(), size = 0;
  }
};

template <int LANES, class T>
inline void transpose_one_by_one(const T* from, int64_t from_row, T* to, int64_t to_row) {
  for (int64_t r = 0; r < LANES; r++)
    for (int64_t c = 0; c < LANES; c++) to[c * to_row + r] = from[r * from_row + c];
}

namespace plain {
constexpr int64_t STEP = 1, MR = 3;
using Stored = float;
using Word = float;
using Words = Floats;

inline void narrow(float* x, const Floats& v) { store(x, v); }
inline Words load_words(const float* x) { return load(x); }
inline Words broadcast_word(float x) { return broadcast(x); }
inline Floats dot(const Floats& c, const Words& a, const Words& b) { return multiply_add(a, b, c); }
inline void transpose32(const void* from, int64_t from_row, void* to, int64_t to_row) {
  transpose_one_by_one<8>(static_cast<const float*>(from), from_row, static_cast<float*>(to), to_row);
}
inline void transpose_stored(const float* from, int64_t from_row, float* to, int64_t to_row) {
  transpose32(from, from_row, to, to_row);
}
inline void pair_rows(const float* from, int64_t, float* to) { store(to, load(from)); }
inline Floats subtract_at(Floats v, int64_t lane, float shift) {
  v.lane[lane] -= shift;
  return v;
}
#include "muon_tiles.h"
}  // namespace plain

#ifdef VECTORS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int64_t STEP = 1, MR = 6;
using Stored = float;
using Word = float;
using Words = __m256;

inline void narrow(float* x, Floats v) { store(x, v); }
inline Words load_words(const float* x) { return load(x); }
inline Words broadcast_word(float x) { return broadcast(x); }
inline Floats dot(Floats c, Words a, Words b) { return multiply_add(a, b, c); }
inline void transpose32(const void* from, int64_t from_row, void* to, int64_t to_row) {
  __m256 rows[8], pairs[8];
  for (int r = 0; r < 8; r++) {  // four columns of rows r and r + 4; then the other four
    const float* first = static_cast<const float*>(from) + r % 4 * from_row + r / 4 * 4;
    const __m256 upper = _mm256_castps128_ps256(_mm_loadu_ps(first));
    rows[r] = _mm256_insertf128_ps(upper, _mm_loadu_ps(first + 4 * from_row), 1);
  }
  for (int r = 0; r < 8; r += 2) {
    pairs[r] = _mm256_unpacklo_ps(rows[r], rows[r + 1]);
    pairs[r + 1] = _mm256_unpackhi_ps(rows[r], rows[r + 1]);
  }
  float* column = static_cast<float*>(to);
  for (int pair : {0, 1, 4, 5}) {
    _mm256_storeu_ps(column, _mm256_shuffle_ps(pairs[pair], pairs[pair + 2], 0x44));
    _mm256_storeu_ps(column + to_row, _mm256_shuffle_ps(pairs[pair], pairs[pair + 2], 0xee));
    column += 2 * to_row;
  }
}
inline void transpose_stored(const float* from, int64_t from_row, float* to, int64_t to_row) {
  transpose32(from, from_row, to, to_row);
}
inline void pair_rows(const float* from, int64_t, float* to) { store(to, load(from)); }
inline Floats subtract_at(Floats v, int64_t lane, float shift) {
  const __m256i here = _mm256_cmpeq_epi32(_mm256_set1_epi32(lane), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_sub_ps(v, _mm256_and_ps(broadcast(shift), _mm256_castsi256_ps(here)));
}
#include "muon_tiles.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl")
namespace avx512 {
// The lanes of two rows r and r + s, s apart, exchanged: four such rounds transpose 16 x 16.
inline void exchange(__m512i* rows, int s) {
  alignas(64) int32_t low[16], high[16];
  for (int lane = 0; lane < 16; lane++) {
    low[lane] = lane & s ? 16 + lane - s : lane;
    high[lane] = lane & s ? 16 + lane : lane + s;
  }
  const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
  for (int r = 0; r < 16; r++) {
    if (r & s) continue;
    const __m512i first = rows[r], second = rows[r + s];
    rows[r] = _mm512_permutex2var_epi32(first, lows, second);
    rows[r + s] = _mm512_permutex2var_epi32(first, highs, second);
  }
}
inline void transpose_rows(__m512i* rows) { exchange(rows, 1), exchange(rows, 2), exchange(rows, 4), exchange(rows, 8); }
inline Floats subtract_at(Floats v, int64_t lane, float shift) {
  return _mm512_mask_sub_ps(v, __mmask16(1 << lane), v, broadcast(shift));
}
inline void transpose32(const void* from, int64_t from_row, void* to, int64_t to_row) {
  __m512i rows[16];
  for (int r = 0; r < 16; r++) rows[r] = _mm512_loadu_si512(static_cast<const int32_t*>(from) + r * from_row);
  transpose_rows(rows);
  for (int r = 0; r < 16; r++) _mm512_storeu_si512(static_cast<int32_t*>(to) + r * to_row, rows[r]);
}

namespace float32 {
constexpr int64_t STEP = 1, MR = 12;
using Stored = float;
using Word = float;
using Words = __m512;

inline void narrow(float* x, Floats v) { store(x, v); }
inline Words load_words(const float* x) { return load(x); }
inline Words broadcast_word(float x) { return broadcast(x); }
inline Floats dot(Floats c, Words a, Words b) { return multiply_add(a, b, c); }
inline void transpose_stored(const float* from, int64_t from_row, float* to, int64_t to_row) {
  transpose32(from, from_row, to, to_row);
}
inline void pair_rows(const float* from, int64_t, float* to) { store(to, load(from)); }
#include "muon_tiles.h"
}  // namespace float32
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")
namespace avx512::bfloat16 {
constexpr int64_t STEP = 2, MR = 12;
using Stored = uint16_t;
using Word = uint32_t;
using Words = __m512i;

inline __m512i load_wide(const uint16_t* x) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline void narrow(uint16_t* x, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), (__m256i)_mm512_cvtneps_pbh(v));
}
inline Words load_words(const uint32_t* x) { return _mm512_loadu_si512(x); }
inline Words broadcast_word(uint32_t x) { return _mm512_set1_epi32(x); }
inline Floats dot(Floats c, Words a, Words b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
inline void transpose_stored(const uint16_t* from, int64_t from_row, uint16_t* to, int64_t to_row) {
  __m512i rows[16];
  for (int r = 0; r < 16; r++) rows[r] = load_wide(from + r * from_row);
  transpose_rows(rows);
  for (int r = 0; r < 16; r++)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * to_row), _mm512_cvtepi32_epi16(rows[r]));
}
inline void pair_rows(const uint16_t* from, int64_t row, uint32_t* to) {
  _mm512_storeu_si512(to, _mm512_or_si512(load_wide(from), _mm512_slli_epi32(load_wide(from + row), 16)));
}
#include "muon_tiles.h"
}  // namespace avx512::bfloat16
#pragma GCC pop_options
#endif

void update_with(const Job& job, Arena& arena, bool narrow, int64_t isa) {
#ifdef VECTORS
  if (narrow) return avx512::bfloat16::update(job, arena);
  if (isa == AVX512) return avx512::float32::update(job, arena);
  if (isa == AVX2) return avx2::update(job, arena);
#endif
  plain::update(job, arena);
}

bool has_bfloat16() {
#ifdef VECTORS
  return best_isa() == AVX512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// One step of these weights, in place: W <- decay W - factor NS(...). All are float32 and contiguous. matrices: how many
// lie in each weight; sizes: rows and columns of each of them; factors and group_steps (at most so many iterations on
// one Gram matrix): one for each. narrow: in bfloat16.
void muon_step(std::vector<Tensor> weights, std::vector<Tensor> averages, std::vector<Tensor> gradients,
               std::vector<int64_t> matrices, std::vector<int64_t> sizes, std::vector<double> factors,
               std::vector<double> momenta, std::vector<double> decays, std::vector<int64_t> group_steps,
               int64_t steps, bool narrow, int64_t isa) {
  STD_TORCH_CHECK(!narrow || has_bfloat16(), "muon_step: this processor has no instructions for bfloat16");
  std::vector<Job> jobs;
  for (size_t one = 0; one < weights.size(); one++) {
    for (const Tensor* t : {&weights[one], &averages[one], &gradients[one]})
      STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == weights[one].numel(),
                      "muon_step: weights, momenta and gradients are float32, contiguous and of one size");
    int64_t begin = 0;
    for (int64_t matrix = 0; matrix < matrices[one]; matrix++) {
      const size_t place = jobs.size();
      const int64_t rows = sizes[2 * place], columns = sizes[2 * place + 1];
      jobs.push_back({static_cast<float*>(weights[one].data_ptr()) + begin,
                      static_cast<float*>(averages[one].data_ptr()) + begin,
                      static_cast<const float*>(gradients[one].data_ptr()) + begin, rows, columns, float(momenta[one]),
                      float(factors[place]), float(decays[one]), steps, group_steps[place]});
      begin += rows * columns;
    }
    STD_TORCH_CHECK(begin == weights[one].numel(), "muon_step: the matrices do not add up to their weight");
  }
  const int64_t chosen = isa == BEST ? best_isa() : std::min(isa, best_isa());
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    static thread_local Arena arena;
    for (size_t job = next++; job < jobs.size(); job = next++) update_with(jobs[job], arena, narrow, chosen);
    arena.end();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llm_quest, m) {
  m.def(
      "muon_step(Tensor(a!)[] weights, Tensor(b!)[] averages, Tensor[] gradients, int[] matrices, int[] sizes, "
      "float[] factors, float[] momenta, float[] decays, int[] group_steps, int steps, bool narrow, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llm_quest, CPU, m) { m.impl("muon_step", TORCH_BOX(&muon_step)); }
