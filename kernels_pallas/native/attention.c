// Exact causal attention within segments and its gradient, as XLA FFI handlers; float32.
//
// One job has a head of a row of tokens. It reads and writes the head in place, and
// keeps the scores of at most MOST_ROWS queries, which stay in its cache. Keys are taken
// in panels of COLUMNS; queries before a panel never meet it. The backward pass computes
// the weights again from the log-normalisers (Dao et al. 2022, arXiv:2205.14135).
//
// Legend: B rows of tokens, L tokens of each, H query heads, G key and value heads, A
// width of queries and keys, V width of values.

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "matmul.h"
#include "threads.h"
#include "vectors.h"
#include "xla.h"

enum { MOST_ROWS = 256, MOST_SCORES = 1 << 19 };  // limits of a block

typedef struct {
  int64_t B, L, H, G, A, V;
  float scale;  // factor on the scores
  const float *q, *k, *v, *dy, *mean;  // mean [B, L, H]: sums over V of y dy
  const int32_t *segment, *position;
  float *y, *lse;  // [B, L, H, V]; log-normalisers [B, H, L]
  float *dq, *dk, *dv;
  atomic_int failed;  // out of memory
} Attention;

// The offset of a head's part in an array [B, L, heads, width].
INLINE int64_t place(const Attention* s, int64_t b, int64_t head, int64_t heads,
                     int64_t width) {
  return (b * s->L * heads + head) * width;
}

// The number of queries of a block, in whole panels: its scores stay in the cache.
INLINE int64_t rows_of(const Attention* s) {
  const int64_t rows = MOST_SCORES / (s->L + 1) / COLUMNS * COLUMNS;
  return rows > MOST_ROWS ? MOST_ROWS : rows < COLUMNS ? COLUMNS : rows;
}

// Memory of one job: segments and positions of its row of tokens, filled up to whole
// vectors, and `blocks` arrays for the scores of a block.
typedef struct {
  int32_t *segment, *position;
  float *score, *other;
  int64_t row;  // floats from one row of scores to the next
} Scratch;

static int open_scratch(Attention* s, int64_t b, int blocks, Scratch* to) {
  const int64_t L = s->L, row = apart(L), scores = rows_of(s) * row;
  int32_t* at = aligned_alloc(64, (2 * row + blocks * scores) * sizeof(float));
  if (!at) {
    atomic_store(&s->failed, 1);
    return 0;
  }
  *to = (Scratch){at, at + row, (float*)(at + 2 * row),
                  (float*)(at + 2 * row) + (blocks - 1) * scores, row};
  memset(at, -1, 2 * row * sizeof *at);
  memcpy(to->segment, s->segment + b * L, L * sizeof *at);
  memcpy(to->position, s->position + b * L, L * sizeof *at);
  return 1;
}

// Computes scores, or their gradient, of queries `first` to `last` - 1 (rows of `a`)
// and the keys up to each panel's end (rows of `b`).
static void multiply_panels(int64_t first, int64_t last, int64_t width, const float* a,
                            int64_t a_row, const float* b, int64_t b_row, float* to,
                            int64_t to_row) {
  for (int64_t j = 0; j < last; j += COLUMNS) {
    const int64_t begin = j > first ? j : first;
    const int64_t columns = last - j < COLUMNS ? last - j : COLUMNS;
    multiply(last - begin, columns, width, (Matrix){a + begin * a_row, a_row, 1},
             (Matrix){b + j * b_row, 1, b_row}, to + (begin - first) * to_row + j,
             to_row, 0);
  }
}

// Whether query i sees each of the keys from j on.
INLINE ints visible(const Scratch* s, int64_t i, int64_t j) {
  ints segment, position, number;
  memcpy(&segment, s->segment + j, sizeof segment);
  memcpy(&position, s->position + j, sizeof position);
  for (int q = 0; q < LANES; q++) number[q] = (int32_t)(j + q);
  return (segment == s->segment[i]) & (position <= s->position[i]) &
         (number <= (int32_t)i);
}

// The end of the last panel that query i meets.
INLINE int64_t end_of(int64_t i, int64_t last) {
  const int64_t end = (i / COLUMNS + 1) * COLUMNS;
  return end < last ? end : last;
}

