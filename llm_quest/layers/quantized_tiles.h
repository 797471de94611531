// The tiles of quantized_rows.cpp. This text is included once for each instruction set, in a namespace that defines
//
//   LANES, Floats                             8 or 16 float32
//   load(const float*), broadcast(float)
//   widen(const int8_t*), widen(const BFloat16*)     LANES codes of 8 bits, LANES stored numbers
//   unpack(const uint8_t*, Codes& low, Codes& high)    LANES pairs of 4-bit codes
//   to_floats(Codes), look_up(Codes, const float* levels)
//   multiply_add(Floats a, Floats b, Floats c)         a * b + c
//   add, sum_lanes

// Plain numbers, or codes of 8 bits: one number after another.
template <int M, class Code>
inline void sum_row(const Code* w, const float* x, int64_t K, float* sums) {
  Floats even[M], odd[M];
  for (int m = 0; m < M; m++) even[m] = odd[m] = broadcast(0);
  int64_t k = 0;
  for (; k + 2 * LANES <= K; k += 2 * LANES) {
    prefetch_ahead(w + k, 2 * LANES * sizeof(Code));
    const Floats v = widen(w + k), u = widen(w + k + LANES);
    for (int m = 0; m < M; m++) {
      even[m] = multiply_add(v, load(x + m * K + k), even[m]);
      odd[m] = multiply_add(u, load(x + m * K + k + LANES), odd[m]);
    }
  }
  for (int m = 0; m < M; m++) {
    sums[m] = sum_lanes(add(even[m], odd[m]));
    for (int64_t rest = k; rest < K; rest++) sums[m] += widen_one(w[rest]) * x[m * K + rest];
  }
}

// Codes of 8 bits, one scale for each row.
template <int M, class Scale>
inline void int8_tile(const Product& p, int64_t n, int64_t o) {
  float sums[M];
  sum_row<M>(reinterpret_cast<const int8_t*>(p.q) + o * p.width, p.x + n * p.width, p.width, sums);
  const float scale = widen_one(scales_of<Scale>(p)[o]);
  for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o] = sums[m] * scale;
}

// Plain numbers.
template <int M, class Number>
inline void float_tile(const Product& p, int64_t n, int64_t o) {
  float sums[M];
  sum_row<M>(reinterpret_cast<const Number*>(p.q) + o * p.width, p.x + n * p.width, p.width, sums);
  for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o] = sums[m];
}

// Pairs of 4-bit codes, and a scale for each group: w = scale * level[code] with TABLE, else scale * code + minimum.
template <int M, class Scale, bool TABLE>
inline void int4_tile(const Product& p, int64_t n, int64_t o) {
  const int64_t K = p.width, groups = K / GROUP;
  const uint8_t* pairs = p.q + o * groups * (GROUP / 2);
  const auto* scales = scales_of<Scale>(p) + o * groups * (TABLE ? 1 : 2);
  const float* x = p.x + n * K;
  Floats even[M], odd[M];
  for (int m = 0; m < M; m++) even[m] = odd[m] = broadcast(0);
  for (int64_t g = 0; g < groups; g++) {
    const Floats scale = broadcast(widen_one(scales[g]));
    const Floats minimum = broadcast(TABLE ? 0.0f : widen_one(scales[groups + g]));
    for (int64_t j = 0; j < GROUP / 2; j += LANES) {
      Codes low, high;
      unpack(pairs + g * (GROUP / 2) + j, low, high);
      const Floats v = multiply_add(TABLE ? look_up(low, p.levels) : to_floats(low), scale, minimum);
      const Floats w = multiply_add(TABLE ? look_up(high, p.levels) : to_floats(high), scale, minimum);
      for (int m = 0; m < M; m++) {
        const float* group = x + m * K + g * GROUP + j;
        even[m] = multiply_add(v, load(group), even[m]);
        odd[m] = multiply_add(w, load(group + GROUP / 2), odd[m]);
      }
    }
  }
  for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o] = sum_lanes(add(even[m], odd[m]));
}

template <int M, class Scale>
inline void tile(const Product& p, int64_t n, int64_t o) {
  if (p.format == INT8) int8_tile<M, Scale>(p, n, o);
  if (p.format == INT4) int4_tile<M, Scale, false>(p, n, o);
  if (p.format == NF4) int4_tile<M, Scale, true>(p, n, o);
  if (p.format == FLOAT32) float_tile<M, float>(p, n, o);
  if (p.format == BFLOAT16) float_tile<M, BFloat16>(p, n, o);
}

// The rows of W from `begin` up to `end`, with all rows of x.
template <class Scale>
void multiply(const Product& p, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o++) {
    int64_t n = 0;
    for (; n + TILE <= p.rows; n += TILE) tile<TILE, Scale>(p, n, o);
    for (; n < p.rows; n++) tile<1, Scale>(p, n, o);
  }
}
