// Enough of CUDA to run one block of a kernel on a CPU: every thread is a fiber, barriers and warp
// instructions switch between them.
//
// It is stricter than a GPU where that finds mistakes: asynchronous copies happen only when they
// are waited for, shared memory starts as NaN, copies must stay inside the arrays that are named,
// what a previous kernel wrote can be read only after waiting for it, a barrier that not all reach
// is an error, and fibers run in an order that the caller chooses.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  int x, y, z;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
using std::min;

namespace emulator {

struct Copy {
  char* to;
  const char* from;
};
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};
struct Fragments {
  unsigned a[4], b[2];
};
struct Warp {
  Barrier barrier;
  Fragments fragments[2][32];
  float shuffled[2][32];
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Index thread;
  std::vector<Copy> open;               // copies of no group yet
  std::deque<std::vector<Copy>> groups;  // those not waited for
  unsigned parity = 0;                  // of warp instructions: the next may start before all left
  bool waited = false, done = false;
};
struct Range {
  const char *begin, *end;
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier block_barrier;
static ucontext_t scheduler;
static Fiber* current;
static Index block, grid;
static std::vector<char> shared_memory;
static std::vector<Range> copyable;  // global memory that asynchronous copies may read
static std::string error;
static long long events, early_copies;  // early: started before waiting for the previous kernel

static void fail(const std::string& what) {
  if (error.empty()) error = what;
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

static void arrive(Barrier& barrier, int expected) {
  const unsigned generation = barrier.generation;
  ++events;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
}

static Warp& warp() { return warps[current->thread.x / 32]; }
static int lane() { return current->thread.x % 32; }

static void finish_copies(size_t pending) {
  while (current->groups.size() > pending) {
    for (const Copy& copy : current->groups.front()) std::memcpy(copy.to, copy.from, 16);
    current->groups.pop_front();
  }
}

static void (*body)();
static void start() {
  body();
  current->done = true;
  ++events;
  swapcontext(&current->context, &scheduler);
}

// Runs a grid of blocks of `threads`, one after the other; `order` 0 runs threads in turn, 1
// the last warp as far as it gets and then the one before, larger ones each time from another
// thread on. Raises what went wrong.
static void launch(void (*kernel)(), Index size, int threads, int shared_bytes, int order) {
  constexpr int GUARD = 256;
  body = kernel;
  grid = size;
  error.clear();
  early_copies = 0;
  for (int i = 0; i < size.x * size.y; ++i) {
    block = {i % size.x, i / size.x, 0};
    fibers.assign(threads, Fiber());
    warps.assign(threads / 32, Warp());
    block_barrier = Barrier();
    shared_memory.assign(shared_bytes + GUARD + 128, static_cast<char>(0xFF));
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.thread = {t, 0, 0};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, start, 0);
    }
    const auto run = [](Fiber& fiber) {
      if (fiber.done || !error.empty()) return;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
    };
    const auto done = [](const Fiber& fiber) { return fiber.done; };
    for (int round = 0; error.empty() && !std::all_of(fibers.begin(), fibers.end(), done); ++round) {
      const long long before = events;
      if (order == 1)
        for (int w = threads / 32 - 1; w >= 0; --w)
          for (long long last = -1; last != events;) {
            last = events;
            for (int t = 31; t >= 0; --t) run(fibers[w * 32 + t]);
          }
      else
        for (int t = 0; t < threads; ++t) run(fibers[(t + round * 37 * order) % threads]);
      if (events == before && error.empty()) error = "threads wait for each other";
    }
    const char* end = shared_memory.data() + shared_memory.size() - GUARD;
    if (!std::all_of(end, end + GUARD, [](char c) { return c == char(0xFF); }))
      error = "wrote beyond shared memory";
    if (!error.empty()) throw std::runtime_error(error);
  }
}

static char* shared_base() {
  const auto at = reinterpret_cast<std::uintptr_t>(shared_memory.data());
  return shared_memory.data() + (128 - at % 128) % 128;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx emulator::block
#define gridDim emulator::grid

static inline void __syncthreads() {
  emulator::arrive(emulator::block_barrier, static_cast<int>(emulator::fibers.size()));
}
static inline void __syncwarp() { emulator::arrive(emulator::warp().barrier, 32); }
static inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
static inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
static inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
