// The operations on AMX's tiles that the kernels need: the processor's, or (KVF_EMULATE_AMX) the same
// in plain C++ as Intel describes them, so that the kernels can be tested on machines without.
#pragma once
#include <cstdlib>

#include "simd.h"

#if defined(KVF_AMX)
namespace KVF_NAMESPACE {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;  // of the largest tile

// How many rows, and bytes of each, a tile has, as `ldtilecfg` reads it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int count, int row_bytes) {
    rows[tile] = (uint8_t)count;
    bytes[tile] = (uint16_t)row_bytes;
  }
};

#if !defined(KVF_EMULATE_AMX)

static INLINE void use_shapes(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}
static INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int T>
static INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
static INLINE void load_tile_rows(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
static INLINE void store_tile_rows(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C += A B: rows of pairs of bfloat16, times pairs of rows side by side.
template <int C, int A, int B>
static INLINE void multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct EmulatedTiles {
  TileShapes shapes;
  uint8_t data[8][TILE_ROWS][TILE_BYTES];
};
static thread_local EmulatedTiles tiles;

// What the processor answers with a fault.
static inline void demand(bool holds) {
  if (!holds) abort();
}

static inline void use_shapes(const TileShapes& shapes) {
  demand(shapes.palette == 1 && (uintptr_t)&shapes % 64 == 0);
  for (int t = 0; t < 8; ++t)
    demand(shapes.rows[t] <= TILE_ROWS && shapes.bytes[t] <= TILE_BYTES &&
           !shapes.rows[t] == !shapes.bytes[t]);
  tiles.shapes = shapes;
  memset(tiles.data, 0, sizeof tiles.data);
}
static inline void release_tiles() { tiles.shapes.palette = 0; }

static inline void check_tile(int tile) { demand(tiles.shapes.palette && tiles.shapes.rows[tile]); }

template <int T>
static inline void zero_tile() {
  check_tile(T);
  memset(tiles.data[T], 0, sizeof tiles.data[T]);
}
template <int T>
static inline void load_tile_rows(const void* from, int64_t stride) {
  zero_tile<T>();
  for (int r = 0; r < tiles.shapes.rows[T]; ++r)
    memcpy(tiles.data[T][r], (const uint8_t*)from + r * stride, tiles.shapes.bytes[T]);
}
template <int T>
static inline void store_tile_rows(void* to, int64_t stride) {
  check_tile(T);
  for (int r = 0; r < tiles.shapes.rows[T]; ++r)
    memcpy((uint8_t*)to + r * stride, tiles.data[T][r], tiles.shapes.bytes[T]);
}

// Denormal numbers are zero, before and after.
static inline float flushed(float x) {
  return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x;
}

static inline float half_of_pair(const uint8_t* at, int i) {
  uint16_t h;
  memcpy(&h, at + 2 * i, 2);
  return flushed(from_bf16(h));
}

// The first and the second numbers of pairs are summed apart, each with one rounding (fma), joined
// at the end, and added to what was there.
template <int C, int A, int B>
static inline void multiply_bf16() {
  const TileShapes& s = tiles.shapes;
  for (int t : {C, A, B}) check_tile(t);
  demand(s.rows[C] == s.rows[A] && s.bytes[C] == s.bytes[B] && s.bytes[A] == 4 * s.rows[B]);
  for (int m = 0; m < s.rows[C]; ++m)
    for (int n = 0; n < s.bytes[C] / 4; ++n) {
      float sums[2] = {0, 0}, c;
      for (int k = 0; k < s.rows[B]; ++k)
        for (int i = 0; i < 2; ++i)
          sums[i] = flushed(std::fmaf(half_of_pair(tiles.data[A][m] + 4 * k, i),
                                      half_of_pair(tiles.data[B][k] + 4 * n, i), sums[i]));
      memcpy(&c, tiles.data[C][m] + 4 * n, 4);
      c = flushed(flushed(c) + flushed(sums[0] + sums[1]));
      memcpy(tiles.data[C][m] + 4 * n, &c, 4);
    }
}

#endif
}  // namespace
#endif
