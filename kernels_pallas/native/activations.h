// Activations of gated experts and their derivatives, on vectors.
#ifndef MOEX_ACTIVATIONS
#define MOEX_ACTIVATIONS

#include <math.h>

#include "matmul.h"

INLINE vec choose(ints mask, vec a, vec b) {
  return (vec)((mask & (ints)a) | (~mask & (ints)b));
}

// Within 2 units in the last place where neither result nor argument is extreme.
INLINE vec exponential(vec x) {
  x = choose(x > splat(88.0f), splat(88.0f), x);  // what is NaN stays NaN
  x = choose(x < splat(-87.0f), splat(-87.0f), x);
  const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec n = (x * splat(1.44269504f) + shift) - shift;
  const vec r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  vec y = splat(1.9875691500e-4f);
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * r * r + r + splat(1.0f);
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  return y * (vec)power;
}

INLINE vec sigmoid(vec x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

INLINE vec normal_cdf(vec x) {
  for (int i = 0; i < LANES; i++) x[i] = 0.5f * (1 + erff(x[i] * 0.70710678f));
  return x;
}

typedef enum { SILU, GELU, CLAMPED } Activation;  // as ACTIVATIONS are ordered

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

// Vectors of a row's last, partial group of lanes go by way of these.
INLINE vec load_some(const float* from, int64_t lanes) {
  if (lanes >= LANES) return load(from);
  vec x = {};
  memcpy(&x, from, lanes * sizeof(float));
  return x;
}

INLINE void store_some(float* to, vec x, int64_t lanes) {
  if (lanes >= LANES)
    store(to, x);
  else
    memcpy(to, &x, lanes * sizeof(float));
}

// h [F] of one row.
INLINE void activate_as(Activation which, const float* a, int64_t F, float* h) {
  for (int64_t f = 0; f < F; f += LANES)
    store_some(h + f,
               unit(which, load_some(a + f, F - f), load_some(a + F + f, F - f)).h,
               F - f);
}

// Of one row: dh becomes weight * h, da is written, and dh . h is returned.
INLINE float pull_as(Activation which, const float* a, float weight, int64_t F,
                     float* dh, float* da) {
  vec sum = {};
  for (int64_t f = 0; f < F; f += LANES) {
    const int64_t lanes = F - f;
    const Unit u = unit(which, load_some(a + f, lanes), load_some(a + F + f, lanes));
    const vec d = load_some(dh + f, lanes), weighted = splat(weight) * d;
    sum += d * u.h;
    store_some(dh + f, splat(weight) * u.h, lanes);
    store_some(da + f, weighted * u.d_gate, lanes);
    store_some(da + F + f, weighted * u.d_up, lanes);
  }
  float total = 0;
  for (int i = 0; i < LANES; i++) total += sum[i];
  return total;
}

static void activate(Activation which, const float* a, int64_t F, float* h) {
  if (which == SILU) activate_as(SILU, a, F, h);
  if (which == GELU) activate_as(GELU, a, F, h);
  if (which == CLAMPED) activate_as(CLAMPED, a, F, h);
}

static float pull(Activation which, const float* a, float weight, int64_t F, float* dh,
                  float* da) {
  if (which == SILU) return pull_as(SILU, a, weight, F, dh, da);
  if (which == GELU) return pull_as(GELU, a, weight, F, dh, da);
  return pull_as(CLAMPED, a, weight, F, dh, da);
}

#endif
