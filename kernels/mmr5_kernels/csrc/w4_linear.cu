// y[m, n] = x[m, k] . W[n, k]^T for int4 weights with a scale per 128 columns, and few rows of x.
//
// Bound by memory: at m = 1 every weight is read once (half a byte) and used for one product. The
// design keeps that read running from before the kernel may start until its end:
//
// * A block computes a unit of 32 outputs: 16 rows of the lower half of W and the 16 rows that lie
//   n/2 below them, so that the gate and up of SwiGLU meet in one block. Its warps split k into
//   contiguous ranges of steps (128 columns) and never wait for each other until a unit is done.
// * Weights are packed per 16 x 64 tile in the order of mma fragments: the 16 bytes a lane loads
//   are its A operands of four m16n8k16 instructions. Rows of x are the columns of B, so 1 to 8
//   rows cost the same instructions and no row sees another (the result of a row does not depend
//   on how many there are).
// * Each warp has a ring of STAGES slots in shared memory, filled by 16-byte asynchronous copies
//   and read back by the lanes that copied: no bank conflicts, no barriers. It runs across units.
//   In flight per block: WARPS x (STAGES - 1) x 2 KB. 4.3 TB/s at a latency of 0.95 us needs 31 KB
//   per SM (4.1 MB over 132); 14 warps with 3 stages have 57 KB.
// * Programmatic dependent launch: the ring is filled before griddepcontrol.wait, because weights
//   do not depend on the kernel before. What does (x, residual) is read after it, and from L2: this
//   SM's L1 may hold lines from before. 72 registers and 98 KB let two blocks share an SM, so that
//   the next kernel's first weights arrive while this one ends.
//
// Arithmetic. A code c in 0..15 becomes the bf16 number 128 + c by OR-ing it into 0x4300; one bf16
// FMA subtracts 136 + zero point, exactly. Products are summed in fp32 over a step and the sum is
// multiplied by the scale in fp32, so a weight is never rounded, where the reference rounds
// (code - zero) * scale to bf16. Warps are summed in a fixed order. The order of a sum depends on k
// and WARPS alone.
//
// In each half (64 columns) of a step lane (g, q) = (lane / 4, lane % 4) owns columns 32v + 8q +
// 0..7, v = 0, 1: two 16-byte pieces of a row of x, read in place. Product j = 0..3 uses four of
// them, 32(j / 2) + 8q + 4(j % 2) + 0..3; the hardware calls them k = 2q, 2q + 1, 2q + 8, 2q + 9.
// Nibble i of word j is row g + 8(i % 2), column 2(i / 2 % 2) + i / 4 of those four.

#include "ptx.cuh"

struct Arguments {
  const u16* x;         // [m, k] bf16
  const char* codes;    // [units, steps, 2 halves, 2 tiles, 32 lanes, 4 words]
  const char* scales;   // [units, steps, 8 (g), 4] bf16: rows g, g + 8 of the lower, the upper tile
  const char* zeros;    // [units, steps, 8 (g), 4] bytes: zero point + 8; null when symmetric
  const u16* norm;      // [k] bf16 or null: RMSNorm of x first (needs SHARED_X)
  const u16* bias;      // [n] bf16 or null
  const u16* residual;  // [m, n] bf16 or null
  u16* y;               // [m, n] bf16, or [m, n / 2] with swiglu
  int m, n, k;
  int half;         // rows of W in the lower half: ceil(n / 2)
  int units;        // ceil(half / 16)
  int rows;         // rows of x per block, at most 8 * TILES
  int swiglu;       // gate and up in, silu(gate) * up out
  float eps;
};

constexpr int STEP_BYTES = 2048;  // codes of 128 columns of a unit
constexpr int SCALE_BYTES = 64;   // its scales
constexpr int ZERO_BYTES = 32;
constexpr int SUM_STRIDE = 36;  // floats per row of x in the sums: 32, and no bank conflicts
constexpr int X_PAD = 64;       // bytes after a row of x in shared memory, for the same
constexpr u32 MINUS_136 = 0xC308C308u;  // twice in bf16: 128 + 8, as zero points are stored plus 8

template <bool ZEROS>
constexpr int SLOT_BYTES = STEP_BYTES + SCALE_BYTES + (ZEROS ? ZERO_BYTES : 0);

