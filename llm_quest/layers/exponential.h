// Included in each namespace of vectors.h.

// e^x, to 2 units of the last place (Cephes): e^x = 2^n e^r with |r| <= ln(2) / 2. Below -87 the result is e^-87, which is
// nothing beside the largest weight, 1; NaN stays NaN.
inline Floats exponential(Floats x) {
  x = larger(broadcast(-87), x);
  const Floats n = nearest(times(x, broadcast(1.44269504f)));
  const Floats r = multiply_add(n, broadcast(2.12194440e-4f), multiply_add(n, broadcast(-0.693359375f), x));
  Floats sum = broadcast(1.9875691500e-4f);
  for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f})
    sum = multiply_add(sum, r, broadcast(factor));
  return times_power(sum, n);
}
