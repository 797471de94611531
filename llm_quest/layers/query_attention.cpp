// softmax(q k^T scale) v for one query of each row over its cache (layers/scaled_dot_product.py): what a decoded token
// asks. q (B,1,H,d), k (B,S,G,d), v (B,S,G,dv), float32 or bfloat16; query head h reads key head h / (H/G).
//
// Keys that are masked are not read, so a row's result has the same bits whatever the capacity of its cache and whatever
// rows come with it. Scores, weights and sums are float32; the division by the sum of the weights comes last.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <vector>

#include "tensors.h"
#include "vectors.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t MIN_WORK = 1 << 17;  // products that repay a thread
constexpr int64_t COLUMNS = 4;  // vectors of a value that are summed at once

// Where the numbers of one row, slot and head are, in numbers from the first.
struct Strides {
  int64_t row, slot, head;
};

// mask: true for a visible key. sink: a logit of each head that takes weight and has no value.
struct Attention {
  const void *q, *k, *v;
  const bool* mask;
  const float* sink;
  void* out;
  Strides of_q, of_k, of_v, of_mask;
  int64_t rows, heads, groups, slots, width, value_width;
  float scale, softcap;
};

inline float stored(float number, const float*) { return number; }
inline BFloat16 stored(float number, const BFloat16*) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return number != number ? 0x7fc0 : BFloat16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The slots that the query of a row sees.
inline std::vector<int64_t> visible_slots(const Attention& a, int64_t row) {
  std::vector<int64_t> seen;
  seen.reserve(a.slots);
  const bool* mask = a.mask ? a.mask + row * a.of_mask.row : nullptr;
  for (int64_t s = 0; s < a.slots; s++)
    if (!mask || mask[s * a.of_mask.slot]) seen.push_back(s);
  return seen;
}

#define TILES "query_tiles.h"
#include "tiles_by_isa.h"

template <class Number>
void attend_with(const Attention& a, int64_t isa, int64_t begin, int64_t end) {
#ifdef VECTORS
  if (isa == AVX512) return avx512::attend<Number>(a, begin, end);
  if (isa == AVX2) return avx2::attend<Number>(a, begin, end);
#endif
  plain::attend<Number>(a, begin, end);
}

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

bool fits(const Tensor& t, ScalarType dtype) { return t.dim() == 4 && t.scalar_type() == dtype && t.stride(3) == 1; }

// mask (B or 1, S) bool; sink (H) float32; softcap 0: none -> (B,1,H,dv) in the dtype of q.
Tensor query_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, std::optional<Tensor> sink,
                       double scale, double softcap, int64_t isa) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && fits(q, dtype) && fits(k, dtype) && fits(v, dtype),
                  "query_attention: q, k and v are (B,T,H,d) of float32 or bfloat16, with a head's numbers side by side");
  STD_TORCH_CHECK(q.size(1) == 1 && k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(3) == q.size(3) &&
                      v.size(1) == k.size(1) && v.size(2) == k.size(2) && q.size(2) % k.size(2) == 0,
                  "query_attention: one query a row, and k and v of the same rows, slots and heads");
  STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(1) == k.size(1) &&
                            (mask->size(0) == q.size(0) || mask->size(0) == 1)),
                  "query_attention: the mask is (B or 1, S) of bool");
  STD_TORCH_CHECK(!sink || (sink->scalar_type() == ScalarType::Float && sink->is_contiguous() && sink->numel() == q.size(2)),
                  "query_attention: the sink is (H) of float32");
  Tensor out = empty_on_host(q, {q.size(0), 1, q.size(2), v.size(3)});
  const Strides of_mask = mask ? Strides{mask->size(0) == 1 ? 0 : mask->stride(0), mask->stride(1), 0} : Strides{};
  const Attention a{q.data_ptr(), k.data_ptr(), v.data_ptr(), mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr,
                    sink ? static_cast<const float*>(sink->data_ptr()) : nullptr, out.data_ptr(), strides_of(q), strides_of(k),
                    strides_of(v), of_mask, q.size(0), q.size(2), k.size(2), k.size(1), q.size(3), v.size(3), float(scale), float(softcap)};
  static const int64_t best = best_isa();
  const int64_t chosen = isa == BEST ? best : std::min(isa, best);
  const int64_t work = a.slots * (a.width + a.value_width) * (a.heads / a.groups);
  torch::stable::parallel_for(0, a.rows * a.groups, std::max<int64_t>(1, MIN_WORK / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) {
    dtype == ScalarType::Float ? attend_with<float>(a, chosen, begin, end) : attend_with<BFloat16>(a, chosen, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llm_quest, m) {
  m.def("query_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sink, float scale, float softcap, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llm_quest, CPU, m) {
  m.impl("query_attention", TORCH_BOX(&query_attention));
}
