// The tiles of quantized_rows.cpp, from the vectors of the namespace that includes them (vectors.h). BYTE_PRODUCTS is
// defined where the instruction set multiplies bytes.

constexpr int64_t SPAN = LANES / 4;  // groups of 4-bit codes that are read at once

// Numbers of x, LANES groups, SPAN groups after SPAN groups, the first and the second half of each group: unit * (digit 0 +
// 256 digit 1 + 65536 digit 2). And the unit and the sum of each group.
struct alignas(64) Digits {
  int8_t low[4][3][4 * LANES], high[4][3][4 * LANES];
  float unit[LANES], sum[LANES];
};

// Write the digits of one group of x, each half of it three times, `apart` bytes from one digit to the next. Returns the
// group's unit, NaN where a number is not finite.
inline float write_digits(const float* x, int8_t* first_half, int8_t* second_half, int64_t apart) {
  Floats largest = broadcast(0), nothing = broadcast(0);
  for (int64_t i = 0; i < GROUP; i += LANES) {
    largest = larger(absolute(load(x + i)), largest);
    nothing = multiply_add(load(x + i), broadcast(0), nothing);
  }
  const float most = largest_lane(largest);
  if (sum_lanes(nothing) != 0) return std::numeric_limits<float>::quiet_NaN();
  const Floats per_unit = broadcast(most > SMALLEST ? MOST_UNITS / most : 0);
  for (int64_t i = 0; i < GROUP; i += LANES) {
    int8_t* digit = (i < GROUP / 2 ? first_half : second_half) + i % (GROUP / 2);
    Codes units = to_codes(times(load(x + i), per_unit));
    for (int d = 0; d < 3; d++, digit += apart) units = store_digit(units, digit);
  }
  return most / MOST_UNITS;
}

inline float sum_group(const float* x) {
  Floats sum = load(x);
  for (int64_t i = LANES; i < GROUP; i += LANES) sum = add(sum, load(x + i));
  return sum_lanes(sum);
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

#ifdef BYTE_PRODUCTS
// Codes of 8 bits, one scale for each row, as integers: w + 128, which has no sign, times x's digits, less 128 times them.
constexpr int64_t BYTES = 4 * LANES;

// BYTES numbers of x as digits, with the unit of each four, and `less`: -128 times the sum of each four.
struct alignas(64) ByteDigits {
  int8_t digit[3][BYTES];
  int32_t less[3][LANES];
  float unit[LANES];
};

inline Floats dot_digits(Codes w, const ByteDigits& x, Floats total) {
  Codes high = dot_bytes(w, x.digit[2], load_codes(x.less[2]));
  high = dot_bytes(w, x.digit[1], add_codes(next_digit(high), load_codes(x.less[1])));
  const Codes low = dot_bytes(w, x.digit[0], load_codes(x.less[0]));
  return multiply_add(multiply_add(to_floats(high), broadcast(256), to_floats(low)), load(x.unit), total);
}

template <int R, int M, class Scale>
inline void int8_tile(const Product& p, int64_t n, int64_t o, int64_t step) {
  const int64_t K = p.width, apart = (K + BYTES - 1) / BYTES;
  const int8_t* w = reinterpret_cast<const int8_t*>(p.q) + o * K;
  const ByteDigits* x = static_cast<const ByteDigits*>(p.digits) + n * apart;
  int8_t last[R][BYTES];
  int64_t row = step * K;
  Floats total[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) total[r][m] = broadcast(0);
  for (int64_t left = K; left > 0; left -= BYTES, w += BYTES, x++) {
    if (left < BYTES) {  // fewer codes than a vector has: the digits of the others are 0
      std::memset(last, 0, sizeof last);
      for (int r = 0; r < R; r++) std::memcpy(last[r], w + r * row, left);
      w = last[0], row = BYTES;
    }
#pragma GCC unroll UNROLL
    for (int r = 0; r < R; r++) {
      if (R == 1) prefetch_ahead(w, BYTES);
      const Codes codes = load_unsigned(w + r * row);
#pragma GCC unroll UNROLL
      for (int m = 0; m < M; m++) total[r][m] = dot_digits(codes, x[m * apart], total[r][m]);
    }
  }
#pragma GCC unroll UNROLL
  for (int r = 0; r < R; r++) {
    const float scale = widen_one(scales_of<Scale>(p)[o + r * step]);
#pragma GCC unroll UNROLL
    for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o + r * step] = sum_lanes(total[r][m]) * scale;
  }
}
#else
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
#endif

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

