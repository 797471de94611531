// The tiles of quantized_rows.cpp. This text is included once for each instruction set, in a namespace that defines
//
//   LANES, Floats                             8 or 16 float32
//   load(const float*), broadcast(float)
//   widen(const int8_t*), widen(const BFloat16*)     LANES codes of 8 bits, LANES stored numbers
//   unpack(const uint8_t*, Codes& low, Codes& high)    LANES pairs of 4-bit codes, a code a lane
//   split(const uint8_t*, Codes& low, Codes& high)     4 LANES pairs of 4-bit codes, a code a byte
//   dot_pairs(Codes low, Codes high, const int8_t* x, const int8_t* y, Codes sum)    sum + low x + high y, 8 products a lane
//   to_floats(Codes), look_up(Codes, const float* levels), zero_codes(), next_digit(Codes)    256 times as much
//   spread(const Scale*)                      LANES / 4 scales, each in four lanes
//   multiply_add(Floats a, Floats b, Floats c)         a * b + c
//   times, add, sum_lanes

constexpr int64_t SPAN = LANES / 4;  // groups of 4-bit codes that are read at once

// Numbers of x, SPAN groups, the first and the second half of each: unit * (digit 0 + 256 digit 1 + 65536 digit 2), with the
// unit of a group in four lanes, and in four lanes parts of its sum.
struct alignas(64) Digits {
  int8_t low[3][4 * LANES], high[3][4 * LANES];
  float unit[LANES], sum[LANES];
};

// The digits of one group. One that is not finite has the unit NaN.
inline void write_digits(const float* x, Digits& to, int64_t group) {
  float largest = 0, sum[4] = {};
  bool finite = true;
  for (int i = 0; i < GROUP; i++) {
    largest = std::max(largest, std::fabs(x[i]));
    finite &= std::fabs(x[i]) <= std::numeric_limits<float>::max();
  }
  for (int i = 0; i < GROUP; i++) sum[i % 4] += x[i];
  const float per_unit = finite && largest > SMALLEST ? MOST_UNITS / largest : 0.0f;
  for (int i = 0; i < GROUP; i++) {
    const int32_t units = finite ? int32_t(std::nearbyintf(x[i] * per_unit)) : 0;
    int8_t(*digits)[4 * LANES] = i < GROUP / 2 ? to.low : to.high;
    const int64_t place = group * (GROUP / 2) + i % (GROUP / 2);
    const int32_t first = int8_t(units), second = int8_t((units - first) >> 8);
    digits[0][place] = int8_t(first);
    digits[1][place] = int8_t(second);
    digits[2][place] = int8_t((units - first - 256 * second) >> 16);
  }
  for (int i = 0; i < 4; i++) {
    to.unit[group * 4 + i] = finite ? largest / MOST_UNITS : std::numeric_limits<float>::quiet_NaN();
    to.sum[group * 4 + i] = sum[i];
  }
}

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

// Pairs of 4-bit codes of a table, and a scale for each group: w = scale * level[code].
template <int R, int M, class Scale>
inline void nf4_tile(const Product& p, int64_t n, int64_t o, int64_t step) {
  const int64_t K = p.width, groups = K / GROUP;
  const uint8_t* first = p.q + o * groups * (GROUP / 2);
  const Scale* scales = scales_of<Scale>(p) + o * groups;
  const float* x = p.x + n * K;
  Floats even[R][M], odd[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) even[r][m] = odd[r][m] = broadcast(0);
  for (int64_t g = 0; g < groups; g++) {
    for (int r = 0; r < R; r++) {
      const uint8_t* pairs = first + (r * step * groups + g) * (GROUP / 2);
      const Floats scale = broadcast(widen_one(scales[r * step * groups + g]));
      for (int64_t j = 0; j < GROUP / 2; j += LANES) {
        Codes low, high;
        unpack(pairs + j, low, high);
        const Floats v = times(look_up(low, p.levels), scale), w = times(look_up(high, p.levels), scale);
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

// Codes of 4 bits that are numbers, SPAN groups at once: w = scale * code + minimum. The sum of codes times x is one of
// integers, of x's three digits one after another (Horner), so it is exact; the minimum is multiplied with the sum of x.
template <int M, class Scale>
inline void add_groups(
    const uint8_t* pairs, const Scale* scales, const Scale* minima, const Digits* x, int64_t apart, Floats* total) {
  Codes low, high;
  split(pairs, low, high);
  const Floats scale = spread(scales), minimum = spread(minima);
  for (int m = 0; m < M; m++, x += apart) {
    Codes sum = dot_pairs(low, high, x->low[2], x->high[2], zero_codes());
    sum = dot_pairs(low, high, x->low[1], x->high[1], next_digit(sum));
    sum = dot_pairs(low, high, x->low[0], x->high[0], next_digit(sum));
    total[m] = multiply_add(times(to_floats(sum), load(x->unit)), scale, total[m]);
    total[m] = multiply_add(minimum, load(x->sum), total[m]);
  }
}

template <int R, int M, class Scale>
inline void int4_tile(const Product& p, int64_t n, int64_t o, int64_t step) {
  const int64_t groups = p.width / GROUP, apart = (groups + SPAN - 1) / SPAN, bytes = GROUP / 2;
  const uint8_t* pairs = p.q + o * groups * bytes;
  const Scale* scales = scales_of<Scale>(p) + o * groups * 2;
  const Digits* x = static_cast<const Digits*>(p.digits) + n * apart;
  Floats total[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) total[r][m] = broadcast(0);
  int64_t g = 0;
  for (; g + SPAN <= groups; g += SPAN, x++) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Scale* scale = scales + r * step * groups * 2 + g;
      add_groups<M>(pairs + (r * step * groups + g) * bytes, scale, scale + groups, x, apart, total[r]);
    }
  }
  for (int r = 0; r < R && g < groups; r++) {  // fewer groups than a vector has: the others' scales are 0
    uint8_t last[SPAN * GROUP / 2] = {};
    Scale scale[SPAN] = {}, minimum[SPAN] = {};
    std::memcpy(last, pairs + (r * step * groups + g) * bytes, (groups - g) * bytes);
    std::memcpy(scale, scales + r * step * groups * 2 + g, (groups - g) * sizeof(Scale));
    std::memcpy(minimum, scales + (r * step * 2 + 1) * groups + g, (groups - g) * sizeof(Scale));
    add_groups<M>(last, scale, minimum, x, apart, total[r]);
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o + r * step] = sum_lanes(total[r][m]);
}

// The digits of x.
inline std::vector<Digits> to_digits(const Product& p) {
  const int64_t groups = p.width / GROUP, apart = (groups + SPAN - 1) / SPAN;
  std::vector<Digits> made(p.rows * apart);  // zeros
  for (int64_t n = 0; n < p.rows; n++)
    for (int64_t g = 0; g < groups; g++)
      write_digits(p.x + n * p.width + g * GROUP, made[n * apart + g / SPAN], g % SPAN);
  return made;
}

// R rows of W, `step` rows from each to the next, with M rows of x.
template <int R, int M, class Scale>
inline void tile(const Product& p, int64_t n, int64_t o, int64_t step) {
  if (p.format == INT8) int8_tile<R, M, Scale>(p, n, o, step);
  if (p.format == INT4) int4_tile<R, M, Scale>(p, n, o, step);
  if (p.format == NF4) nf4_tile<R, M, Scale>(p, n, o, step);
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
