// The products of muon_step.cpp. This text is included once for each instruction set and stored number, in a namespace
// that defines
//
//   Stored, STEP        a number of a matrix in memory, and how many of them (neighbors along k) are a Word of 32 bits
//   Word, Words         Word and LANES of them
//   LANES, Floats       8 or 16 float32
//   MR                  rows of a tile, a multiple of 3; a tile has 2 LANES columns
//   load(const float*), store(float*, Floats), broadcast(float)
//   widen(const Stored*), narrow(Stored*, Floats)      LANES stored numbers
//   load_words(const Word*), broadcast_word(Word), dot(Floats c, Words a, Words b)     c + a . b
//   multiply_add(Floats a, Floats b, Floats c)         a * b + c
//   transpose32(const void*, from, void*, to)          LANES x LANES numbers of 32 bits, rows so far apart
//   transpose_stored(const Stored*, from, Stored*, to)
//   pair_rows(const Stored*, from, Word*)              LANES Words of the same columns of STEP rows
//   subtract_at(Floats, lane, float)

constexpr int64_t PANEL = 2 * LANES;

inline int64_t pad(int64_t size) { return (size + PANEL - 1) / PANEL * PANEL; }

// What becomes of a product C: e_factor E + f_factor F + factor C, less `shift` on the diagonal. E and F lie as `out`.
struct Epilogue {
  float factor = 1, shift = 0;
  const Stored* e = nullptr;
  float e_factor = 0;
  const Stored* f = nullptr;
  float f_factor = 0;
  Stored* out = nullptr;
  float* wide = nullptr;  // in place of out
};

template <int R>
inline void tile(const Word* a, int64_t a_row, const Word* b, int64_t words, const Epilogue& end, int64_t row,
                 int64_t column, int64_t width) {
  Floats c[R][2];
  for (int r = 0; r < R; r++) c[r][0] = c[r][1] = broadcast(0);
  for (int64_t k = 0; k < words; k++) {
    const Words left = load_words(b + k * PANEL), right = load_words(b + k * PANEL + LANES);
    for (int r = 0; r < R; r++) {
      const Words one = broadcast_word(a[r * a_row + k]);
      c[r][0] = dot(c[r][0], one, left);
      c[r][1] = dot(c[r][1], one, right);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int half = 0; half < 2; half++) {
      const int64_t first = column + half * LANES, place = (row + r) * width + first;
      Floats sum = multiply_add(c[r][half], broadcast(end.factor), broadcast(0));
      if (end.e) sum = multiply_add(widen(end.e + place), broadcast(end.e_factor), sum);
      if (end.f) sum = multiply_add(widen(end.f + place), broadcast(end.f_factor), sum);
      if (end.shift != 0 && row + r >= first && row + r < first + LANES) sum = subtract_at(sum, row + r - first, end.shift);
      end.wide ? store(end.wide + place, sum) : narrow(end.out + place, sum);
    }
  }
}

// rows x width, of which `depth` is summed; a lies in rows, b in panels. lower: only what is needed of a symmetric matrix.
void multiply(const Stored* a, const Word* b, int64_t rows, int64_t width, int64_t depth, const Epilogue& end, bool lower) {
  const int64_t words = depth / STEP;
  const Word* words_of_a = reinterpret_cast<const Word*>(a);
  for (int64_t column = 0; column < width; column += PANEL) {
    const Word* panel = b + column * words;
    int64_t row = lower ? column : 0;
    for (; row + MR <= rows; row += MR) tile<MR>(words_of_a + row * words, words, panel, words, end, row, column, width);
    if (rows - row == 2 * MR / 3) tile<2 * MR / 3>(words_of_a + row * words, words, panel, words, end, row, column, width);
    if (rows - row == MR / 3) tile<MR / 3>(words_of_a + row * words, words, panel, words, end, row, column, width);
  }
}

void mirror(Stored* matrix, int64_t size) {
  for (int64_t row = LANES; row < size; row += LANES)
    for (int64_t column = 0; column < row; column += LANES)
      transpose_stored(matrix + row * size + column, size, matrix + column * size + row, size);
}

// Panels of the transposed matrix; of a symmetric one, of itself.
void pack_transposed(const Stored* matrix, int64_t rows, int64_t depth, Word* panels) {
  const int64_t words = depth / STEP;
  const Word* from = reinterpret_cast<const Word*>(matrix);
  for (int64_t row = 0; row < rows; row += LANES) {
    Word* panel = panels + row / PANEL * PANEL * words + row % PANEL;
    for (int64_t k = 0; k < words; k += LANES) transpose32(from + row * words + k, words, panel + k * PANEL, PANEL);
  }
}

void pack(const Stored* matrix, int64_t depth, int64_t width, Word* panels) {
  for (int64_t column = 0; column < width; column += LANES) {
    Word* panel = panels + column / PANEL * PANEL * (depth / STEP) + column % PANEL;
    for (int64_t k = 0; k < depth; k += STEP) pair_rows(matrix + k * width + column, width, panel + k / STEP * PANEL);
  }
}

float sum_of_squares(const Stored* numbers, int64_t count) {
  float lanes[LANES], total = 0;
  Floats sum = broadcast(0);
  for (int64_t place = 0; place < count; place += LANES) {
    const Floats v = widen(numbers + place);
    sum = multiply_add(v, v, sum);
  }
  store(lanes, sum);
  for (float lane : lanes) total += lane;
  return total;
}

// Buffers of one matrix of n x m, n <= m, both padded to whole panels.
struct Workspace {
  int64_t n, m;
  Stored *x, *gram, *p, *q, *t;
  Word *x_panels, *gram_panels, *p_panels;
  float* wide;

