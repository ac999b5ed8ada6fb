// Expert matmuls and whole gated experts on a CPU, as XLA FFI handlers; float32.
//
// Rows are computed in their order by expert, in blocks of at most BLOCK: they are
// gathered, multiplied, activated and multiplied again while they are in the cache.
// There is no padding and no mask: rows of no expert are never read, and memory for
// them is never touched.
//
// Legend: T tokens, K slots per token, N sorted rows, D model width, F expert hidden
// width, C pre-activation columns (2F: gate, then up), E experts.

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "activations.h"
#include "matmul.h"
#include "threads.h"
#include "xla.h"

enum { BLOCK = 320, FEW = 64 };  // rows of a block, and of the smallest piece

// ---- Rows of experts, cut into pieces -----------------------------------------------
//
// An expert with more than 1 / `most` of the rows is cut, so that a few large experts
// keep all threads busy too; `most` follows from the cores of the machine. A piece that
// is not its expert's first sums weight gradients into its own `part`, added at the
// end: there are fewer than `most`, since each stands for more than N / most rows.

typedef struct {
  int64_t group, begin, end;
  int64_t part;  // -1: the group's own sum
} Piece;

// The first fields of `Experts` and `Products`.
typedef struct {
  const int32_t* bounds;  // group g has the rows bounds[g] to bounds[g + 1] - 1
  int64_t groups, rows;
  Piece* piece;
  int64_t count;
  atomic_int failed;  // out of memory
} Groups;

// Makes own bounds that rise and are inside of the rows: nothing checks those given.
// So wrong bounds give wrong numbers, but no access outside of the arrays.
static int own_bounds(Groups* s) {
  int32_t *own = malloc((s->groups + 1) * sizeof *own), low = 0;
  for (int64_t g = 0; own && g <= s->groups; g++) {
    const int32_t bound = s->bounds[g] < s->rows ? s->bounds[g] : (int32_t)s->rows;
    own[g] = low = bound > low ? bound : low;
  }
  s->bounds = own;
  return own != 0;
}

static int64_t largest_of(const Groups* s, int64_t most) {
  return s->rows / most + 1 > FEW ? s->rows / most + 1 : FEW;
}

static int cut(Groups* s, int64_t most) {
  const int64_t largest = largest_of(s, most);
  int64_t part = 0;
  s->piece = malloc((s->groups + most) * sizeof(Piece));
  for (int64_t g = 0; s->piece && g < s->groups; g++) {
    const int64_t size = s->bounds[g + 1] - s->bounds[g];
    const int64_t pieces = size > largest ? (size + largest - 1) / largest : 1;
    for (int64_t i = 0; i < pieces; i++)
      s->piece[s->count++] =
          (Piece){g, s->bounds[g] + size * i / pieces,
                  s->bounds[g] + size * (i + 1) / pieces, i == 0 ? -1 : part++};
  }
  return s->piece != 0;
}

// Cuts groups for sums over rows: a large group has `shares` pieces, each with all of
// its rows and the share `part` of the columns.
static int cut_columns(Groups* s, int64_t most, int64_t shares) {
  const int64_t largest = largest_of(s, most);
  s->piece = malloc((s->groups + most * shares) * sizeof(Piece));
  for (int64_t g = 0; s->piece && g < s->groups; g++) {
    const int64_t begin = s->bounds[g], end = s->bounds[g + 1];
    const int64_t pieces = end - begin > largest ? shares : 1;
    for (int64_t i = 0; i < pieces; i++)
      s->piece[s->count++] = (Piece){g, begin, end, pieces > 1 ? i : -1};
  }
  return s->piece != 0;
}

// The rows of the block that begins at `begin`: blocks are equal, none has only a few.
INLINE int64_t block_of(Piece piece, int64_t begin) {
  const int64_t left = piece.end - begin, blocks = (left + BLOCK - 1) / BLOCK;
  return (left + blocks - 1) / blocks;
}

static float* scratch(Groups* s, int64_t floats) {
  float* out = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
  if (!out) atomic_store(&s->failed, 1);
  return out;
}

// Phases after the pieces run over SHARES equal shares of the tokens, or of an array.
enum { SHARES = 16 };

