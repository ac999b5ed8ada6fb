// Activations of gated experts and their derivatives, on vectors.
#ifndef MOEX_ACTIVATIONS
#define MOEX_ACTIVATIONS

#include <math.h>

#include "vectors.h"

INLINE vec sigmoid(vec x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

INLINE vec normal_cdf(vec x) {
  for (int i = 0; i < LANES; i++) x[i] = 0.5f * (1 + erff(x[i] * 0.70710678f));
  return x;
}

typedef enum { SILU, GELU, CLAMPED } Activation;  // in the order of ACTIVATIONS

typedef struct {
  vec h, d_gate, d_up;  // value, and its derivatives
} Unit;

INLINE Unit unit(Activation which, vec gate, vec up) {
  const vec one = splat(1.0f);
  if (which == SILU) {
    const vec s = sigmoid(gate), silu = gate * s;
    return (Unit){silu * up, up * (s + silu * (one - s)), silu};
  }
  if (which == GELU) {
    const vec cdf = normal_cdf(gate);
    const vec density = splat(0.39894228f) * exponential(splat(-0.5f) * gate * gate);
    return (Unit){gate * cdf * up, up * (cdf + gate * density), gate * cdf};
  }
  const vec limit = splat(7.0f), slope = splat(1.702f), zero = {};
  const vec g = choose(gate > limit, limit, gate);
  const vec u = choose(up > limit, limit, choose(up < -limit, -limit, up));
  const vec s = sigmoid(slope * g);
  return (Unit){g * s * (u + one),
                choose(gate > limit, zero, (u + one) * (s + slope * g * s * (one - s))),
                choose((up > limit) | (up < -limit), zero, g * s)};
}

#endif