INLINE float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }
// -(128 + byte i of `bytes`) in bf16, twice.
INLINE u32 minus_128_and_byte(u32 bytes, int i) {
  return __byte_perm(bytes, 0xC3, 0x4040 + 0x0101 * i);
}
INLINE float low(u32 pair) { return __uint_as_float(pair << 16); }
INLINE float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
INLINE float round_bf16(float v) { return from_bf16(to_bf16(v)); }

// The stream of weights of one warp: its steps of every unit of the block, one after the other.
template <bool ZEROS>
struct Stream {
  static constexpr int LANES = SCALE_BYTES / 16 + (ZEROS ? ZERO_BYTES / 16 : 0);
  const char *codes, *side;  // where this lane's part of step 0 lies, and of its scales and zeros
  u32 side_bytes, at, unit_end, gap, stride, end;  // steps are numbered through all units
  bool has_side;
  MEMBER Stream(const Arguments& a, int lane, int first, int last)
      : codes(a.codes + lane * 16),
        side(!ZEROS || lane < 4 ? a.scales + lane * 16 : a.zeros + (lane - 4) * 16),
        side_bytes(!ZEROS || lane < 4 ? SCALE_BYTES : ZERO_BYTES), has_side(lane < LANES) {
    const u32 steps = a.k / 128;
    at = blockIdx.x * steps + first;
    unit_end = blockIdx.x * steps + last;
    stride = gridDim.x * steps;
    gap = stride - (last - first);
    end = first < last ? a.units * steps : 0;
  }

  // Starts the copy of the next step, if there is one, to this lane's part of a slot; every call is
  // one group of copies.
  MEMBER void advance(char* slot) {
    if (at < end) {
      const char* from = codes + static_cast<u64>(at) * STEP_BYTES;
#pragma unroll
      for (int i = 0; i < STEP_BYTES; i += 512) copy_async(slot + i, from + i);
      copy_async_if(has_side, slot + STEP_BYTES, side + static_cast<u64>(at) * side_bytes);
      if (++at == unit_end) {
        at += gap;
        unit_end += stride;
      }
    }
    copy_commit();
  }
};

// Rows of x, normalised if asked for, into shared memory. Ends with a barrier.
template <int WARPS>
INLINE void stage_x(const Arguments& a, char* shared_x, float* sums, int row0, int rows) {
  constexpr int TOGETHER = 3;  // rows whose loads are in flight together; four would spill (sm_80)
  const int tid = threadIdx.x, pieces = a.k / 8, stride = pieces + X_PAD / 16;
  const uint4* x = reinterpret_cast<const uint4*>(a.x) + static_cast<long long>(row0) * pieces;
  uint4* to = reinterpret_cast<uint4*>(shared_x);
  for (int m0 = 0; m0 < rows; m0 += TOGETHER) {
    float sum[TOGETHER] = {};
    for (int i = tid; i < pieces; i += WARPS * 32) {
      uint4 v[TOGETHER];
#pragma unroll
      for (int m = 0; m < TOGETHER; ++m)
        if (m0 + m < rows) v[m] = load_l2(x + (m0 + m) * pieces + i);
#pragma unroll
      for (int m = 0; m < TOGETHER; ++m) {
        if (m0 + m >= rows) break;
        to[(m0 + m) * stride + i] = v[m];
        const u32 pairs[4] = {v[m].x, v[m].y, v[m].z, v[m].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[m] += low(pairs[j]) * low(pairs[j]);
          sum[m] += high(pairs[j]) * high(pairs[j]);
        }
      }
    }
    if (!a.norm) continue;
#pragma unroll
    for (int m = 0; m < TOGETHER; ++m) {
#pragma unroll
      for (int lanes = 16; lanes; lanes /= 2) sum[m] += shuffle_xor(sum[m], lanes);
      if (tid % 32 == 0 && m0 + m < rows) sums[(m0 + m) * WARPS + tid / 32] = sum[m];
    }
  }
  __syncthreads();
  if (!a.norm) return;
  for (int m = 0; m < rows; ++m, to += stride) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += sums[m * WARPS + warp];
    const float scale = rsqrtf(sum / a.k + a.eps);
    const auto normed = [scale](u32 pair, u32 weights) {  // rounded before the weight and after it
      return fma_bf16x2(to_bf16x2(low(pair) * scale, high(pair) * scale), weights, 0x80008000u);
    };
    for (int i = tid; i < pieces; i += WARPS * 32) {
      const uint4 v = to[i], w = reinterpret_cast<const uint4*>(a.norm)[i];
      to[i] = make_uint4(normed(v.x, w.x), normed(v.y, w.y), normed(v.z, w.z), normed(v.w, w.w));
    }
  }
  __syncthreads();
}

