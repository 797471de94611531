// The tiles of quantized_rows.cpp. This text is included once for each instruction set, in a namespace that defines
//
//   LANES, Floats                             8 or 16 float32
//   load(const float*), broadcast(float)
//   widen(const int8_t*), widen(const BFloat16*)     LANES codes of 8 bits, LANES stored numbers
//   unpack(const uint8_t*, Codes& low, Codes& high)    LANES pairs of 4-bit codes
//   to_floats(Codes), look_up(Codes, const float* levels)
//   multiply_add(Floats a, Floats b, Floats c)         a * b + c
//   add, sum_lanes

// Sums of R rows of W, `apart` numbers from each to the next, with M rows of x. Plain numbers, or codes of 8 bits.
template <int R, int M, class Code>
inline void sum_rows(const Code* w, int64_t apart, const float* x, int64_t K, float sums[R][M]) {
  Floats even[R][M], odd[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) even[r][m] = odd[r][m] = broadcast(0);
  int64_t k = 0;
  for (; k + 2 * LANES <= K; k += 2 * LANES) {
    for (int r = 0; r < R; r++) {
      const Code* row = w + r * apart + k;
      if (R == 1) prefetch_ahead(row, 2 * LANES * sizeof(Code));
      const Floats v = widen(row), u = widen(row + LANES);
      for (int m = 0; m < M; m++) {
        even[r][m] = multiply_add(v, load(x + m * K + k), even[r][m]);
        odd[r][m] = multiply_add(u, load(x + m * K + k + LANES), odd[r][m]);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) {
      sums[r][m] = sum_lanes(add(even[r][m], odd[r][m]));
      for (int64_t rest = k; rest < K; rest++) sums[r][m] += widen_one(w[r * apart + rest]) * x[m * K + rest];
    }
  }
}

// Codes of 8 bits, one scale for each row.
template <int R, int M, class Scale>
inline void int8_tile(const Product& p, int64_t n, int64_t o, int64_t step) {
  float sums[R][M];
  sum_rows<R, M>(reinterpret_cast<const int8_t*>(p.q) + o * p.width, step * p.width, p.x + n * p.width, p.width, sums);
  for (int r = 0; r < R; r++) {
    const float scale = widen_one(scales_of<Scale>(p)[o + r * step]);
    for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o + r * step] = sums[r][m] * scale;
  }
}

// Plain numbers.
template <int R, int M, class Number>
inline void float_tile(const Product& p, int64_t n, int64_t o, int64_t step) {
  float sums[R][M];
  sum_rows<R, M>(reinterpret_cast<const Number*>(p.q) + o * p.width, step * p.width, p.x + n * p.width, p.width, sums);
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o + r * step] = sums[r][m];
}

// Pairs of 4-bit codes, and a scale for each group: w = scale * level[code] with TABLE, else scale * code + minimum.
template <int R, int M, class Scale, bool TABLE>
inline void int4_tile(const Product& p, int64_t n, int64_t o, int64_t step) {
  const int64_t K = p.width, groups = K / GROUP, per_row = groups * (TABLE ? 1 : 2);
  const uint8_t* first = p.q + o * groups * (GROUP / 2);
  const Scale* scales = scales_of<Scale>(p) + o * per_row;
  const float* x = p.x + n * K;
  Floats even[R][M], odd[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) even[r][m] = odd[r][m] = broadcast(0);
  for (int64_t g = 0; g < groups; g++) {
    for (int r = 0; r < R; r++) {
      const uint8_t* pairs = first + (r * step * groups + g) * (GROUP / 2);
      const Floats scale = broadcast(widen_one(scales[r * step * per_row + g]));
      const Floats minimum = broadcast(TABLE ? 0.0f : widen_one(scales[r * step * per_row + groups + g]));
      for (int64_t j = 0; j < GROUP / 2; j += LANES) {
        Codes low, high;
        unpack(pairs + j, low, high);
        const Floats v = multiply_add(TABLE ? look_up(low, p.levels) : to_floats(low), scale, minimum);
        const Floats w = multiply_add(TABLE ? look_up(high, p.levels) : to_floats(high), scale, minimum);
        for (int m = 0; m < M; m++) {
          const float* group = x + m * K + g * GROUP + j;
          even[r][m] = multiply_add(v, load(group), even[r][m]);
          odd[r][m] = multiply_add(w, load(group + GROUP / 2), odd[r][m]);
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o + r * step] = sum_lanes(add(even[r][m], odd[r][m]));
}

// R rows of W, `step` rows from each to the next, with M rows of x.
template <int R, int M, class Scale>
inline void tile(const Product& p, int64_t n, int64_t o, int64_t step) {
  if (p.format == INT8) int8_tile<R, M, Scale>(p, n, o, step);
  if (p.format == INT4) int4_tile<R, M, Scale, false>(p, n, o, step);
  if (p.format == NF4) int4_tile<R, M, Scale, true>(p, n, o, step);
  if (p.format == FLOAT32) float_tile<R, M, float>(p, n, o, step);
  if (p.format == BFLOAT16) float_tile<R, M, BFloat16>(p, n, o, step);
}

// The rows of W from `begin` up to `end`, with all rows of x: STREAMS parts at once, or in order where there are rows of
// x enough for a tile.
template <class Scale>
void multiply(const Product& p, int64_t begin, int64_t end) {
  const int64_t step = p.rows < TILE ? (end - begin) / STREAMS : 0;
  for (int64_t o = begin; o < begin + step; o++)
    for (int64_t n = 0; n < p.rows; n++) tile<STREAMS, 1, Scale>(p, n, o, step);
  for (int64_t o = begin + STREAMS * step; o < end; o++) {
    int64_t n = 0;
    for (; n + TILE <= p.rows; n += TILE) tile<1, TILE, Scale>(p, n, o, 0);
    for (; n < p.rows; n++) tile<1, 1, Scale>(p, n, o, 0);
  }
}
