// Products of float32 matrices, by one thread.
//
// A tile of C, at most ROWS x COLUMNS, stays in registers while it sums over DEPTH. Its
// part of B is copied in the order in which it is read; that of A is read in place.
#ifndef MOEX_MATMUL
#define MOEX_MATMUL

#include <stdint.h>
#include <string.h>

#include "vectors.h"

enum { COLUMNS = WIDE * LANES, DEPTH = 256 };
// Symmetric products take narrower tiles, to compute less below the diagonal.
enum { NARROW = WIDE < 2 ? 1 : 2 };

// Element (i, j) of a matrix is at[i * row + j * column]; one of the two strides is 1.
typedef struct {
  const float* at;
  int64_t row, column;
} Matrix;

INLINE void tile(int wide, int rows, int transposed, int64_t depth, const float* a,
                 int64_t stride, const vec* b, float* c, int64_t c_row, int64_t columns,
                 int add) {
  vec sum[ROWS][WIDE];
  UNROLL for (int i = 0; i < rows; i++) {
    for (int v = 0; v < wide; v++) {
      __builtin_prefetch(c + i * c_row + v * LANES, 1);  // needed at the end
      sum[i][v] = (vec){};
    }
  }
  UNROLL_4 for (int64_t p = 0; p < depth; p++, b += wide) {
    UNROLL for (int i = 0; i < rows; i++) {
      const vec a_i = splat(transposed ? a[p * stride + i] : a[i * stride + p]);
      UNROLL for (int v = 0; v < wide; v++) sum[i][v] += a_i * b[v];
    }
  }
  UNROLL for (int i = 0; i < rows; i++, c += c_row) {
    if (columns == wide * LANES) {
      UNROLL for (int v = 0; v < wide; v++)
          store(c + v * LANES, add ? load(c + v * LANES) + sum[i][v] : sum[i][v]);
    } else {
      for (int64_t j = 0; j < columns; j++) {
        const float value = sum[i][j / LANES][j % LANES];
        c[j] = add ? c[j] + value : value;
      }
    }
  }
}

