// csrc/ptx.cuh on the emulator: the same functions in C++.
#pragma once
#include "emulator.h"

#define MEMBER inline
#define INLINE static inline

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

using emulator::current;

static void copy_async(char* shared, const char* global) {
  using namespace emulator;
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  const auto holds = [&](Range r) { return r.begin <= global && global + 16 <= r.end; };
  if (!aligned(shared) || !aligned(global)) fail("misaligned asynchronous copy");
  if (std::none_of(copyable.begin(), copyable.end(), holds)) fail("copied from outside the weight");
  early_copies += !current->waited;
  current->open.push_back({shared, global});
}
static void copy_async_if(bool wanted, char* shared, const char* global) {
  if (wanted) copy_async(shared, global);
}
static void copy_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}
template <int PENDING>
static void copy_wait() {
  emulator::finish_copies(PENDING);
}
static void start_next_kernel() {}
static void wait_for_previous_kernel() { current->waited = true; }
template <typename T>
static T load_l2(const T* p) {
  if (!current->waited) emulator::fail("read before waiting for the previous kernel");
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T)) emulator::fail("misaligned load");
  return *p;
}
static void prefetch_l2(const void*) {}
static unsigned and_or(unsigned a, unsigned mask, unsigned bits) { return (a & mask) | bits; }
static unsigned short to_bf16(float v) {
  const unsigned bits = __float_as_uint(v);
  if (std::isnan(v)) return 0x7FFF;
  return static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
static unsigned to_bf16x2(float low, float high) {
  return unsigned(to_bf16(high)) << 16 | to_bf16(low);
}
static float half_of(unsigned pair, int half) { return __uint_as_float(pair >> 16 * half << 16); }
static unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
  unsigned result = 0;
  for (int i = 0; i < 2; ++i)
    result |= unsigned(to_bf16(std::fma(half_of(a, i), half_of(b, i), half_of(c, i)))) << 16 * i;
  return result;
}
static float shuffle_xor(float v, int lanes) {
  emulator::Warp& warp = emulator::warp();
  float(&slots)[32] = warp.shuffled[current->parity ^= 1];
  slots[emulator::lane()] = v;
  emulator::arrive(warp.barrier, 32);
  return slots[emulator::lane() ^ lanes];
}
// m16n8k16: in lane 4g + q, register r of A holds row g + 8(r % 2), columns 2q, 2q + 1, plus 8 in
// r = 2, 3; register r of B column g, rows 2q, 2q + 1 plus 8r; D row g (+ 8), columns 2q, 2q + 1.
static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulator::Warp& warp = emulator::warp();
  emulator::Fragments(&all)[32] = warp.fragments[current->parity ^= 1];
  const int lane = emulator::lane(), g = lane / 4, q = lane % 4;
  std::copy(a, a + 4, all[lane].a);
  all[lane].b[0] = b0;
  all[lane].b[1] = b1;
  emulator::arrive(warp.barrier, 32);
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) {
      const emulator::Fragments& row = all[g * 4 + k % 8 / 2];
      const emulator::Fragments& column = all[(2 * q + i % 2) * 4 + k % 8 / 2];
      d[i] += half_of(row.a[i / 2 + k / 8 * 2], k % 2) * half_of(column.b[k / 8], k % 2);
    }
}
