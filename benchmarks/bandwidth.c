// Reads memory with several threads, as fast as it goes; see bandwidth.py.

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

typedef uint64_t line __attribute__((vector_size(64)));
enum { APART = 8, MOST = 1024 };  // lines of one turn; threads

typedef struct {
  const line *from, *end;
  uint64_t sum;
} Part;

static void* add_up(void* of) {
  Part* part = of;
  line sum[APART] = {0};
  for (const line* at = part->from; at < part->end; at += APART) {
    __builtin_prefetch(at + 64);
    for (int i = 0; i < APART; i++) sum[i] += at[i];
  }
  for (int i = 1; i < APART; i++) sum[0] += sum[i];
  for (int i = 0; i < 8; i++) part->sum += sum[0][i];
  return 0;
}

// Sums `count` turns of APART lines; returns the sum, so that all is read.
uint64_t read_all(const void* from, int64_t count, int64_t threads) {
  pthread_t thread[MOST];
  Part part[MOST];
  uint64_t sum = 0;
  if (threads > MOST) threads = MOST;
  for (int64_t i = 0; i < threads; i++) {
    part[i] = (Part){(const line*)from + count * i / threads * APART,
                     (const line*)from + count * (i + 1) / threads * APART, 0};
    if (pthread_create(thread + i, 0, add_up, part + i)) abort();
  }
  for (int64_t i = 0; i < threads; i++) {
    pthread_join(thread[i], 0);
    sum += part[i].sum;
  }
  return sum;
}
