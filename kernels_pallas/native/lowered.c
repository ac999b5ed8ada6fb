// Matmuls with weights in fewer bytes, as an XLA FFI handler: bfloat16, or blocks of
// int8 or int4 that share a scale. Rows and sums are float32: no row is rounded.
//
// With few rows, as in decoding, the time is that of reading weights. So a job has a
// slab of rows of one matrix, which lie one after another in memory, and adds all
// columns of it to sums of its own; these are added up in the end. With many rows a job
// has a range of columns, and widens a tile of them at a time for a float32 product.
//
// Legend: M rows, G groups, K contraction, N columns, S scales of a column.

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "matmul.h"
#include "threads.h"
#include "xla.h"

typedef enum { BFLOAT16, INT8, INT4 } Kind;

enum {
  NIBBLES = 8,         // rows of a word of int4
  STRIPE = 8,          // rows of a matrix that are read side by side; whole words
  FEW = 16,            // most rows of a group that are read from slabs
  AT_ONCE = 4,         // rows of lhs that share one reading
  AHEAD = 1 << 14,      // bytes between what is read and what is fetched
  SLAB_BYTES = 1 << 18,  // of a job, at least
  RANGE = 4 * COLUMNS,  // columns of a job with many rows
  BLOCK = 320,         // rows of lhs whose panels stay in the cache
};

typedef struct {
  int64_t group, first, last;  // rows of lhs
  int64_t slabs, sums;         // number of slabs; where their sums begin
  atomic_llong left;           // slabs that are not done
} Part;

typedef struct {
  int64_t part, slab;  // or the first column, if the part has no slabs
} Job;

typedef struct {
  int64_t M, G, K, N, S;
  int64_t block;  // rows that share scales; any number of rows of bfloat16
  Kind kind;
  int wide_scales;  // scales are float32, and not bfloat16
  const float* lhs;
  const char *values, *scales;
  float *out, *sums;
  Part* part;
  int64_t parts, row, slab_blocks;  // row: floats of a row of sums
  Job* job;
  int64_t jobs;
  int failed;
} Lowered;

// ---- Weights ------------------------------------------------------------------------

typedef int8_t bytes_of __attribute__((vector_size(LANES)));
typedef uint16_t halves_of __attribute__((vector_size(2 * LANES)));
typedef uint32_t words_of __attribute__((vector_size(4 * LANES)));

INLINE vec from_bfloat16(const void* from) {
  halves_of x;
  memcpy(&x, from, sizeof x);
#if defined(__AVX512F__)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#elif defined(__AVX2__)
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#else
  return (vec)(__builtin_convertvector(x, words_of) << 16);
#endif
}

INLINE vec from_int8(const void* from) {
  bytes_of x;
  memcpy(&x, from, sizeof x);
#if defined(__AVX512F__)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)&x)));
#else
  return __builtin_convertvector(__builtin_convertvector(x, ints), vec);
#endif
}

// The numbers of LEVELS in ../lowered.py.
#define LEVELS -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113

// Row `i` of the eight in a word.
INLINE vec from_int4(ints word, int i) {
#if defined(__AVX512F__)
  // The permutation reads the low four bits of each lane alone.
  const vec level = {LEVELS};
  return (vec)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)word, 4 * i),
                                    (__m512)level);
#elif defined(__AVX2__)
  // The other bytes of a lane choose from its first byte, and are shifted out.
  typedef int8_t levels __attribute__((vector_size(32)));
  const __m256i level = (__m256i)(levels){LEVELS, LEVELS};
  const __m256i byte = _mm256_and_si256(_mm256_srli_epi32((__m256i)word, 4 * i),
                                        _mm256_set1_epi32(15));
  const __m256i found = _mm256_slli_epi32(_mm256_shuffle_epi8(level, byte), 24);
  return (vec)_mm256_cvtepi32_ps(_mm256_srai_epi32(found, 24));
#else
  static const float level[] = {LEVELS};
  vec x;
  for (int q = 0; q < LANES; q++) x[q] = level[(uint32_t)word[q] >> 4 * i & 15];
  return x;
#endif
}

INLINE int64_t width_of(Kind kind) { return kind == BFLOAT16 ? 2 : kind == INT8 ? 1 : 4; }

// Bytes of a row of values, or of the eight rows in a row of words.
INLINE int64_t stride_of(const Lowered* s, Kind kind) { return s->N * width_of(kind); }

// Copies the last, partial vector of a row; the other lanes are 0.
INLINE const char* whole_of(const char* from, int64_t lanes, int64_t width, char* to) {
  if (lanes >= LANES) return from;
  memset(to, 0, 4 * LANES);
  memcpy(to, from, lanes * width);
  return to;
}

