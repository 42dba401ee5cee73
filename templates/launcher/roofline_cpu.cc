// The read bandwidth that a decode kernel can reach at best: threads read blocks of memory that lie anywhere, asking
// for the blocks further on while they read. One call reads every block once and returns the seconds that it took,
// without the starting of the threads.
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>

namespace {

typedef uint64_t Vector __attribute__((vector_size(64)));

struct Job {
  const char* const* blocks;
  int64_t begin, end, last, bytes, ahead;
  int ways;
  pthread_barrier_t* barrier;
  uint64_t sum;
};

// Prefetch and read `Lines` cache lines.
template <int Lines>
inline void take(const char* block, const char* next, Vector* sums) {
  for (int k = 0; k < Lines; ++k) __builtin_prefetch(next + k * 64, 0, 2);
  for (int k = 0; k < Lines; ++k) {
    Vector line;
    __builtin_memcpy(&line, block + k * 64, 64);
    sums[k] += line;
  }
}

// `Ways` blocks are read in turn, 256 bytes of each: every block is a stream of its own to the L2 cache's prefetchers.
template <int Ways>
uint64_t read(const Job& job) {
  Vector sums[4] = {};
  for (int64_t i = job.begin; i < job.end; i += Ways) {
    const char *block[Ways], *next[Ways];
    for (int w = 0; w < Ways; ++w) {
      const int64_t at = i + w, later = at + job.ahead * Ways;
      block[w] = job.blocks[at < job.end ? at : job.end - 1];
      next[w] = job.blocks[later < job.last ? later : job.last];
    }
    int64_t j = 0;
    for (; j + 256 <= job.bytes; j += 256) {
      for (int w = 0; w < Ways; ++w) take<4>(block[w] + j, next[w] + j, sums);
    }
    for (; j < job.bytes; j += 64) {
      for (int w = 0; w < Ways; ++w) take<1>(block[w] + j, next[w] + j, sums);
    }
  }
  uint64_t total = 0;
  for (const Vector& sum : sums) {
    for (int i = 0; i < 8; ++i) total += sum[i];
  }
  return total;
}

uint64_t read(const Job& job) { return job.ways == 1 ? read<1>(job) : job.ways == 2 ? read<2>(job) : read<4>(job); }

void* run(void* argument) {
  Job* job = static_cast<Job*>(argument);
  pthread_barrier_wait(job->barrier);
  job->sum = read(*job);
  pthread_barrier_wait(job->barrier);
  return nullptr;
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

}  // namespace

// blocks: [count] addresses of `bytes` bytes each, a multiple of 64; `ways` (1, 2 or 4) are read in turn, and those
// `ahead` turns further on are prefetched into the L2 cache. `sum` keeps the reads from being left out. Negative when
// the threads cannot be started.
extern "C" __attribute__((visibility("default"))) double read_blocks(const char* const* blocks, int64_t count,
                                                                     int64_t bytes, int64_t ahead, int ways,
                                                                     int threads, uint64_t* sum) {
  constexpr int kMost = 1024;
  if (threads < 1 || threads > kMost) return -1;
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, threads);
  static Job jobs[kMost];
  pthread_t handles[kMost];
  for (int i = 0; i < threads; ++i) {
    jobs[i] = {blocks, count * i / threads, count * (i + 1) / threads, count - 1, bytes, ahead, ways, &barrier, 0};
  }
  for (int i = 1; i < threads; ++i) {
    if (pthread_create(&handles[i], nullptr, run, &jobs[i])) return -1;
  }
  pthread_barrier_wait(&barrier);
  const double begin = now();
  jobs[0].sum = read(jobs[0]);
  pthread_barrier_wait(&barrier);
  const double seconds = now() - begin;
  for (int i = 1; i < threads; ++i) pthread_join(handles[i], nullptr);
  pthread_barrier_destroy(&barrier);
  for (int i = 0; i < threads; ++i) *sum += jobs[i].sum;
  return seconds;
}
