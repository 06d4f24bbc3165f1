// An entry point for ctypes to csrc/w4_linear.cu on the emulator.
#include "w4_linear.cu"

static const Arguments* arguments;

template <int WARPS, int STAGES, int TILES, bool ZEROS, bool SHARED_X>
static void kernel() {
  w4_linear<WARPS, STAGES, TILES, ZEROS, SHARED_X>(*arguments, emulator::shared_base());
}

struct Variant {
  int warps, stages, tiles, zeros, shared_x;
  void (*kernel)();
};
#define VARIANT(W, S, T, Z, X) {W, S, T, Z, X, kernel<W, S, T, Z, X>}
static const Variant variants[] = {
    VARIANT(14, 3, 1, 0, 0), VARIANT(14, 3, 1, 0, 1), VARIANT(14, 3, 1, 1, 0),
    VARIANT(14, 3, 1, 1, 1), VARIANT(14, 3, 2, 0, 0), VARIANT(14, 3, 2, 0, 1),
    VARIANT(14, 3, 2, 1, 0), VARIANT(14, 3, 2, 1, 1), VARIANT(14, 2, 1, 1, 1),
    VARIANT(4, 5, 1, 1, 1),
};

extern "C" int arguments_size() { return sizeof(Arguments); }

// `copyable` holds `ranges` pairs of begin and end. Writes what went wrong to `error` [256], and the
// asynchronous copies that started before the previous kernel was waited for to `early`.
extern "C" int emulate(const Arguments* a, const int* wanted, int grid_x, int grid_y,
                       int shared_bytes, int order, const char** copyable, int ranges, char* error,
                       long long* early) {
  arguments = a;
  emulator::copyable.clear();
  for (int i = 0; i < ranges; ++i)
    emulator::copyable.push_back({copyable[2 * i], copyable[2 * i + 1]});
  for (const Variant& v : variants) {
    const int is[] = {v.warps, v.stages, v.tiles, v.zeros, v.shared_x};
    if (!std::equal(is, is + 5, wanted)) continue;
    try {
      emulator::launch(v.kernel, {grid_x, grid_y, 1}, v.warps * 32, shared_bytes, order);
    } catch (const std::exception& caught) {
      std::snprintf(error, 256, "%s", caught.what());
      return 1;
    }
    *early = emulator::early_copies;
    return 0;
  }
  std::snprintf(error, 256, "no such variant");
  return 1;
}