// This lane's columns of half a step, for each row of x it holds: g, g + 8. `to_second` leads from
// the one to the other.
template <int TILES, bool SHARED_X>
INLINE void load_x(uint4 (&to)[TILES][2], const char* x, int to_second) {
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const uint4* from = reinterpret_cast<const uint4*>(x + t * to_second);
    to[t][0] = SHARED_X ? from[0] : load_l2(from);
    to[t][1] = SHARED_X ? from[4] : load_l2(from + 4);
  }
}

// Adds to the sums of both tiles of a unit the products of half a step. `slot` holds its codes,
// from this lane's part on; offsets are what to add to a code with 128 before it, by row.
template <int TILES>
INLINE void multiply(float (&sum)[2][TILES][4], const char* slot, const u32 (&offsets)[2][2],
                        const uint4 (&x)[TILES][2]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const uint4 codes = *reinterpret_cast<const uint4*>(slot + tile * 512);
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 biased = and_or(words[j] >> (4 * i), 0x000F000Fu, 0x43004300u);
        weights[i] = fma_bf16x2(biased, 0x3F803F80u, offsets[tile][i % 2]);
      }
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const uint4 v = x[t][j / 2];
        mma(sum[tile][t], weights, j % 2 ? v.z : v.x, j % 2 ? v.w : v.y);
      }
    }
  }
}

INLINE void store(const Arguments& a, float v, int row, int n, u16 residual) {
  const u16 rounded = to_bf16(v), sum = to_bf16(from_bf16(residual) + from_bf16(rounded));
  a.y[row * a.n + n] = a.residual ? sum : rounded;
}

// The sums of all warps for one unit, added up in the order of the warps, and what follows them.
template <int WARPS, int TILES>
INLINE void finish(const Arguments& a, const float (&acc)[2][TILES][4], float* sums, int unit,
                      int row0, int rows) {
  const int tid = threadIdx.x, warp = tid / 32, g = tid % 32 / 4, q = tid % 4;
#pragma unroll
  for (int i = 0; i < 2 * TILES * 4; ++i) {
    const int tile = i / (TILES * 4), t = i / 4 % TILES, part = i % 4;
    const int m = t * 8 + 2 * q + part % 2;
    if (m < rows)
      sums[(warp * rows + m) * SUM_STRIDE + tile * 16 + g + part / 2 * 8] = acc[tile][t][part];
  }
  const int m = tid / 16, r = tid % 16, n = unit * 16 + r, upper = n + a.half, row = row0 + m;
  const bool mine = m < rows && n < a.half, both = mine && upper < a.n;
  // Asked for before the barrier, so that it does not wait for them after it.
  const float bias = mine && a.bias ? from_bf16(a.bias[n]) : 0.f;
  const float upper_bias = both && a.bias ? from_bf16(a.bias[upper]) : 0.f;
  const u16 residual = mine && a.residual ? load_l2(a.residual + row * a.n + n) : u16(0);
  const u16 upper_residual = both && a.residual ? load_l2(a.residual + row * a.n + upper) : u16(0);
  __syncthreads();
  if (mine) {
    float v = 0.f, w = 0.f;  // of the lower and the upper half
#pragma unroll
    for (int from = 0; from < WARPS; ++from) {
      v += sums[(from * rows + m) * SUM_STRIDE + r];
      w += sums[(from * rows + m) * SUM_STRIDE + 16 + r];
    }
    v += bias;
    w += upper_bias;
    if (a.swiglu) {
      const float gate = round_bf16(v), up = round_bf16(w);
      a.y[row * a.half + n] = to_bf16(round_bf16(gate / (1.f + expf(-gate))) * up);
    } else {
      store(a, v, row, n, residual);
      if (both) store(a, w, row, upper, upper_residual);
    }
  }
  __syncthreads();  // the sums are free again
}