INLINE vec value_at(Kind kind, const char* from, int64_t lanes) {
  char spare[4 * LANES];
  from = whole_of(from, lanes, width_of(kind), spare);
  return kind == BFLOAT16 ? from_bfloat16(from) : from_int8(from);
}

INLINE ints word_at(const char* from, int64_t lanes) {
  char spare[4 * LANES];
  return (ints)load((const float*)whole_of(from, lanes, 4, spare));
}

INLINE vec scale_at(const Lowered* s, Kind kind, int64_t group, int64_t block,
                    int64_t j, int64_t lanes) {
  if (kind == BFLOAT16) return splat(1.0f);
  const int64_t width = s->wide_scales ? 4 : 2;
  char spare[4 * LANES];
  const char* from = whole_of(s->scales + ((group * s->S + block) * s->N + j) * width,
                              lanes, width, spare);
  return s->wide_scales ? load((const float*)from) : from_bfloat16(from);
}

// ---- Few rows -----------------------------------------------------------------------

// Adds some columns of rows k to k + depth - 1 of a matrix, all of one block, to the
// sums of `m` rows.
INLINE void add_columns(const Lowered* s, Kind kind, int m, int wide, int64_t group,
                        int64_t block, int64_t k, int64_t depth, int64_t j,
                        const float* x, const char* from, float* sums) {
  const int64_t stride = stride_of(s, kind), width = width_of(kind);
  // A known number of lanes, so that whole vectors need no check.
  const int64_t lanes = wide > 1 ? WIDE * LANES : s->N - j;
  const int rows = kind == INT4 ? NIBBLES : 1;
  const char* ahead = from + (AHEAD / (stride + 1) + 1) * stride;
  vec total[AT_ONCE][WIDE];
  UNROLL for (int r = 0; r < m; r++)
    UNROLL for (int v = 0; v < wide; v++) total[r][v] = (vec){};
  UNROLL for (int64_t i = 0; i < depth; i += rows, from += stride, ahead += stride) {
    UNROLL for (int64_t b = 0; b < wide * LANES * width; b += 64)
      __builtin_prefetch(ahead + b, 0, 2);
    if (kind == INT4) {
      ints word[WIDE];
      UNROLL for (int v = 0; v < wide; v++)
          word[v] = word_at(from + v * LANES * width, lanes - v * LANES);
      UNROLL for (int q = 0; q < NIBBLES; q++) {
        UNROLL for (int v = 0; v < wide; v++) {
          const vec w = from_int4(word[v], q);
          UNROLL for (int r = 0; r < m; r++)
              total[r][v] += splat(x[r * s->K + k + i + q]) * w;
        }
      }
    } else {
      UNROLL for (int v = 0; v < wide; v++) {
        const vec w = value_at(kind, from + v * LANES * width, lanes - v * LANES);
        UNROLL for (int r = 0; r < m; r++)
            total[r][v] += splat(x[r * s->K + k + i]) * w;
      }
    }
  }
  UNROLL for (int v = 0; v < wide; v++) {
    const vec scale = scale_at(s, kind, group, block, j + v * LANES, lanes - v * LANES);
    UNROLL for (int r = 0; r < m; r++) {
      float* to = sums + r * s->row + j + v * LANES;
      store(to, load(to) + total[r][v] * scale);
    }
  }
}

// The same for all columns. Memory is quickest where it is read in a few long streams:
// a stripe has few rows, and is read from left to right.
INLINE void add_stripe(const Lowered* s, Kind kind, int m, int64_t group, int64_t block,
                       int64_t k, int64_t depth, const float* x, float* sums) {
  const int64_t width = width_of(kind), rows = kind == INT4 ? NIBBLES : 1;
  const char* from = s->values + (group * s->K + k) / rows * stride_of(s, kind);
  int64_t j = 0;
  for (; j + COLUMNS <= s->N; j += COLUMNS)
    add_columns(s, kind, m, WIDE, group, block, k, depth, j, x, from + j * width, sums);
  for (; j < s->N; j += LANES)
    add_columns(s, kind, m, 1, group, block, k, depth, j, x, from + j * width, sums);
}

#define ADD_ROWS(name, kind, m)                                                       \
  static __attribute__((noinline)) void name(const Lowered* s, int64_t group,         \
                                             int64_t block, int64_t k, int64_t depth, \
                                             const float* restrict x,                 \
                                             float* restrict sums) {                  \
    if (depth == STRIPE)                                                              \
      add_stripe(s, kind, m, group, block, k, STRIPE, x, sums);                       \
    else /* never with int4 */                                                        \
      for (int64_t i = 0; i < depth; i++)                                             \
        add_stripe(s, kind, m, group, block, k + i, 1, x, sums);                      \
  }