// Codes of 4 bits that are numbers: w = scale * code + minimum. The sum of codes times x is one of integers, of x's three
// digits one after another (Horner), so it is exact. weights: the scales of LANES groups times the units of x.
template <int M>
inline void add_groups(const uint8_t* pairs, const Digits* x, int64_t apart, int span, const Floats* weights, Floats* total) {
  Codes low, high;
  split(pairs, low, high);
#pragma GCC unroll UNROLL
  for (int m = 0; m < M; m++, x += apart) {
    Codes sum = dot_pairs(low, high, x->low[span][2], x->high[span][2], zero_codes());
    sum = dot_pairs(low, high, x->low[span][1], x->high[span][1], next_digit(sum));
    sum = dot_pairs(low, high, x->low[span][0], x->high[span][0], next_digit(sum));
    total[m] = multiply_add(to_floats(sum), spread(weights[m], span), total[m]);
  }
}

// `count` groups of one row of W, at most LANES. With 16 registers (LANES 8) int4_tile takes one row of W after the other,
// so that weights and sums stay in registers.
template <int M, class Scale>
inline void add_row(const uint8_t* pairs, const Scale* scale, int64_t groups, const Digits* x, int64_t apart, int64_t count,
                    Floats* total) {
  constexpr int64_t BYTES_AT_ONCE = SPAN * GROUP / 2;
  Floats weights[M];
  const Floats each = load_first(scale, count), minimum = load_first(scale + groups, count);
#pragma GCC unroll UNROLL
  for (int m = 0; m < M; m++) {
    weights[m] = times(each, load(x[m * apart].unit));
    total[m] = multiply_add(minimum, load(x[m * apart].sum), total[m]);
  }
#pragma GCC unroll UNROLL
  for (int span = 0; span < 4; span++) {
    if (count < (span + 1) * SPAN) {
      if (count <= span * SPAN) return;
      uint8_t last[BYTES_AT_ONCE] = {};  // fewer groups than a vector has: the others' weights are 0
      std::memcpy(last, pairs + span * BYTES_AT_ONCE, (count - span * SPAN) * (GROUP / 2));
      return add_groups<M>(last, x, apart, span, weights, total);
    }
    add_groups<M>(pairs + span * BYTES_AT_ONCE, x, apart, span, weights, total);
  }
}

// Scales and minima of LANES groups at once, of which `count` are there; the minimum is multiplied with the sum of x.
template <int R, int M, class Scale>
inline void int4_tile(const Product& p, int64_t n, int64_t o, int64_t step) {
  const int64_t groups = p.width / GROUP, apart = (groups + LANES - 1) / LANES, bytes = GROUP / 2;
  const uint8_t* pairs = p.q + o * groups * bytes;
  const Scale* scales = scales_of<Scale>(p) + o * groups * 2;
  const Digits* x = static_cast<const Digits*>(p.digits) + n * apart;
  uint8_t last[R][SPAN * GROUP / 2];
  int64_t row = step * groups * bytes;
  Floats total[R][M], weights[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) total[r][m] = broadcast(0);
  for (int64_t left = groups; left > 0; left -= LANES, x++, scales += LANES) {
    const int64_t count = std::min(LANES, left);
    if constexpr (LANES == 8) {
#pragma GCC unroll UNROLL
      for (int r = 0; r < R; r++)
        add_row<M>(pairs + r * row, scales + r * step * groups * 2, groups, x, apart, count, total[r]);
      pairs += LANES * bytes;
      continue;
    }
#pragma GCC unroll UNROLL
    for (int r = 0; r < R; r++) {
      const Scale* scale = scales + r * step * groups * 2;
      const Floats each = load_first(scale, count), minimum = load_first(scale + groups, count);
#pragma GCC unroll UNROLL
      for (int m = 0; m < M; m++) {
        weights[r][m] = times(each, load(x[m * apart].unit));
        total[r][m] = multiply_add(minimum, load(x[m * apart].sum), total[r][m]);
      }
    }
    for (int64_t g = 0; g < count; g += SPAN, pairs += SPAN * bytes) {
      if (count - g < SPAN) {  // fewer groups than a vector has: the others' weights are 0
        std::memset(last, 0, sizeof last);
        for (int r = 0; r < R; r++) std::memcpy(last[r], pairs + r * row, (count - g) * bytes);
        pairs = last[0], row = sizeof last[0];
      }
#pragma GCC unroll UNROLL
      for (int r = 0; r < R; r++) add_groups<M>(pairs + r * row, x, apart, int(g / SPAN), weights[r], total[r]);
    }
  }
#pragma GCC unroll UNROLL
  for (int r = 0; r < R; r++)
#pragma GCC unroll UNROLL
    for (int m = 0; m < M; m++) p.y[(n + m) * p.out + o + r * step] = sum_lanes(total[r][m]);
}