  Workspace(Arena& arena, int64_t short_side, int64_t long_side) : n(pad(short_side)), m(pad(long_side)) {
    arena.begin((2 * n * m + 6 * n * n) * sizeof(Stored) + n * m * sizeof(float));
    x = arena.take<Stored>(n * m);
    x_panels = arena.take<Word>(n * m / STEP);
    wide = arena.take<float>(n * m);
    for (Stored** square : {&gram, &p, &q, &t}) *square = arena.take<Stored>(n * n);
    for (Word** panels : {&gram_panels, &p_panels}) *panels = arena.take<Word>(n * n / STEP);
  }

  void symmetric(const Stored* a, const Word* b, const Epilogue& end) {
    multiply(a, b, n, n, n, end, true);
    mirror(end.out, n);
  }

  // `steps` iterations of s X on their Gram matrix: of X to X, of the last ones to `wide`.
  void iterate(int64_t steps, float s, float mu, bool last) {
    const float a = COEFFICIENTS[0], b = COEFFICIENTS[1], c = COEFFICIENTS[2];
    float q_diagonal = 0;
    pack_transposed(x, n, m, x_panels);
    multiply(x, x_panels, n, n, m, {.factor = s * s, .shift = mu, .out = gram}, true);
    mirror(gram, n);
    for (int64_t step = 0; step < steps; step++) {
      const float diagonal = a + b * mu + c * mu * mu;
      pack_transposed(gram, n, n, gram_panels);
      symmetric(gram, gram_panels, {.factor = c, .e = gram, .e_factor = b + 2 * c * mu, .out = p});
      if (step || step + 1 < steps) pack_transposed(p, n, n, p_panels);
      if (step + 1 < steps) {
        symmetric(gram, p_panels,
                  {.e = gram, .e_factor = diagonal, .f = p, .f_factor = mu, .out = t});
        symmetric(t, p_panels,
                  {.e = t, .e_factor = diagonal, .f = p, .f_factor = diagonal * mu, .out = gram});
        mu *= diagonal * diagonal;
      }
      if (step == 0) {
        std::swap(p, q);
        q_diagonal = diagonal;
      } else {
        symmetric(q, p_panels,
                  {.e = q, .e_factor = diagonal, .f = p, .f_factor = q_diagonal, .out = t});
        std::swap(q, t);
        q_diagonal *= diagonal;
      }
    }
    pack(x, n, m, x_panels);
    multiply(q, x_panels, n, m, n,
             {.factor = s, .e = x, .e_factor = s * q_diagonal, .out = x, .wide = last ? wide : nullptr}, false);
  }

  // The matrix in `wide`, rows x columns with rows of `stride`, to X with its long side along the rows.
  void load_x(bool tall, int64_t rows, int64_t columns, int64_t stride) {
    float turned[LANES * LANES];
    for (int64_t row = 0; row < n; row += tall ? LANES : 1) {
      for (int64_t column = 0; column < m; column += LANES) {
        if (!tall) {
          narrow(x + row * m + column, load(wide + row * stride + column));
          continue;
        }
        transpose32(wide + column * stride + row, stride, turned, LANES);
        for (int64_t r = 0; r < LANES; r++)
          narrow(x + (row + r) * m + column, load(turned + r * LANES));
      }
    }
  }
};

// One matrix of a step: the momentum, the iterations, the weights.
void update(const Job& job, Arena& arena) {
  const bool tall = job.rows > job.columns;
  Workspace space(arena, tall ? job.columns : job.rows, tall ? job.rows : job.columns);
  const int64_t stride = pad(job.columns), padded = pad(job.rows), short_side = tall ? job.columns : job.rows;
  const float keep = job.momentum, take = 1 - job.momentum;
  float sums[PANEL] = {}, total = 0;
  for (int64_t row = 0; row < padded; row++) {
    float* ahead = space.wide + row * stride;
    const int64_t begin = row * job.columns, real = row < job.rows ? job.columns : 0;
    for (int64_t column = 0; column < real; column++) {
      const float gradient = job.gradient[begin + column];
      const float average = job.average[begin + column] * keep + gradient * take;
      job.average[begin + column] = average;
      ahead[column] = average * keep + gradient * take;
    }
    for (int64_t column = real; column < stride; column++) ahead[column] = 0;
    for (int64_t column = 0; column < stride; column += PANEL)
      for (int64_t lane = 0; lane < PANEL; lane++) sums[lane] += ahead[column + lane] * ahead[column + lane];
  }
  for (float sum : sums) total += sum;
  space.load_x(tall, job.rows, job.columns, stride);
  const float scale = 1 / std::max(std::sqrt(total), SMALLEST_NORM);
  for (int64_t done = 0; done < job.steps; done += job.group_steps) {
    const float trace = done ? sum_of_squares(space.x, space.n * space.m) : 1;
    const int64_t steps = std::min(job.group_steps, job.steps - done);
    space.iterate(steps, done ? 1 : scale, trace / short_side, done + steps == job.steps);
  }
  float turned[LANES * LANES];
  for (int64_t row = 0; row < job.rows; row += tall ? LANES : 1) {
    for (int64_t column = 0; column < job.columns; column += LANES) {
      const float* update = space.wide + row * space.m + column;
      if (tall) transpose32(space.wide + column * space.m + row, space.m, turned, LANES);
      for (int64_t r = 0; r < (tall ? std::min(LANES, job.rows - row) : 1); r++) {
        float* weight = job.weight + (row + r) * job.columns + column;
        const float* values = tall ? turned + r * LANES : update;
        for (int64_t lane = 0; lane < std::min(LANES, job.columns - column); lane++)
          weight[lane] = weight[lane] * job.decay - values[lane] * job.factor;
      }
    }
  }
}