ADD_ROWS(bfloat16_1, BFLOAT16, 1)
ADD_ROWS(bfloat16_2, BFLOAT16, 2)
ADD_ROWS(bfloat16_4, BFLOAT16, 4)
ADD_ROWS(int8_1, INT8, 1)
ADD_ROWS(int8_2, INT8, 2)
ADD_ROWS(int8_4, INT8, 4)
ADD_ROWS(int4_1, INT4, 1)
ADD_ROWS(int4_2, INT4, 2)
ADD_ROWS(int4_4, INT4, 4)

typedef void (*AddRows)(const Lowered*, int64_t, int64_t, int64_t, int64_t,
                        const float*, float*);
static const AddRows add_rows[][3] = {{bfloat16_1, bfloat16_2, bfloat16_4},
                                      {int8_1, int8_2, int8_4},
                                      {int4_1, int4_2, int4_4}};

// Sums one slab of a matrix for all rows of its part.
static void slab_job(const Lowered* s, const Part* part, int64_t slab) {
  const int64_t rows = part->last - part->first;
  float* sums = s->sums + (part->sums + slab * rows) * s->row;
  memset(sums, 0, rows * s->row * sizeof(float));
  const int64_t last = (slab + 1) * s->slab_blocks;
  for (int64_t b = slab * s->slab_blocks; b < last && b < s->S; b++) {
    const int64_t end = (b + 1) * s->block < s->K ? (b + 1) * s->block : s->K;
    for (int64_t k = b * s->block, depth; k < end; k += depth) {
      depth = end - k < STRIPE ? end - k : STRIPE;
      for (int64_t r = 0, m; r < rows; r += m) {
        m = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        add_rows[s->kind][m / 2](s, part->group, b, k, depth,
                                 s->lhs + (part->first + r) * s->K, sums + r * s->row);
      }
    }
  }
}

// Adds up the slabs of a part, always in their order.
static void add_slabs(const Lowered* s, const Part* part) {
  const int64_t rows = part->last - part->first;
  for (int64_t r = 0; r < rows; r++) {
    float* to = s->out + (part->first + r) * s->N;
    const float* from = s->sums + (part->sums + r) * s->row;
    memcpy(to, from, s->N * sizeof(float));
    for (int64_t q = 1; q < part->slabs; q++) {
      from += rows * s->row;
      for (int64_t j = 0; j < s->N; j++) to[j] += from[j];
    }
  }
}

// ---- Many rows ----------------------------------------------------------------------

// Widens rows k to k + depth - 1 of columns j to j + columns - 1 into a panel.
INLINE void widen_as(const Lowered* s, Kind kind, int64_t group, int64_t k,
                     int64_t depth, int64_t j, int64_t columns, vec* to) {
  const int64_t block = s->block, width = width_of(kind), stride = stride_of(s, kind);
  const int rows = kind == INT4 ? NIBBLES : 1;
  for (int v = 0; v < WIDE; v++) {
    const int64_t lanes = columns - v * LANES, column = j + v * LANES;
    if (lanes <= 0) {
      for (int64_t p = 0; p < depth; p++) to[WIDE * p + v] = (vec){};
      continue;
    }
    const char* from = s->values + group * s->K / rows * stride + column * width;
    vec scale = {};
    for (int64_t p = 0, of = -1; p < depth; p++) {
      if ((k + p) / block != of)
        scale = scale_at(s, kind, group, of = (k + p) / block, column, lanes);
      const char* at = from + (k + p) / rows * stride;
      const vec w = kind == INT4 ? from_int4(word_at(at, lanes), (k + p) % NIBBLES)
                                 : value_at(kind, at, lanes);
      to[WIDE * p + v] = scale * w;
    }
  }
}

static void widen(const Lowered* s, int64_t group, int64_t k, int64_t depth, int64_t j,
                  int64_t columns, vec* to) {
  if (s->kind == BFLOAT16) widen_as(s, BFLOAT16, group, k, depth, j, columns, to);
  if (s->kind == INT8) widen_as(s, INT8, group, k, depth, j, columns, to);
  if (s->kind == INT4) widen_as(s, INT4, group, k, depth, j, columns, to);
}

