// Vectors of floats, as wide as the processor's, and the tile of a product in them.
#ifndef MOEX_VECTORS
#define MOEX_VECTORS

#include <stdint.h>

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 6, WIDE = 4 };
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
enum { LANES = 8, ROWS = 6, WIDE = 2 };
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { LANES = 4, ROWS = 8, WIDE = 2 };
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_4 _Pragma("clang loop unroll_count(4)")
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float* from) { return *(const loose*)from; }
INLINE void store(float* to, vec value) { *(loose*)to = value; }
INLINE vec splat(float value) { return value - (vec){}; }

INLINE vec choose(ints mask, vec a, vec b) {
  return (vec)((mask & (ints)a) | (~mask & (ints)b));
}

// exp(x), within 2 units in the last place unless result or argument is extreme.
INLINE vec exponential(vec x) {
  x = choose(x > splat(88.0f), splat(88.0f), x);  // NaN stays NaN
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

#endif
