// Muon's step of a stack of matrices, as an XLA FFI handler; float32.
//
// Momentum M <- w0 M + w1 G of the gradient G; X = w2 M + w3 G. X is divided by |X| + eps; `steps` times X <- (a I + A (b I + c A)) X with A = X X^T.
// A thread computes whole matrices, one after the other, in memory that stays in its
// cache. A and A (b I + c A) are symmetric: blocks below the diagonal are copied.
//
// Legend: S and I batch, R rows, C columns: matrix (s, i) is g [s, :, i, :]. M is the
// smaller of R and C, N the larger: X is [M, N].

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "matmul.h"
#include "threads.h"
#include "xla.h"

typedef struct {
  int64_t R, I, C, steps;
  float eps;
  const float *coefficients, *weights;  // a, b, c; w0 to w3
  const float *gradient, *momentum;
  float *out, *new_momentum;
  atomic_int failed;  // out of memory
} Stack;

// Copies `from` [rows, columns] to its transpose, in squares that fit in registers.
static void turn(const float* from, int64_t row, int64_t rows, int64_t columns,
                 float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < columns; j += LANES)
      if (i + LANES <= rows && j + LANES <= columns) {
        vec x[LANES];
        for (int q = 0; q < LANES; q++) x[q] = load(from + (i + q) * row + j);
        transpose(x);
        for (int p = 0; p < LANES; p++) store(to + (j + p) * to_row + i, x[p]);
      } else {
        for (int64_t p = j; p < columns && p < j + LANES; p++)
          for (int64_t q = i; q < rows && q < i + LANES; q++)
            to[p * to_row + q] = from[q * row + p];
      }
}

// Computes the symmetric product `a` `b` [m, m] of inner width k.
static void multiply_symmetric(int64_t m, int64_t k, Matrix a, Matrix b, float* c,
                               int64_t c_row) {
  enum { MOST = NARROW * LANES };
  for (int64_t j = 0; j < m; j += MOST) {
    const int64_t columns = m - j < MOST ? m - j : MOST;
    const Matrix part = {b.at + j * b.column, b.row, b.column};
    multiply_in(NARROW, j + columns, columns, k, a, part, c + j, c_row, 0);
    turn(c + j, c_row, j, columns, c + j * c_row, c_row);
  }
}

static void orthogonalise(void* of, int64_t job) {
  Stack* s = of;
  const int64_t R = s->R, C = s->C, row = s->I * C;
  const int64_t start = job / s->I * R * row + job % s->I * C;
  const int64_t M = R < C ? R : C, N = R < C ? C : R, n = apart(N), m = apart(M);
  const int64_t most = M * n > N * m ? M * n : N * m;  // y holds X or its transpose
  float* x = aligned_alloc(64, (M * n + most + 3 * M * m) * sizeof(float));
  if (!x) {
    atomic_store(&s->failed, 1);
    return;
  }
  float *y = x + M * n, *a = y + most, *b = a + M * m, *d = b + M * m;
  const float ca = s->coefficients[0], cb = s->coefficients[1], cc = s->coefficients[2];
  const float* w = s->weights;
  for (int64_t i = 0; i < R; i++) {
    const float *g = s->gradient + start + i * row, *old = s->momentum + start + i * row;
    float *new = s->new_momentum + start + i * row, *to = R > C ? y + i * m : x + i * n;
    for (int64_t j = 0; j < C; j++) {
      new[j] = w[0] * old[j] + w[1] * g[j];
      to[j] = w[2] * new[j] + w[3] * g[j];
    }
  }
  if (R > C) turn(y, m, R, C, x, n);
  double square = 0;
  for (int64_t i = 0; i < M; i++) {
    float sum[16] = {0};  // each sums every sixteenth number, so that lanes can add
    int64_t j = 0;
    for (; j + 16 <= N; j += 16)
      for (int q = 0; q < 16; q++) sum[q] += x[i * n + j + q] * x[i * n + j + q];
    for (; j < N; j++) sum[0] += x[i * n + j] * x[i * n + j];
    for (int q = 0; q < 16; q++) square += sum[q];
  }
  const float scale = 1 / ((float)sqrt(square) + s->eps);
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j++) x[i * n + j] *= scale;
  for (int64_t step = 0; step < s->steps; step++) {
    multiply_symmetric(M, N, (Matrix){x, n, 1}, (Matrix){x, 1, n}, a, m);
    for (int64_t i = 0; i < M; i++) {
      for (int64_t j = 0; j < M; j++) d[i * m + j] = cc * a[i * m + j];
      d[i * m + i] += cb;
    }
    multiply_symmetric(M, M, (Matrix){a, m, 1}, (Matrix){d, m, 1}, b, m);
    for (int64_t i = 0; i < M; i++) b[i * m + i] += ca;
    multiply(M, N, M, (Matrix){b, m, 1}, (Matrix){x, n, 1}, y, n, 0);
    float* old = x;
    x = y;
    y = old;
  }
  if (R > C)
    turn(x, n, C, R, s->out + start, row);
  else
    for (int64_t i = 0; i < M; i++)
      memcpy(s->out + start + i * row, x + i * n, N * sizeof(float));
  free(x < y ? x : y);
}

// Arguments: gradient and momentum [S, R, I, C], weights [4], coefficients [3]. Results:
// the orthogonalised X and the new momentum, of the same shape.
XLA_FFI_Error* moex_orthogonalise(XLA_FFI_CallFrame* frame) {
  if (is_question(frame)) return 0;
  const int64_t* g = argument(frame, 0)->dims;
  Stack s = {
      .R = g[1],
      .I = g[2],
      .C = g[3],
      .steps = attribute(frame, "steps"),
      .eps = *(const float*)attribute_at(frame, "eps"),
      .coefficients = in(frame, 3),
      .weights = in(frame, 2),
      .gradient = in(frame, 0),
      .momentum = in(frame, 1),
      .out = out(frame, 0),
      .new_momentum = out(frame, 1),
  };
  if (s.R && s.C) in_parallel(frame, g[0] * s.I, orthogonalise, &s);
  return s.failed ? out_of_memory(frame, "orthogonalise: no memory for a matrix") : 0;
}
