// Rows of the training operators, from the vectors of the namespace that includes this text (vectors.h;
// training_kernels.cpp). Widths are any number: what is behind the last whole vector is computed in a vector of its own.
#include "exponential.h"

inline Floats load_part(const float* x, int64_t count) { return count >= LANES ? load(x) : load_first(x, count); }
inline void store_part(float* x, const Floats& v, int64_t count) {
  if (count >= LANES) return store(x, v);
  float lanes[LANES];
  store(lanes, v);
  std::copy_n(lanes, count, x);
}

// y = x r w with r = 1 / sqrt(mean(x^2) + eps).
inline void rms_norm_rows(const RmsNorm& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float* x = a.x + row * a.x_row;
    float* y = a.out + row * a.width;
    Floats sum = broadcast(0);
    for (int64_t c = 0; c < a.width; c += LANES) {
      const Floats v = load_part(x + c, a.width - c);
      sum = multiply_add(v, v, sum);
    }
    const float r = 1 / std::sqrt(sum_lanes(sum) / a.width + a.eps);
    a.inverse[row] = r;
    for (int64_t c = 0; c < a.width; c += LANES)
      store_part(y + c, times(times(load_part(x + c, a.width - c), broadcast(r)), load_part(a.weight + c, a.width - c)), a.width - c);
  }
}

// dx = r (g w - x r^2 mean(g w x)), dw += g x r.
inline void rms_norm_backward_rows(const RmsNorm& a, float* dw, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float *x = a.x + row * a.x_row, *g = a.g + row * a.width, r = a.inverse[row];
    float* dx = a.out + row * a.width;
    Floats sum = broadcast(0);
    for (int64_t c = 0; c < a.width; c += LANES) {
      const int64_t count = a.width - c;
      const Floats product = times(load_part(g + c, count), load_part(x + c, count));
      sum = multiply_add(product, load_part(a.weight + c, count), sum);
      store_part(dw + c, multiply_add(product, broadcast(r), load_part(dw + c, count)), count);
    }
    const Floats share = broadcast(-sum_lanes(sum) / a.width * r * r * r);
    for (int64_t c = 0; c < a.width; c += LANES) {
      const int64_t count = a.width - c;
      const Floats scaled = times(times(load_part(g + c, count), load_part(a.weight + c, count)), broadcast(r));
      store_part(dx + c, multiply_add(load_part(x + c, count), share, scaled), count);
    }
  }
}

// 1 / (1 + e^-x), where e^88 is the largest.
inline Floats sigmoid(Floats x) {
  const Floats negated = times(larger(broadcast(-88), x), broadcast(-1));
  return divide(broadcast(1), add(broadcast(1), exponential(negated)));
}

inline void silu_product_rows(const SiluProduct& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float *gate = a.gate_up + row * 2 * a.width, *up = gate + a.width;
    float* out = a.out + row * a.width;
    for (int64_t c = 0; c < a.width; c += LANES) {
      const int64_t count = a.width - c;
      const Floats x = load_part(gate + c, count);
      store_part(out + c, times(times(x, sigmoid(x)), load_part(up + c, count)), count);
    }
  }
}

// With s = sigmoid(gate): d_up = g gate s, d_gate = g up s (1 + gate (1 - s)).
inline void silu_product_backward_rows(const SiluProduct& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float *gate = a.gate_up + row * 2 * a.width, *up = gate + a.width, *g = a.g + row * a.width;
    float *d_gate = a.out + row * 2 * a.width, *d_up = d_gate + a.width;
    for (int64_t c = 0; c < a.width; c += LANES) {
      const int64_t count = a.width - c;
      const Floats x = load_part(gate + c, count), s = sigmoid(x), gs = times(load_part(g + c, count), s);
      const Floats slope = multiply_add(x, add(broadcast(1), times(s, broadcast(-1))), broadcast(1));
      store_part(d_up + c, times(gs, x), count);
      store_part(d_gate + c, times(times(gs, load_part(up + c, count)), slope), count);
    }
  }
}