static void range_job(const Lowered* s, const Part* part, int64_t begin) {
  static _Thread_local vec panel[WIDE * DEPTH];
  const int64_t end = begin + RANGE < s->N ? begin + RANGE : s->N;
  const int64_t depths = (s->K + DEPTH - 1) / DEPTH;
  for (int64_t first = part->first, rows; first < part->last; first += rows) {
    rows = part->last - first < BLOCK ? part->last - first : BLOCK;
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    for (int64_t j = begin; j < end; j += COLUMNS) {
      const int64_t columns = end - j < COLUMNS ? end - j : COLUMNS;
      for (int64_t d = 0; d < depths; d++) {
        const int64_t k = s->K * d / depths, depth = s->K * (d + 1) / depths - k;
        widen(s, part->group, k, depth, j, columns, panel);
        for (int64_t q = 0; q < tiles; q++) {
          const int64_t i = first + rows * q / tiles;
          tile_in_rows(first + rows * (q + 1) / tiles - i, depth, s->lhs + i * s->K + k,
                       s->K, panel, s->out + i * s->N + j, s->N, columns, d > 0);
        }
      }
    }
  }
}

// ---- XLA ----------------------------------------------------------------------------

static void run_job(void* of, int64_t i) {
  const Lowered* s = of;
  Part* part = s->part + s->job[i].part;
  (part->slabs ? slab_job : range_job)(s, part, s->job[i].slab);
  // Whoever does the last slab adds them up.
  if (part->slabs && atomic_fetch_sub(&part->left, 1) == 1) add_slabs(s, part);
}

// Rows of no group are 0.
static void clear_others(const Lowered* s) {
  int64_t done = 0;
  for (int64_t p = 0; p <= s->parts; p++) {
    const int64_t first = p < s->parts ? s->part[p].first : s->M;
    if (done < first) memset(s->out + done * s->N, 0, (first - done) * s->N * sizeof(float));
    if (p < s->parts) done = s->part[p].last;
  }
}

// Makes the parts and jobs; bounds that do not rise, or leave the rows, are mended.
static int plan_of(Lowered* s, const int32_t* bounds) {
  const int64_t step = s->kind == INT4 ? NIBBLES : 1;
  const int64_t bytes = s->block * stride_of(s, s->kind) / step;
  s->slab_blocks = bytes < SLAB_BYTES ? SLAB_BYTES / (bytes ? bytes : 1) : 1;
  const int64_t slabs = (s->S + s->slab_blocks - 1) / s->slab_blocks;
  const int64_t ranges = (s->N + RANGE - 1) / RANGE;
  s->row = apart(s->N);
  const int64_t most = s->G < s->M ? s->G : s->M;  // groups that can have rows
  s->part = malloc((most + 1) * sizeof(Part));
  s->job = malloc((most * (slabs > ranges ? slabs : ranges) + 1) * sizeof(Job));
  if (!s->part || !s->job) return 0;
  int64_t low = bounds[0] > 0 ? bounds[0] : 0, sums = 0;
  for (int64_t g = 0; g < s->G; g++) {
    int64_t last = bounds[g + 1] < s->M ? bounds[g + 1] : s->M;
    if (last <= low) continue;
    const int64_t rows = last - low, own = rows > FEW ? 0 : slabs;
    s->part[s->parts] = (Part){g, low, last, own, sums, own};
    for (int64_t i = 0; i < (own ? own : ranges); i++)
      s->job[s->jobs++] = (Job){s->parts, own ? i : i * RANGE};
    s->parts++;
    sums += rows * own;
    low = last;
  }
  s->sums = aligned_alloc(64, (sums * s->row + 16) * sizeof(float));
  return s->sums != 0;
}

// lhs [M, K], values [G, K, N] (int4: words [G, K / 8, N]), scales [G, S, N] (bfloat16
// weights: any array), bounds [G + 1] -> [M, N]. K is a multiple of S; of int4, K / S
// is one of 8.
XLA_FFI_Error* moex_lowered(XLA_FFI_CallFrame* frame) {
  if (is_question(frame)) return 0;
  const int64_t *lhs = argument(frame, 0)->dims, *values = argument(frame, 1)->dims;
  const Kind kind = attribute(frame, "kind");
  Lowered s = {
      .M = lhs[0],
      .G = values[0],
      .K = lhs[1],
      .N = values[2],
      .S = kind == BFLOAT16 ? (lhs[1] + 63) / 64 : argument(frame, 2)->dims[1],
      .kind = kind,
      .wide_scales = attribute(frame, "wide_scales"),
      .lhs = in(frame, 0),
      .values = in(frame, 1),
      .scales = in(frame, 2),
      .out = out(frame, 0),
  };
  s.block = kind == BFLOAT16 ? 64 : s.S ? s.K / s.S : 1;
  if (plan_of(&s, in(frame, 3))) {
    clear_others(&s);
    in_parallel(frame, s.jobs, run_job, &s);
  } else {
    s.failed = 1;
  }
  free(s.part);
  free(s.job);
  free(s.sums);
  return s.failed ? out_of_memory(frame, "lowered matmul: no memory for sums") : 0;
}