static void add_to(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

// Adds a share of every part to its expert's entry, of `size`, in `sum`.
static void add_parts(const Groups* s, const float* parts, int64_t part_size,
                      float* sum, int64_t size, int64_t share) {
  const int64_t begin = size * share / SHARES, end = size * (share + 1) / SHARES;
  for (int64_t i = 0; i < s->count; i++) {
    const Piece piece = s->piece[i];
    if (piece.part >= 0)
      add_to(sum + piece.group * size + begin, parts + piece.part * part_size + begin,
             end - begin);
  }
}

// ---- Rows of activations -------------------------------------------------------------

// These load and store the last, partial vector of a row too.
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

// Computes h [F] of one row.
INLINE void activate_as(Activation which, const float* a, int64_t F, float* h) {
  for (int64_t f = 0; f < F; f += LANES)
    store_some(h + f,
               unit(which, load_some(a + f, F - f), load_some(a + F + f, F - f)).h,
               F - f);
}

// For one row: dh becomes weight * h, da is written, and dh . h is returned.
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

// ---- Whole experts ----------------------------------------------------------------

typedef struct {
  Groups of;  // the experts' rows
  int64_t T, K, D, F;
  Activation activation;
  const float *a, *x, *w_in, *w_out, *gate, *dy;
  const int32_t *order, *row;  // order [N]: slots; row [T, K]: their rows
  float *y, *y_row, *kept;     // forward; kept is a [N, C] or null
  float *dx, *dw_in, *dw_out, *dgate, *dx_row, *parts;  // backward
} Experts;

static void gather(const Experts* s, const float* from, int64_t begin, int64_t rows,
                   float* to) {
  const int64_t D = s->D, stride = apart(D);
  for (int64_t i = 0; i < rows; i++)
    memcpy(to + i * stride, from + s->order[begin + i] / s->K * D, D * sizeof(float));
}

static void forward_piece(void* of, int64_t job) {
  Experts* s = of;
  const Piece piece = s->of.piece[job];
  const int64_t D = s->D, F = s->F, C = 2 * F, x_row = apart(D), h_row = apart(F);
  if (piece.begin == piece.end) return;
  float* x = scratch(&s->of, BLOCK * (x_row + h_row + (s->kept ? 0 : C)));
  if (!x) return;
  float *h = x + BLOCK * x_row, *spare = h + BLOCK * h_row;
  for (int64_t begin = piece.begin, rows; begin < piece.end; begin += rows) {
    rows = block_of(piece, begin);
    float* a = s->kept ? s->kept + begin * C : spare;
    gather(s, s->x, begin, rows, x);
    multiply(rows, C, D, (Matrix){x, x_row, 1},
             (Matrix){s->w_in + piece.group * D * C, C, 1}, a, C, 0);
    for (int64_t i = 0; i < rows; i++)
      activate(s->activation, a + i * C, F, h + i * h_row);
    multiply(rows, D, F, (Matrix){h, h_row, 1},
             (Matrix){s->w_out + piece.group * F * D, D, 1}, s->y_row + begin * D, D,
             0);
  }
  free(x);
}

static void backward_piece(void* of, int64_t job) {
  Experts* s = of;
  const Piece piece = s->of.piece[job];
  const int64_t D = s->D, F = s->F, C = 2 * F, e = piece.group;
  const int64_t x_row = apart(D), h_row = apart(F), a_row = apart(C);
  float* part = s->parts + piece.part * 3 * D * F;
  float* dw_in = piece.part < 0 ? s->dw_in + e * D * C : part;
  float* dw_out = piece.part < 0 ? s->dw_out + e * F * D : part + D * C;
  if (piece.begin == piece.end) {
    memset(dw_in, 0, D * C * sizeof(float));
    memset(dw_out, 0, F * D * sizeof(float));
    return;
  }
  float* x = scratch(&s->of, BLOCK * (2 * x_row + h_row + a_row));
  if (!x) return;
  float *dy = x + BLOCK * x_row, *dh = dy + BLOCK * x_row, *da = dh + BLOCK * h_row;
  for (int64_t begin = piece.begin, rows; begin < piece.end; begin += rows) {
    rows = block_of(piece, begin);
    const int add = begin > piece.begin;
    gather(s, s->x, begin, rows, x);
    gather(s, s->dy, begin, rows, dy);
    multiply(rows, F, D, (Matrix){dy, x_row, 1}, (Matrix){s->w_out + e * F * D, 1, D},
             dh, h_row, 0);
    for (int64_t i = 0; i < rows; i++) {
      const int32_t slot = s->order[begin + i];
      s->dgate[slot] = pull(s->activation, s->a + (begin + i) * C, s->gate[slot], F,
                            dh + i * h_row, da + i * a_row);
    }
    multiply(rows, D, C, (Matrix){da, a_row, 1}, (Matrix){s->w_in + e * D * C, 1, C},
             s->dx_row + begin * D, D, 0);
    multiply(D, C, rows, (Matrix){x, 1, x_row}, (Matrix){da, a_row, 1}, dw_in, C, add);
    multiply(F, D, rows, (Matrix){dh, 1, h_row}, (Matrix){dy, x_row, 1}, dw_out, D,
             add);
  }
  free(x);
}

static void combine_share(void* of, int64_t job) {
  Experts* s = of;
  const int32_t end = s->of.bounds[s->of.groups];
  for (int64_t t = s->T * job / SHARES; t < s->T * (job + 1) / SHARES; t++) {
    float* y = s->y + t * s->D;
    memset(y, 0, s->D * sizeof(float));
    for (int64_t slot = t * s->K; slot < (t + 1) * s->K; slot++) {
      if (s->row[slot] >= end) continue;
      const float weight = s->gate[slot], *from = s->y_row + s->row[slot] * s->D;
      for (int64_t i = 0; i < s->D; i++) y[i] += weight * from[i];
    }
  }
}

static void collect_share(void* of, int64_t job) {
  Experts* s = of;
  const int32_t end = s->of.bounds[s->of.groups];
  for (int64_t t = s->T * job / SHARES; t < s->T * (job + 1) / SHARES; t++) {
    float* dx = s->dx + t * s->D;
    memset(dx, 0, s->D * sizeof(float));
    for (int64_t slot = t * s->K; slot < (t + 1) * s->K; slot++) {
      if (s->row[slot] < end)
        add_to(dx, s->dx_row + s->row[slot] * s->D, s->D);
      else
        s->dgate[slot] = 0;
    }
  }
  const int64_t in = 2 * s->D * s->F, out = s->D * s->F;
  add_parts(&s->of, s->parts, in + out, s->dw_in, in, job);
  add_parts(&s->of, s->parts + in, in + out, s->dw_out, out, job);
}

// ---- Grouped matmuls ----------------------------------------------------------------

typedef struct {
  Groups of;
  int64_t K, N;
  int transposed;  // rhs is [G, N, K]
  int64_t shares;  // the columns of a sum over rows are cut into these
  const float *lhs, *rhs;
  float* out;
} Products;

// Copies `width` columns of rows that are `row` long to rows at a distance `apart`.
static void spread(const float* from, int64_t row, int64_t width, int64_t rows,
                   float* to) {
  for (int64_t i = 0; i < rows; i++)
    memcpy(to + i * apart(width), from + i * row, width * sizeof(float));
}

// Wider rows stay where they are: a copy of a block would not fit in the cache.
enum { WIDEST = 4096 };

static void product_piece(void* of, int64_t job) {
  Products* s = of;
  const Piece piece = s->of.piece[job];
  const int64_t K = s->K, N = s->N;
  if (piece.begin == piece.end) return;
  float* lhs = scratch(&s->of, K > WIDEST ? 1 : BLOCK * apart(K));
  if (!lhs) return;
  for (int64_t begin = piece.begin, rows; begin < piece.end; begin += rows) {
    rows = block_of(piece, begin);
    if (K <= WIDEST) spread(s->lhs + begin * K, K, K, rows, lhs);
    const Matrix block =
        K > WIDEST ? (Matrix){s->lhs + begin * K, K, 1} : (Matrix){lhs, apart(K), 1};
    const float* rhs = s->rhs + piece.group * K * N;
    multiply(rows, N, K, block,
             s->transposed ? (Matrix){rhs, 1, K} : (Matrix){rhs, N, 1},
             s->out + begin * N, N, 0);
  }
  free(lhs);
}

// Writes zeros to rows of no group.
static void product_share(void* of, int64_t job) {
  Products* s = of;
  const int32_t first = s->of.bounds[0], last = s->of.bounds[s->of.groups];
  const int64_t M = s->of.rows;
  for (int64_t i = M * job / SHARES; i < M * (job + 1) / SHARES; i++)
    if (i < first || i >= last) memset(s->out + i * s->N, 0, s->N * sizeof(float));
}

// C [m, n] = A [m, k] B [k, n], or C += if `add`; B was written by `pack_panels`.
static void multiply_packed(int64_t m, int64_t n, int64_t k, Matrix a, const vec* b,
                            float* c, int64_t c_row, int add) {
  const int64_t panels = (m + ROWS - 1) / ROWS, depths = (k + DEPTH - 1) / DEPTH;
  const int transposed = a.row == 1 && a.column != 1;
  const int64_t stride = transposed ? a.column : a.row;
  for (int64_t j = 0; j < n; j += COLUMNS, b += WIDE * k) {
    const int64_t columns = n - j < COLUMNS ? n - j : COLUMNS;
    for (int64_t s = 0; s < depths; s++) {
      const int64_t p = k * s / depths, depth = k * (s + 1) / depths - p;
      for (int64_t q = 0; q < panels; q++) {
        const int64_t i = m * q / panels;
        const int rows = m * (q + 1) / panels - i;
        (transposed ? tile_in_columns : tile_in_rows)(
            rows, depth, a.at + i * a.row + p * a.column, stride, b + WIDE * p,
            c + i * c_row + j, c_row, columns, add || s > 0);
      }
    }
  }
}

// Copies rows of B into panels of COLUMNS, one after another; zeros fill the last.
static void pack_panels(const float* from, int64_t row, int64_t k, int64_t n, vec* to) {
  for (int64_t p = 0; p < k; p++, from += row) {
    int64_t j = 0;
    for (; j + COLUMNS <= n; j += COLUMNS)
      for (int v = 0; v < WIDE; v++)
        to[(j / COLUMNS * k + p) * WIDE + v] = load(from + j + v * LANES);
    if (j < n) {
      vec last[WIDE] = {0};
      memcpy(last, from + j, (n - j) * sizeof(float));
      memcpy(to + (j / COLUMNS * k + p) * WIDE, last, sizeof last);
    }
  }
}

// Sums outer products: lhs [M, K], rhs [M, N] -> [G, K, N].
static void weight_piece(void* of, int64_t job) {
  Products* s = of;
  const Piece piece = s->of.piece[job];
  const int64_t K = s->K, N = s->N;
  float* to = s->out + piece.group * K * N;
  if (piece.begin == piece.end) {
    memset(to, 0, K * N * sizeof(float));
    return;
  }
  const int64_t panels = (N + COLUMNS - 1) / COLUMNS, part = piece.part, n = s->shares;
  const int64_t first = part < 0 ? 0 : panels * part / n * COLUMNS;
  const int64_t last = part < 0 ? N : panels * (part + 1) / n * COLUMNS;
  const int64_t width = (last < N ? last : N) - first;
  const int64_t whole = (width + COLUMNS - 1) / COLUMNS * COLUMNS;
  float* lhs = scratch(&s->of, BLOCK * (apart(K) + whole));
  if (!lhs) return;
  float* rhs = lhs + BLOCK * apart(K);
  for (int64_t begin = piece.begin, rows; begin < piece.end; begin += rows) {
    rows = block_of(piece, begin);
    spread(s->lhs + begin * K, K, K, rows, lhs);
    pack_panels(s->rhs + begin * N + first, N, rows, width, (vec*)rhs);
    multiply_packed(K, width, rows, (Matrix){lhs, 1, apart(K)}, (vec*)rhs, to + first,
                    N, begin > piece.begin);
  }
  free(lhs);
}

// ---- XLA ---------------------------------------------------------------------------

// Reads the arguments from `first` on: x [T, D], w_in [E, D, C], w_out [E, F, D],
// gate [T, K], order [N], bounds [E + 1], row [T, K].
static Experts experts_of(XLA_FFI_CallFrame* frame, int first) {
  const int64_t* x = argument(frame, first)->dims;
  const int64_t* w_out = argument(frame, first + 2)->dims;
  return (Experts){
      .of = {.bounds = in(frame, first + 5),
             .groups = w_out[0],
             .rows = argument(frame, first + 4)->dims[0]},
      .T = x[0],
      .D = x[1],
      .F = w_out[1],
      .K = argument(frame, first + 3)->dims[1],
      .activation = attribute(frame, "activation"),
      .x = in(frame, first),
      .w_in = in(frame, first + 1),
      .w_out = in(frame, first + 2),
      .gate = in(frame, first + 3),
      .order = in(frame, first + 4),
      .row = in(frame, first + 6),
  };
}

// Runs `piece` over all pieces, cut by rows or into `columns` shares of the columns,
// and then `share`, if given, over all shares. `s` is the start of their data.
static XLA_FFI_Error* run(XLA_FFI_CallFrame* frame, Groups* s, int64_t columns,
                          void (*piece)(void*, int64_t),
                          void (*share)(void*, int64_t)) {
  const int64_t most = attribute(frame, "most");
  if (own_bounds(s) && (columns ? cut_columns(s, most, columns) : cut(s, most))) {
    in_parallel(frame, s->count, piece, s);
    if (share) in_parallel(frame, SHARES, share, s);
  } else {
    s->failed = 1;
  }
  free(s->piece);
  free((void*)s->bounds);
  return s->failed ? out_of_memory(frame, "grouped experts: no memory for the rows of a block") : 0;
}

// Results: y [T, D], rows of y [N, D] (scratch), and pre-activations [N, C] if wanted.
XLA_FFI_Error* moex_experts_forward(XLA_FFI_CallFrame* frame) {
  if (is_question(frame)) return 0;
  Experts s = experts_of(frame, 0);
  s.y = out(frame, 0);
  s.y_row = out(frame, 1);
  s.kept = frame->rets.size > 2 ? out(frame, 2) : 0;
  return run(frame, &s.of, 0, forward_piece, combine_share);
}

// Arguments: pre-activations, those of the forward pass, dy [T, D]. Results: dx [T, D],
// dw_in, dw_out, dgate [T, K], rows of dx [N, D] and parts [most, 3 D F] (scratch).
XLA_FFI_Error* moex_experts_backward(XLA_FFI_CallFrame* frame) {
  if (is_question(frame)) return 0;
  Experts s = experts_of(frame, 1);
  s.a = in(frame, 0);
  s.dy = in(frame, 8);
  s.dx = out(frame, 0);
  s.dw_in = out(frame, 1);
  s.dw_out = out(frame, 2);
  s.dgate = out(frame, 3);
  s.dx_row = out(frame, 4);
  s.parts = out(frame, 5);
  return run(frame, &s.of, 0, backward_piece, collect_share);
}

// lhs [M, K], rhs [G, K, N] or [G, N, K], bounds [G + 1] -> [M, N].
XLA_FFI_Error* moex_product(XLA_FFI_CallFrame* frame) {
  if (is_question(frame)) return 0;
  const int64_t *lhs = argument(frame, 0)->dims, *rhs = argument(frame, 1)->dims;
  const int transposed = attribute(frame, "transposed");
  Products s = {
      .of = {.bounds = in(frame, 2), .groups = rhs[0], .rows = lhs[0]},
      .K = lhs[1],
      .N = rhs[transposed ? 1 : 2],
      .transposed = transposed,
      .lhs = in(frame, 0),
      .rhs = in(frame, 1),
      .out = out(frame, 0),
  };
  return run(frame, &s.of, 0, product_piece, product_share);
}

// lhs [M, K], rhs [M, N], bounds [G + 1] -> [G, K, N].
XLA_FFI_Error* moex_weight_product(XLA_FFI_CallFrame* frame) {
  if (is_question(frame)) return 0;
  const int64_t *lhs = argument(frame, 0)->dims, *rhs = argument(frame, 1)->dims;
  Products s = {
      .of = {.bounds = in(frame, 2),
             .groups = argument(frame, 2)->dims[0] - 1,
             .rows = lhs[0]},
      .K = lhs[1],
      .N = rhs[1],
      .lhs = in(frame, 0),
      .rhs = in(frame, 1),
      .out = out(frame, 0),
  };
  const int64_t panels = (s.N + COLUMNS - 1) / COLUMNS;
  const int64_t most = attribute(frame, "most");
  s.shares = panels < 1 ? 1 : panels < most ? panels : most;
  return run(frame, &s.of, s.shares, weight_piece, 0);
}
