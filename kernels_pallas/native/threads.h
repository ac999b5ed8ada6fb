// Work for several threads.
//
// Threads of XLA's own pool take jobs by a counter, and so does the calling thread: it
// waits for jobs that have begun, never for a thread, so calls from inside of the pool
// cannot block each other. The result does not depend on which thread does a job.
#ifndef MOEX_THREADS
#define MOEX_THREADS

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

typedef struct {
  void (*run)(void* of, int64_t job);
  void* of;
  int64_t jobs;
  atomic_llong next, holders;
  int64_t done;
  pthread_mutex_t lock;
  pthread_cond_t all_done;
} Work;

static void release(Work* work) {
  if (atomic_fetch_sub(&work->holders, 1) > 1) return;
  pthread_mutex_destroy(&work->lock);
  pthread_cond_destroy(&work->all_done);
  free(work);
}

static void take_jobs(Work* work) {
  int64_t done = 0;
  for (int64_t i; (i = atomic_fetch_add(&work->next, 1)) < work->jobs; done++)
    work->run(work->of, i);
  if (!done) return;
  pthread_mutex_lock(&work->lock);
  work->done += done;
  if (work->done == work->jobs) pthread_cond_signal(&work->all_done);
  pthread_mutex_unlock(&work->lock);
}

static void help(void* data) {
  take_jobs(data);
  release(data);
}

static void drop(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, 0, error};
  if (error) api->XLA_FFI_Error_Destroy(&args);
}

static void in_parallel(XLA_FFI_CallFrame* frame, int64_t jobs,
                        void (*run)(void* of, int64_t job), void* of) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, 0, frame->ctx, &threads};
  drop(frame->api, frame->api->XLA_FFI_ThreadPool_NumThreads(&count));
  Work* work = threads > 1 && jobs > 1 ? malloc(sizeof *work) : 0;
  if (!work) {
    for (int64_t i = 0; i < jobs; i++) run(of, i);
    return;
  }
  *work = (Work){.run = run, .of = of, .jobs = jobs};
  pthread_mutex_init(&work->lock, 0);
  pthread_cond_init(&work->all_done, 0);
  const int64_t helpers = (threads < jobs ? threads : jobs) - 1;
  atomic_store(&work->holders, helpers + 1);
  for (int64_t i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args task = {
        XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, 0, frame->ctx, help, work};
    XLA_FFI_Error* error = frame->api->XLA_FFI_ThreadPool_Schedule(&task);
    if (error) release(work);
    drop(frame->api, error);
  }
  take_jobs(work);
  pthread_mutex_lock(&work->lock);
  while (work->done < work->jobs) pthread_cond_wait(&work->all_done, &work->lock);
  pthread_mutex_unlock(&work->lock);
  release(work);
}

#endif