INLINE float sum_of(vec x) {
  float total = 0;
  for (int q = 0; q < LANES; q++) total += x[q];
  return total;
}

// Scores of query i become exp(scale (score - top)); `total` is their sum.
static float weigh(const Scratch* s, int64_t i, int64_t last, float scale, float* score,
                   float* total) {
  const int64_t end = end_of(i, last);
  const vec lowest = splat(-INFINITY);
  vec high = lowest, sum = {};
  for (int64_t j = 0; j < end; j += LANES) {
    const vec x = choose(visible(s, i, j), load(score + j), lowest);
    high = choose(x > high, x, high);
  }
  float top = high[0];
  for (int q = 1; q < LANES; q++) top = high[q] > top ? high[q] : top;
  for (int64_t j = 0; j < end; j += LANES) {
    const vec x = exponential(splat(scale) * (load(score + j) - splat(top)));
    const vec weight = (vec)(visible(s, i, j) & (ints)x);
    sum += weight;
    store(score + j, weight);
  }
  *total = sum_of(sum);
  return top;
}

static void forward_head(void* of, int64_t job) {
  Attention* s = of;
  const int64_t L = s->L, H = s->H, G = s->G, A = s->A, V = s->V;
  const int64_t b = job / H, h = job % H, g = h / (H / G);
  const float* q = s->q + place(s, b, h, H, A);
  const float* k = s->k + place(s, b, g, G, A);
  const float* v = s->v + place(s, b, g, G, V);
  float* y = s->y + place(s, b, h, H, V);
  Scratch at;
  if (!open_scratch(s, b, 1, &at)) return;
  for (int64_t first = 0, rows = rows_of(s); first < L; first += rows) {
    const int64_t last = first + rows < L ? first + rows : L;
    float total[MOST_ROWS];
    multiply_panels(first, last, A, q, H * A, k, G * A, at.score, at.row);
    for (int64_t i = first; i < last; i++) {
      float* score = at.score + (i - first) * at.row;
      const float top = weigh(&at, i, last, s->scale, score, total + i - first);
      s->lse[(b * H + h) * L + i] = s->scale * top + logf(total[i - first]);
    }
    for (int64_t j = 0; j < last; j += COLUMNS) {
      const int64_t begin = j > first ? j : first;
      const int64_t keys = last - j < COLUMNS ? last - j : COLUMNS;
      multiply(last - begin, V, keys,
               (Matrix){at.score + (begin - first) * at.row + j, at.row, 1},
               (Matrix){v + j * G * V, G * V, 1}, y + begin * H * V, H * V, j > 0);
    }
    for (int64_t i = first; i < last; i++)
      for (int64_t c = 0; c < V; c++) y[i * H * V + c] /= total[i - first];
  }
  free(at.segment);
}

// Scores of query i become its weights, and `dweight` the gradient of its scores.
static void pull_scores(const Scratch* s, int64_t i, int64_t last, float scale,
                        float lse, float mean, float* score, float* dweight) {
  for (int64_t j = 0, end = end_of(i, last); j < end; j += LANES) {
    const ints seen = visible(s, i, j);
    const vec x = exponential(splat(scale) * load(score + j) - splat(lse));
    const vec weight = (vec)(seen & (ints)x);
    const vec d = splat(scale) * weight * (load(dweight + j) - splat(mean));
    store(score + j, weight);
    store(dweight + j, (vec)(seen & (ints)d));
  }
}