// Block (i, j): units i, i + gridDim.x, ... for rows j * a.rows onwards. Shared memory: the rings,
// the sums (WARPS x rows x SUM_STRIDE floats), and with SHARED_X the rows of x.
template <int WARPS, int STAGES, int TILES, bool ZEROS, bool SHARED_X>
INLINE void w4_linear(const Arguments& a, char* shared) {
  static_assert(WARPS * 2 >= 8 * TILES, "16 threads finish each row of x");
  constexpr int SLOT = SLOT_BYTES<ZEROS>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int row0 = blockIdx.y * a.rows, rows = min(a.rows, a.m - row0), steps = a.k / 128;
  const int first = steps * warp / WARPS, last = steps * (warp + 1) / WARPS;
  char* ring = shared + warp * STAGES * SLOT + lane * 16;  // this lane's part of its first slot
  float* sums = reinterpret_cast<float*>(shared + WARPS * STAGES * SLOT);
  char* shared_x = reinterpret_cast<char*>(sums + WARPS * rows * SUM_STRIDE);

  start_next_kernel();
  Stream<ZEROS> stream(a, lane, first, last);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) stream.advance(ring + i * SLOT);
  // Constants as well, as far as L2: the first norm weights and bias come from memory otherwise.
  if (a.norm)
    for (int i = threadIdx.x * 64; i < a.k; i += WARPS * 32 * 64) prefetch_l2(a.norm + i);
  if (a.bias && threadIdx.x < 2)
    prefetch_l2(a.bias + min(int(blockIdx.x * 16 + threadIdx.x * a.half), a.n - 1));
  wait_for_previous_kernel();

  const char* x = reinterpret_cast<const char*>(a.x) + static_cast<long long>(row0) * a.k * 2;
  int stride = a.k * 2;
  if (SHARED_X) {
    stage_x<WARPS>(a, shared_x, sums, row0, rows);
    x = shared_x;
    stride += X_PAD;
  }
  // Lanes whose row does not exist read the last one: their results are dropped.
  const int row = min(g, rows - 1), to_second = (min(g + 8, rows - 1) - row) * stride;
  x += row * stride + lane % 4 * 16;
  // Offsets of slots: the one that is multiplied, the one that is filled meanwhile.
  int begin = static_cast<int>(ring - shared), end = begin + (STAGES - 1) * SLOT;
  int read = begin, write = end, side = STEP_BYTES + g * 8 - lane * 16;

  uint4 here[2][TILES][2] = {};
  if (!SHARED_X && first < last)
    for (int half = 0; half < 2; ++half)
      load_x<TILES, SHARED_X>(here[half], x + first * 256 + half * 128, to_second);
  for (int unit = blockIdx.x; unit < a.units; unit += gridDim.x) {
    float acc[2][TILES][4] = {};
#pragma unroll 1
    for (int step = first; step < last; ++step) {
      copy_wait<STAGES - 2>();  // of this lane; the scales come from other lanes
      __syncwarp();             // and all have read the slot that is filled next
      stream.advance(shared + write);
      const char* slot = shared + read;
      const uint2 scales = *reinterpret_cast<const uint2*>(slot + side);
      u32 offsets[2][2] = {{MINUS_136, MINUS_136}, {MINUS_136, MINUS_136}};
      if (ZEROS) {
        const u32 zeros = *reinterpret_cast<const u32*>(slot + side + SCALE_BYTES - g * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) offsets[i / 2][i % 2] = minus_128_and_byte(zeros, i);
      }
      // x from L2 is fetched a step ahead: it comes while the next weights are waited for.
      const int next = (step + 1 < last ? step + 1 : first) * 256;
      float sum[2][TILES][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const char* at = x + half * 128;
        if (SHARED_X) load_x<TILES, SHARED_X>(here[half], at + step * 256, to_second);
        multiply<TILES>(sum, slot + half * 1024, offsets, here[half]);
        if (!SHARED_X) load_x<TILES, SHARED_X>(here[half], at + next, to_second);
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const u32 pair = tile ? scales.y : scales.x;
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            acc[tile][t][i] += (i < 2 ? low(pair) : high(pair)) * sum[tile][t][i];
      }
      write = read;
      read = read == end ? begin : read + SLOT;
    }
    finish<WARPS, TILES>(a, acc, sums, unit, row0, rows);
  }
}

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(W4_WARPS * 32, W4_BLOCKS)
    w4_linear_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char shared[];
  w4_linear<W4_WARPS, W4_STAGES, W4_TILES, W4_ZEROS, W4_SHARED_X>(a, shared);
}
#endif
