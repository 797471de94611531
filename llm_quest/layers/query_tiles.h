// Attention of one head, from the vectors of the namespace that includes this text (vectors.h; query_attention.cpp).
#include "exponential.h"

template <class Number>
inline float dot(const float* q, const Number* k, int64_t width) {
  Floats even = broadcast(0), odd = broadcast(0);
  int64_t c = 0;
  for (; c + 2 * LANES <= width; c += 2 * LANES) {
    even = multiply_add(load(q + c), widen(k + c), even);
    odd = multiply_add(load(q + c + LANES), widen(k + c + LANES), odd);
  }
  float sum = sum_lanes(add(even, odd));
  for (; c < width; c++) sum += q[c] * widen_one(k[c]);
  return sum;
}

// The scores of one query become weights, exponentials of their distance from the largest; returns their sum. There is
// room for a vector behind the last score, whose weights are nothing.
inline float to_weights(float* scores, int64_t count, const float* sink) {
  const float least = -std::numeric_limits<float>::infinity();
  std::fill_n(scores + count, LANES, least);
  Floats most = broadcast(sink ? *sink : least), sum = broadcast(0);
  for (int64_t i = 0; i < count; i += LANES) most = larger(load(scores + i), most);
  const float largest = largest_lane(most);
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats weights = exponential(add(load(scores + i), broadcast(-largest)));
    store(scores + i, weights);
    sum = add(sum, weights);
  }
  if (!sink) return sum_lanes(sum);
  float alone[LANES];
  store(alone, exponential(broadcast(*sink - largest)));
  return sum_lanes(sum) + alone[0];
}

// sum_i weight_i v_i / total, for SUMS vectors of columns.
template <int SUMS, class Number>
inline void mix(const Number* v, int64_t apart, const std::vector<int64_t>& seen, const float* weights, float total,
                Number* out) {
  Floats sum[SUMS];
  for (Floats& one : sum) one = broadcast(0);
  for (size_t i = 0; i < seen.size(); i++) {
    const Number* value = v + seen[i] * apart;
    for (int j = 0; j < SUMS; j++) sum[j] = multiply_add(broadcast(weights[i]), widen(value + j * LANES), sum[j]);
  }
  for (int j = 0; j < SUMS; j++) {
    float lanes[LANES];
    store(lanes, sum[j]);
    for (int64_t lane = 0; lane < LANES; lane++) out[j * LANES + lane] = stored(lanes[lane] / total, out);
  }
}

template <class Number>
inline void mix_columns(const Number* v, int64_t apart, const std::vector<int64_t>& seen, const float* weights, float total,
                        Number* out, int64_t width) {
  int64_t c = 0;
  for (; c + COLUMNS * LANES <= width; c += COLUMNS * LANES) mix<COLUMNS>(v + c, apart, seen, weights, total, out + c);
  for (; c + LANES <= width; c += LANES) mix<1>(v + c, apart, seen, weights, total, out + c);
  for (; c < width; c++) {
    float sum = 0;
    for (size_t i = 0; i < seen.size(); i++) sum += weights[i] * widen_one(v[seen[i] * apart + c]);
    out[c] = stored(sum / total, out);
  }
}

// The key heads from `begin` up to `end`, those of all rows one after the other, each with the query heads that read it.
template <class Number>
void attend(const Attention& a, int64_t begin, int64_t end) {
  const int64_t sharing = a.heads / a.groups;
  std::vector<float> q(a.width), scores(a.slots + LANES);
  std::vector<int64_t> seen;
  for (int64_t at = begin; at < end; at++) {
    const int64_t row = at / a.groups, group = at % a.groups;
    if (at == begin || group == 0) seen = visible_slots(a, row);
    const Number* k = static_cast<const Number*>(a.k) + row * a.of_k.row + group * a.of_k.head;
    const Number* v = static_cast<const Number*>(a.v) + row * a.of_v.row + group * a.of_v.head;
    for (int64_t head = group * sharing; head < (group + 1) * sharing; head++) {
      const Number* query = static_cast<const Number*>(a.q) + row * a.of_q.row + head * a.of_q.head;
      for (int64_t c = 0; c < a.width; c++) q[c] = widen_one(query[c]) * a.scale;
      for (size_t i = 0; i < seen.size(); i++) scores[i] = dot(q.data(), k + seen[i] * a.of_k.slot, a.width);
      for (size_t i = 0; a.softcap > 0 && i < seen.size(); i++) scores[i] = a.softcap * std::tanh(scores[i] / a.softcap);
      const float total = to_weights(scores.data(), seen.size(), a.sink ? a.sink + head : nullptr);
      Number* out = static_cast<Number*>(a.out) + (row * a.heads + head) * a.value_width;
      mix_columns(v, a.of_v.slot, seen, scores.data(), total, out, a.value_width);
    }
  }
}