static void backward_head(const Attention* s, int64_t b, int64_t h, Scratch at) {
  const int64_t L = s->L, H = s->H, G = s->G, A = s->A, V = s->V, g = h / (H / G);
  const int64_t q_row = H * A, k_row = G * A, v_row = G * V, y_row = H * V;
  const float *q = s->q + place(s, b, h, H, A), *dy = s->dy + place(s, b, h, H, V);
  const float *k = s->k + place(s, b, g, G, A), *v = s->v + place(s, b, g, G, V);
  float *dq = s->dq + place(s, b, h, H, A), *dk = s->dk + place(s, b, g, G, A);
  float* dv = s->dv + place(s, b, g, G, V);
  for (int64_t first = 0, rows = rows_of(s); first < L; first += rows) {
    const int64_t last = first + rows < L ? first + rows : L;
    multiply_panels(first, last, A, q, q_row, k, k_row, at.score, at.row);
    multiply_panels(first, last, V, dy, y_row, v, v_row, at.other, at.row);
    for (int64_t i = first; i < last; i++)
      pull_scores(&at, i, last, s->scale, s->lse[(b * H + h) * L + i],
                  s->mean[(b * L + i) * H + h], at.score + (i - first) * at.row,
                  at.other + (i - first) * at.row);
    for (int64_t j = 0; j < last; j += COLUMNS) {
      const int64_t begin = j > first ? j : first, count = last - begin;
      const int64_t keys = last - j < COLUMNS ? last - j : COLUMNS;
      const float* weight = at.score + (begin - first) * at.row + j;
      const float* dscore = at.other + (begin - first) * at.row + j;
      const int add = h % (H / G) > 0 || begin > j;  // another wrote there before
      multiply(keys, V, count, (Matrix){weight, 1, at.row},
               (Matrix){dy + begin * y_row, y_row, 1}, dv + j * v_row, v_row, add);
      multiply(keys, A, count, (Matrix){dscore, 1, at.row},
               (Matrix){q + begin * q_row, q_row, 1}, dk + j * k_row, k_row, add);
      multiply(count, A, keys, (Matrix){dscore, at.row, 1},
               (Matrix){k + j * k_row, k_row, 1}, dq + begin * q_row, q_row, j > 0);
    }
  }
}

// Runs all query heads of a key head in turn: they add to the same gradients.
static void backward_group(void* of, int64_t job) {
  Attention* s = of;
  const int64_t b = job / s->G, g = job % s->G, heads = s->H / s->G;
  Scratch at;
  if (!open_scratch(s, b, 2, &at)) return;
  for (int64_t r = 0; r < heads; r++) backward_head(s, b, g * heads + r, at);
  free(at.segment);
}

// Reads the arguments: q [B, L, H, A], k [B, L, G, A], v [B, L, G, V], segment and
// position [B, L].
static Attention attention_of(XLA_FFI_CallFrame* frame) {
  const int64_t* q = argument(frame, 0)->dims;
  const int64_t* v = argument(frame, 2)->dims;
  return (Attention){
      .B = q[0],
      .L = q[1],
      .H = q[2],
      .A = q[3],
      .G = v[2],
      .V = v[3],
      .scale = 1 / sqrtf((float)q[3]),
      .q = in(frame, 0),
      .k = in(frame, 1),
      .v = in(frame, 2),
      .segment = in(frame, 3),
      .position = in(frame, 4),
  };
}

static XLA_FFI_Error* run_heads(XLA_FFI_CallFrame* frame, Attention* s, int64_t jobs,
                                void (*head)(void*, int64_t)) {
  if (s->L) in_parallel(frame, jobs, head, s);
  return s->failed ? out_of_memory(frame, "attention: no memory for scores") : 0;
}

// Results: y [B, L, H, V], log-normalisers [B, H, L].
XLA_FFI_Error* moex_attention_forward(XLA_FFI_CallFrame* frame) {
  if (is_question(frame)) return 0;
  Attention s = attention_of(frame);
  s.y = out(frame, 0);
  s.lse = out(frame, 1);
  return run_heads(frame, &s, s.B * s.H, forward_head);
}

// Arguments after those of the forward pass: log-normalisers, dy, and the sums of y dy
// [B, L, H]. Results: dq, dk, dv.
XLA_FFI_Error* moex_attention_backward(XLA_FFI_CallFrame* frame) {
  if (is_question(frame)) return 0;
  Attention s = attention_of(frame);
  s.lse = in(frame, 5);
  s.dy = in(frame, 6);
  s.mean = in(frame, 7);
  s.dq = out(frame, 0);
  s.dk = out(frame, 1);
  s.dv = out(frame, 2);
  return run_heads(frame, &s, s.B * s.G, backward_group);
}
