// Layers of a training step in one pass over their numbers, float32 (layers/training_kernels.py): RMSNorm, SiLU(gate) up,
// rotary positions, and the cross-entropy of logits with its gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "tensors.h"
#include "vectors.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t MIN_NUMBERS = 1 << 15;  // that repay a thread
constexpr int64_t BLOCK_ROWS = 256;  // whose gradients of a norm's weight are summed in turn, on any number of threads

struct RmsNorm {
  const float *x, *weight, *g;
  float *out, *inverse;
  int64_t x_row, width;
  float eps;
};

struct SiluProduct {
  const float *gate_up, *g;
  float* out;
  int64_t width;
};

struct Rotation {
  const float *x, *cos, *sin;
  float* out;
  int64_t x_row, x_token, x_head, table_row, tokens, heads, width;
  float sign;
};

struct CrossEntropy {
  float *logits, *losses;
  const int64_t* targets;
  int64_t width, ignored;
};

// Rows of scores: `sharing` heads for each of the positions from `first` on, `rows` in all, and then the next matrix.
struct CausalRows {
  float* numbers;
  const float* weights;
  int64_t rows, width, first, sharing;
  float scale;
};

#define TILES "training_tiles.h"
#include "tiles_by_isa.h"

#ifdef VECTORS
#define BY_ISA(isa, ...)                            \
  do {                                              \
    if (isa == AVX512) avx512::__VA_ARGS__;         \
    else if (isa == AVX2) avx2::__VA_ARGS__;        \
    else plain::__VA_ARGS__;                        \
  } while (0)
#else
#define BY_ISA(isa, ...) plain::__VA_ARGS__
#endif

int64_t choose(int64_t isa) {
  static const int64_t best = best_isa();
  return isa == BEST ? best : std::min(isa, best);
}

float* numbers(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

template <class Body>
void for_rows(int64_t rows, int64_t width, const Body& body) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, MIN_NUMBERS / std::max<int64_t>(1, width)), body);
}

bool is_matrix(const Tensor& t) { return t.dim() == 2 && t.scalar_type() == ScalarType::Float && t.stride(1) == 1; }

// x (N,D), weight (D) -> y (N,D) and 1 / rms (N).
std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps, int64_t isa) {
  STD_TORCH_CHECK(is_matrix(x) && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.numel() == x.size(1),
                  "rms_norm: x is (N,D), its rows side by side, weight (D), both float32");
  Tensor y = empty_on_host(x, {x.size(0), x.size(1)}), inverse = empty_on_host(x, {x.size(0)});
  const RmsNorm a{numbers(x), numbers(weight), nullptr, numbers(y), numbers(inverse), x.stride(0), x.size(1), float(eps)};
  const int64_t chosen = choose(isa);
  for_rows(x.size(0), a.width, [&](int64_t begin, int64_t end) { BY_ISA(chosen, rms_norm_rows(a, begin, end)); });
  return {y, inverse};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor inverse, int64_t isa) {
  const int64_t rows = x.size(0), width = x.size(1), blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  STD_TORCH_CHECK(is_matrix(x) && is_matrix(g) && g.is_contiguous() && g.numel() == rows * width && weight.is_contiguous() &&
                      weight.numel() == width && inverse.is_contiguous() && inverse.numel() == rows,
                  "rms_norm_backward: g and x are (N,D), weight (D), inverse (N), all float32");
  Tensor dx = empty_on_host(x, {rows, width}), dw = empty_on_host(x, {width});
  std::vector<float> parts(blocks * width);
  const RmsNorm a{numbers(x), numbers(weight), numbers(g), numbers(dx), numbers(inverse), x.stride(0), width, 0};
  const int64_t chosen = choose(isa);
  for_rows(blocks, width * BLOCK_ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      BY_ISA(chosen, rms_norm_backward_rows(a, parts.data() + block * width, block * BLOCK_ROWS, std::min(rows, (block + 1) * BLOCK_ROWS)));
  });
  float* sums = numbers(dw);
  std::fill_n(sums, width, 0.0f);
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t c = 0; c < width; c++) sums[c] += parts[block * width + c];
  return {dx, dw};
}

// gate_up (N,2F), gate first -> silu(gate) up (N,F).
Tensor silu_product(Tensor gate_up, int64_t isa) {
  STD_TORCH_CHECK(is_matrix(gate_up) && gate_up.is_contiguous() && gate_up.size(1) % 2 == 0,
                  "silu_product: gate_up is (N,2F) of float32, contiguous");
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = empty_on_host(gate_up, {rows, width});
  const SiluProduct a{numbers(gate_up), nullptr, numbers(out), width};
  const int64_t chosen = choose(isa);
  for_rows(rows, width, [&](int64_t begin, int64_t end) { BY_ISA(chosen, silu_product_rows(a, begin, end)); });
  return out;
}

Tensor silu_product_backward(Tensor g, Tensor gate_up, int64_t isa) {
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  STD_TORCH_CHECK(is_matrix(gate_up) && gate_up.is_contiguous() && is_matrix(g) && g.is_contiguous() && g.size(0) == rows && g.size(1) == width,
                  "silu_product_backward: g is (N,F), gate_up (N,2F), both float32 and contiguous");
  Tensor out = empty_on_host(gate_up, {rows, 2 * width});
  const SiluProduct a{numbers(gate_up), numbers(g), numbers(out), width};
  const int64_t chosen = choose(isa);
  for_rows(rows, width, [&](int64_t begin, int64_t end) { BY_ISA(chosen, silu_product_backward_rows(a, begin, end)); });
  return out;
}