INLINE void tile_of(int wide, int rows, int transposed, int64_t depth, const float* a,
                    int64_t stride, const vec* b, float* c, int64_t c_row,
                    int64_t columns, int add) {
  // The number of rows has to be a constant for the sums to stay in registers.
  switch (rows) {
#define CASE(n)                                                                \
  case n:                                                                      \
    if (n <= ROWS)                                                             \
      tile(wide, n <= ROWS ? n : 1, transposed, depth, a, stride, b, c, c_row, \
           columns, add);                                                      \
    break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
}

static __attribute__((noinline)) void tile_in_rows(int rows, int64_t depth,
                                                   const float* a, int64_t stride,
                                                   const vec* b, float* c,
                                                   int64_t c_row, int64_t columns,
                                                   int add) {
  tile_of(WIDE, rows, 0, depth, a, stride, b, c, c_row, columns, add);
}

static __attribute__((noinline)) void tile_in_columns(int rows, int64_t depth,
                                                      const float* a, int64_t stride,
                                                      const vec* b, float* c,
                                                      int64_t c_row, int64_t columns,
                                                      int add) {
  tile_of(WIDE, rows, 1, depth, a, stride, b, c, c_row, columns, add);
}

static __attribute__((noinline)) void narrow_tile(int rows, int64_t depth,
                                                  const float* a, int64_t stride,
                                                  const vec* b, float* c, int64_t c_row,
                                                  int64_t columns, int add) {
  tile_of(NARROW, rows, 0, depth, a, stride, b, c, c_row, columns, add);
}

// Transposes LANES vectors of LANES, by log2(LANES) times the same perfect shuffle.
INLINE void transpose(vec* x) {
  for (int step = 1; step < LANES; step *= 2) {
    vec y[LANES];
    UNROLL for (int i = 0; i < LANES / 2; i++) {
      const vec a = x[i], b = x[i + LANES / 2];
      y[2 * i] = SHUFFLE(a, b, LOW);
      y[2 * i + 1] = SHUFFLE(a, b, HIGH);
    }
    memcpy(x, y, sizeof y);
  }
}

// Copies `depth` rows of B, at most `wide` vectors of columns, with zeros to the right.
INLINE void pack(int wide, Matrix b, int64_t depth, int64_t columns, vec* to) {
  float* out = (float*)to;
  int64_t p = 0;
  if (columns == wide * LANES && b.column == 1) {
    for (; p < depth; p++)
      for (int v = 0; v < wide; v++)
        to[wide * p + v] = load(b.at + p * b.row + v * LANES);
  } else if (columns == wide * LANES && b.row == 1) {
    for (; p + LANES <= depth; p += LANES) {
      for (int v = 0; v < wide; v++) {
        vec x[LANES];
        for (int j = 0; j < LANES; j++)
          x[j] = load(b.at + p + (v * LANES + j) * b.column);
        transpose(x);
        for (int j = 0; j < LANES; j++) to[wide * (p + j) + v] = x[j];
      }
    }
  }
  for (; p < depth; p++)
    for (int64_t j = 0; j < wide * LANES; j++)
      out[p * wide * LANES + j] = j < columns ? b.at[p * b.row + j * b.column] : 0;
}

// Fetches share `q` of `shares` of the rows that `pack` will copy. They lie pages
// apart, where the processor does not fetch ahead by itself.
INLINE void fetch(Matrix b, int64_t depth, int64_t q, int64_t shares) {
  const int along = b.column == 1;
  const int64_t lines = along ? depth : COLUMNS, width = along ? COLUMNS : depth;
  const int64_t jump = along ? b.row : b.column;
  for (int64_t i = lines * q / shares; i < lines * (q + 1) / shares; i++)
    for (int64_t j = 0; j < width; j += 16)
      __builtin_prefetch(b.at + i * jump + j, 0, 2);
}

// `multiply` with tiles of `wide` vectors, WIDE or, if A lies in rows, NARROW.
INLINE void multiply_in(int wide, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b,
                        float* c, int64_t c_row, int add) {
  static _Thread_local vec panel[WIDE * DEPTH];
  const int64_t panels = (m + ROWS - 1) / ROWS, depths = (k + DEPTH - 1) / DEPTH;
  const int64_t most = wide * LANES;
  const int transposed = a.row == 1 && a.column != 1;
  const int64_t stride = transposed ? a.column : a.row;
  for (int64_t j = 0; j < n; j += most) {
    const int64_t columns = n - j < most ? n - j : most;
    for (int64_t s = 0; s < depths; s++) {
      const int64_t p = k * s / depths, depth = k * (s + 1) / depths - p;
      const Matrix part = {b.at + p * b.row + j * b.column, b.row, b.column};
      const Matrix next = {part.at + most * b.column, b.row, b.column};
      pack(wide, part, depth, columns, panel);
      for (int64_t q = 0; q < panels; q++) {
        if (j + 2 * most <= n) fetch(next, depth, q, panels);
        const int64_t i = m * q / panels;
        const int rows = m * (q + 1) / panels - i;
        (wide < WIDE ? narrow_tile : transposed ? tile_in_columns : tile_in_rows)(
            rows, depth, a.at + i * a.row + p * a.column, stride, panel,
            c + i * c_row + j, c_row, columns, add || s > 0);
      }
    }
  }
  if (k == 0 && !add)
    for (int64_t i = 0; i < m; i++) memset(c + i * c_row, 0, n * sizeof(float));
}

// C [m, n] = A [m, k] B [k, n], or C += if `add`.
static void multiply(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c,
                     int64_t c_row, int add) {
  multiply_in(WIDE, m, n, k, a, b, c, c_row, add);
}

// Rows of scratch lie a little apart: whole powers of two would share cache sets.
INLINE int64_t apart(int64_t width) { return (width + 15) / 16 * 16 + 16; }

#endif