// Tokens: (a, b) -> (a cos - b sin, b cos + a sin); the tables are those of `widen_tables`, sin times `sign`.
inline void rotate_tokens(const Rotation& a, int64_t begin, int64_t end) {
  const int64_t half = a.width / 2;
  for (int64_t token = begin; token < end; token++) {
    const int64_t row = token / a.tokens, t = token % a.tokens;
    const float *cos = a.cos + row * a.table_row + t * a.width, *sin = a.sin + row * a.table_row + t * a.width;
    for (int64_t head = 0; head < a.heads; head++) {
      const float* x = a.x + row * a.x_row + t * a.x_token + head * a.x_head;
      float* y = a.out + (token * a.heads + head) * a.width;
      for (int64_t part = 0; part < a.width; part += half) {
        for (int64_t c = 0; c < half; c += LANES) {
          const int64_t count = half - c;
          const Floats turned = times(load_part(x + (half - part) + c, count), load_part(sin + part + c, count));
          const Floats kept = times(load_part(x + part + c, count), load_part(cos + part + c, count));
          store_part(y + part + c, add(kept, times(turned, broadcast(a.sign))), count);
        }
      }
    }
  }
}

// Scores of causal queries, `sharing` heads for each position from a.first on, become softmax(scale z); 0 where a key is
// not visible.
inline void causal_softmax_rows(const CausalRows& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    float* z = a.numbers + row * a.width;
    const int64_t count = std::min(a.width, a.first + row % a.rows / a.sharing + 1);
    Floats most = broadcast(z[0]), sum = broadcast(0);
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) most = larger(load(z + c), most);
    float largest = largest_lane(most), total = 0;
    for (; c < count; c++) largest = std::max(largest, z[c]);
    const Floats scale = broadcast(a.scale), shift = broadcast(-largest * a.scale);
    for (c = 0; c + LANES <= count; c += LANES) {
      const Floats p = exponential(multiply_add(load(z + c), scale, shift));
      store(z + c, p);
      sum = add(sum, p);
    }
    if (c < count) {
      float lanes[LANES];
      store(lanes, exponential(multiply_add(load_first(z + c, count - c), scale, shift)));
      for (int64_t lane = 0; c + lane < count; lane++) total += z[c + lane] = lanes[lane];
    }
    const Floats share = broadcast(1 / (total + sum_lanes(sum)));
    for (c = 0; c < count; c += LANES) store_part(z + c, times(load_part(z + c, count - c), share), count - c);
    std::fill(z + count, z + a.width, 0.0f);
  }
}

// The gradient of p = softmax(scale z) becomes that of z: scale p (g - sum(g p)).
inline void causal_softmax_backward_rows(const CausalRows& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    float* g = a.numbers + row * a.width;
    const float* p = a.weights + row * a.width;
    const int64_t count = std::min(a.width, a.first + row % a.rows / a.sharing + 1);
    Floats sum = broadcast(0);
    for (int64_t c = 0; c < count; c += LANES)
      sum = multiply_add(load_part(g + c, count - c), load_part(p + c, count - c), sum);
    const Floats shift = broadcast(-sum_lanes(sum)), scale = broadcast(a.scale);
    for (int64_t c = 0; c < count; c += LANES) {
      const Floats moved = times(add(load_part(g + c, count - c), shift), load_part(p + c, count - c));
      store_part(g + c, times(moved, scale), count - c);
    }
    std::fill(g + count, g + a.width, 0.0f);
  }
}

// Rows of logits become softmax(z) - onehot(target), and losses -log softmax(z)[target]; both 0 without a target.
inline void cross_entropy_rows(const CrossEntropy& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    float* z = a.logits + row * a.width;
    const int64_t target = a.targets[row];
    a.losses[row] = 0;
    if (target == a.ignored) {
      std::fill_n(z, a.width, 0.0f);
      continue;
    }
    float largest = z[0];
    const int64_t whole = a.width / LANES * LANES;
    if (whole) {
      Floats most = load(z);
      for (int64_t c = LANES; c < whole; c += LANES) most = larger(load(z + c), most);
      largest = largest_lane(most);
    }
    for (int64_t c = whole; c < a.width; c++) largest = std::max(largest, z[c]);
    const float of_target = z[target];
    Floats sum = broadcast(0);
    for (int64_t c = 0; c < whole; c += LANES) {
      const Floats p = exponential(add(load(z + c), broadcast(-largest)));
      store(z + c, p);
      sum = add(sum, p);
    }
    float total = sum_lanes(sum);
    for (int64_t c = whole; c < a.width; c++) {
      float lanes[LANES];
      store(lanes, exponential(broadcast(z[c] - largest)));
      total += z[c] = lanes[0];
    }
    const float share = 1 / total;
    for (int64_t c = 0; c < whole; c += LANES) store(z + c, times(load(z + c), broadcast(share)));
    for (int64_t c = whole; c < a.width; c++) z[c] *= share;
    z[target] -= 1;
    a.losses[row] = largest - of_target + std::log(total);
  }
}