// x (B,T,H,d); cos, sin (B or 1,T,1,d), as of `widen_tables`; back: the rotation in the other direction.
Tensor rotate(Tensor x, Tensor cos, Tensor sin, bool back, int64_t isa) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float && x.stride(3) == 1 && x.size(3) % 2 == 0,
                  "rotate: x is (B,T,H,d) of float32, a head's numbers side by side");
  for (const Tensor* table : {&cos, &sin})
    STD_TORCH_CHECK(table->is_contiguous() && table->scalar_type() == ScalarType::Float && table->dim() == 4 &&
                        (table->size(0) == 1 || table->size(0) == x.size(0)) && table->size(1) == x.size(1) &&
                        table->size(2) == 1 && table->size(3) == x.size(3),
                    "rotate: cos and sin are (B or 1,T,1,d) of float32");
  Tensor out = empty_on_host(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  const Rotation a{numbers(x), numbers(cos), numbers(sin), numbers(out), x.stride(0), x.stride(1), x.stride(2),
                   cos.size(0) == 1 ? 0 : x.size(1) * x.size(3), x.size(1), x.size(2), x.size(3), back ? -1.0f : 1.0f};
  const int64_t chosen = choose(isa);
  for_rows(x.size(0) * x.size(1), a.heads * a.width, [&](int64_t begin, int64_t end) { BY_ISA(chosen, rotate_tokens(a, begin, end)); });
  return out;
}

// logits (N,V) become their gradient; returns the losses (N).
Tensor cross_entropy_(Tensor logits, Tensor targets, int64_t ignored, int64_t isa) {
  STD_TORCH_CHECK(is_matrix(logits) && logits.is_contiguous() && targets.scalar_type() == ScalarType::Long &&
                      targets.is_contiguous() && targets.numel() == logits.size(0),
                  "cross_entropy_: logits are (N,V) of float32, targets (N) of int64");
  Tensor losses = empty_on_host(logits, {logits.size(0)});
  const CrossEntropy a{numbers(logits), numbers(losses), static_cast<const int64_t*>(targets.data_ptr()), logits.size(1), ignored};
  for (int64_t row = 0; row < logits.size(0); row++)
    STD_TORCH_CHECK(a.targets[row] == ignored || (a.targets[row] >= 0 && a.targets[row] < a.width),
                    "cross_entropy_: a target is outside of the vocabulary");
  const int64_t chosen = choose(isa);
  for_rows(logits.size(0), a.width, [&](int64_t begin, int64_t end) { BY_ISA(chosen, cross_entropy_rows(a, begin, end)); });
  return losses;
}

bool is_stack(const Tensor& t) { return t.dim() == 3 && t.scalar_type() == ScalarType::Float && t.is_contiguous(); }

// scores (N,R,S) of R / sharing positions from `first` on become attention weights.
void causal_softmax_(Tensor scores, int64_t first, int64_t sharing, double scale, int64_t isa) {
  STD_TORCH_CHECK(is_stack(scores) && sharing > 0 && first >= 0, "causal_softmax_: scores are (N,R,S) of float32, contiguous");
  const CausalRows a{numbers(scores), nullptr, scores.size(1), scores.size(2), first, sharing, float(scale)};
  const int64_t chosen = choose(isa);
  for_rows(scores.size(0) * a.rows, a.width, [&](int64_t begin, int64_t end) { BY_ISA(chosen, causal_softmax_rows(a, begin, end)); });
}

void causal_softmax_backward_(Tensor g, Tensor weights, int64_t first, int64_t sharing, double scale, int64_t isa) {
  STD_TORCH_CHECK(is_stack(g) && is_stack(weights) && weights.numel() == g.numel() && sharing > 0 && first >= 0,
                  "causal_softmax_backward_: gradient and weights are (N,R,S) of float32, contiguous");
  const CausalRows a{numbers(g), numbers(weights), g.size(1), g.size(2), first, sharing, float(scale)};
  const int64_t chosen = choose(isa);
  for_rows(g.size(0) * a.rows, a.width, [&](int64_t begin, int64_t end) { BY_ISA(chosen, causal_softmax_backward_rows(a, begin, end)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llm_quest, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, int isa) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor inverse, int isa) -> (Tensor, Tensor)");
  m.def("silu_product(Tensor gate_up, int isa) -> Tensor");
  m.def("silu_product_backward(Tensor g, Tensor gate_up, int isa) -> Tensor");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, bool back, int isa) -> Tensor");
  m.def("causal_softmax_(Tensor(a!) scores, int first, int sharing, float scale, int isa) -> ()");
  m.def("causal_softmax_backward_(Tensor(a!) g, Tensor weights, int first, int sharing, float scale, int isa) -> ()");
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, int ignored, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llm_quest, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("silu_product", TORCH_BOX(&silu_product));
  m.impl("silu_product_backward", TORCH_BOX(&silu_product_backward));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("causal_softmax_", TORCH_BOX(&causal_softmax_));
  m.impl("causal_softmax_backward_", TORCH_BOX(&causal_softmax_backward_));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}