// The digits of x.
inline std::vector<Digits> to_digits(const Product& p) {
  const int64_t groups = p.width / GROUP, apart = (groups + LANES - 1) / LANES;
  std::vector<Digits> made(p.rows * apart);  // zeros
  for (int64_t n = 0; n < p.rows; n++) {
    for (int64_t g = 0; g < groups; g++) {
      Digits& to = made[n * apart + g / LANES];
      const int64_t lane = g % LANES, span = lane / SPAN, place = lane % SPAN * (GROUP / 2);
      const float* group = p.x + n * p.width + g * GROUP;
      to.unit[lane] = write_digits(group, to.low[span][0] + place, to.high[span][0] + place, 4 * LANES);
      to.sum[lane] = sum_group(group);
    }
  }
  return made;
}

#ifdef BYTE_PRODUCTS
// The same for codes of 8 bits.
inline std::vector<ByteDigits> to_bytes(const Product& p) {
  const int64_t apart = (p.width + BYTES - 1) / BYTES;
  std::vector<ByteDigits> made(p.rows * apart);  // zeros
  for (int64_t n = 0; n < p.rows; n++) {
    for (int64_t k = 0; k < p.width; k += GROUP) {
      ByteDigits& to = made[n * apart + k / BYTES];
      float rest[GROUP] = {};
      const float* group = p.x + n * p.width + k;
      if (p.width - k < GROUP) group = static_cast<float*>(std::memcpy(rest, group, (p.width - k) * sizeof(float)));
      int8_t* digit = to.digit[0] + k % BYTES;
      std::fill_n(to.unit + k % BYTES / 4, GROUP / 4, write_digits(group, digit, digit + GROUP / 2, BYTES));
    }
  }
  for (ByteDigits& one : made)
    for (int d = 0; d < 3; d++)
      store_codes(one.less[d], subtract_codes(zero_codes(), dot_bytes(all_bytes(-128), one.digit[d], zero_codes())));
  return made;
}
#endif

// The rows of W from `o` up to `end`, with M rows of x: R rows of W at once, `step` rows from each to the next.
template <int R, int M, class Scale>
void tiles(const Product& p, int64_t n, int64_t o, int64_t end, int64_t step) {
  if (p.format == INT8)
    for (; o < end; o++) int8_tile<R, M, Scale>(p, n, o, step);
  if (p.format == INT4)
    for (; o < end; o++) int4_tile<R, M, Scale>(p, n, o, step);
  if (p.format == NF4)
    for (; o < end; o++) nf4_tile<R, M, Scale>(p, n, o, step);
  if (p.format == FLOATS)
    for (; o < end; o++) float_tile<R, M, Scale>(p, n, o, step);
}

// The rows of W from `begin` up to `end`, with all rows of x: STREAMS parts at once, or in order where a tile of TILE rows
// of x pays. Several rows of x take a run of rows of W one after the other, while it lies in the first cache.
template <class Scale>
void multiply(const Product& p, int64_t begin, int64_t end) {
  const bool by_bytes = p.format == INT8 && p.digits;  // a register has the digits of one row of x
  const int64_t step = p.rows < TILE || by_bytes ? (end - begin) / STREAMS : 0, rest = begin + STREAMS * step;
  const int64_t near = RUN_BYTES / std::max<int64_t>(1, row_bytes<Scale>(p));
  const int64_t run = p.rows == 1 ? end : std::max(2 * STREAMS, near), part = p.rows == 1 ? end : run / (2 * STREAMS);
  for (int64_t o = begin; o < begin + step; o += part)
    for (int64_t n = 0; n < p.rows; n++) tiles<STREAMS, 1, Scale>(p, n, o, std::min(o + part, begin + step), step);
  for (int64_t o = rest; o < end; o += run) {
    int64_t n = 0;
    for (; n + TILE <= p.rows; n += TILE) tiles<1, TILE, Scale>(p, n, o, std::min(o + run, end), 0);
    for (; n < p.rows; n++) tiles<1, 1, Scale>(p, n, o, std::min(o + run, end), 0);
  }
}
