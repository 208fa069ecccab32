// Scores and weighted sums for every format and instruction set: numbers become floats in
// registers on the way. Formats whose layout the machine can multiply directly have kernels of
// their own (bf16.h, integer.h).
#pragma once
#include "layout.h"

namespace KVF_NAMESPACE {

constexpr int TILE_BLOCKS = 4;
constexpr int TILE = TILE_BLOCKS * BLOCK;  // tokens whose scores are in flight

// Up to four packed blocks of one head.
struct Tile {
  const uint8_t* block[TILE_BLOCKS];
  const uint16_t* scales[TILE_BLOCKS];
  const uint8_t* next[TILE_BLOCKS];  // what will be read after these, or null
  int blocks;
  int dim;
};

// Query rows of one KV head, prepared for a key format; which members are used is its business.
struct Queries {
  int rows, dim;           // dim: padded to the keys'
  const float* x;          // [rows][dim], the queries (rotated where the keys are)
  uint16_t* bf16;          // [rows][dim]
  int8_t *high, *low;      // [rows][dim], 256 high + low = the query as a 16-bit integer …
  float* unit;             // [rows], … times this
  int32_t *sums;           // [rows][dim / GROUP + 1], sums of those integers over groups, last over all
};

struct KeyKernel {
  void (*prepare)(Queries&);
  // s[row * TILE + token] = q . k, for tile.blocks * 16 tokens.
  void (*score)(const Queries&, const Tile&, float* s);
};

struct ValueKernel {
  // o[row] = decay[row] * o[row] + sum over tokens of p[row * TILE + token] v.
  // o rows are value_dim apart. p is scratch and may be overwritten.
  void (*add)(int rows, float* p, const float* decay, const Tile&, float* o);
};

template <int N>
struct Number {
  static constexpr int value = N;
};

// Call f(Number<R>, first) for groups of R <= LIMIT rows.
template <int LIMIT, class Function>
static INLINE void for_rows(int rows, Function f) {
  int r = 0;
  for (; r + LIMIT <= rows; r += LIMIT) f(Number<LIMIT>(), r);
  switch (rows - r) {
    case 7: if constexpr (LIMIT > 7) f(Number<7>(), r); break;
    case 6: if constexpr (LIMIT > 6) f(Number<6>(), r); break;
    case 5: if constexpr (LIMIT > 5) f(Number<5>(), r); break;
    case 4: if constexpr (LIMIT > 4) f(Number<4>(), r); break;
    case 3: if constexpr (LIMIT > 3) f(Number<3>(), r); break;
    case 2: if constexpr (LIMIT > 2) f(Number<2>(), r); break;
    case 1: f(Number<1>(), r); break;
    default: break;
  }
}

// A format's step: the same dimensions of 16 tokens (keys), or 16 dimensions of the same tokens
// (values), as floats. Scales: keys' and values' per token are applied elsewhere; INT4's here.
struct StepF32 {
  static constexpr int step = 1, format = KVF_F32;
  static INLINE void load(const uint8_t* p, F16x* x) { x[0] = KVF_NAMESPACE::load((const float*)p); }
};
struct StepF16 {
  static constexpr int step = 1, format = KVF_F16;
  static INLINE void load(const uint8_t* p, F16x* x) { x[0] = load_f16((const uint16_t*)p); }
};
struct StepFP8 {
  static constexpr int step = 1, format = KVF_FP8;
  static INLINE void load(const uint8_t* p, F16x* x) { x[0] = load_fp8(p); }
};
struct StepBF16 {
  static constexpr int step = 2, format = KVF_BF16;
  static INLINE void load(const uint8_t* p, F16x* x) {
    for (int i = 0; i < PARTS; ++i) {
      Ints u;
      memcpy(&u, p + i * sizeof u, sizeof u);
      x[0].v[i] = (Floats)(u << 16);
      x[1].v[i] = (Floats)(u & (int32_t)0xffff0000);
    }
  }
};
template <bool KEY>
struct StepINT8 {
  static constexpr int step = 4, format = KVF_INT8;
  static INLINE void load(const uint8_t* p, F16x* x) {
    for (int i = 0; i < PARTS; ++i) {
      Ints u;
      memcpy(&u, p + i * sizeof u, sizeof u);
      if (KEY) u ^= (int32_t)0x80808080;
      for (int j = 0; j < 4; ++j)
        x[j].v[i] = __builtin_convertvector((u << (24 - 8 * j)) >> 24, Floats);
    }
  }
};
struct StepINT4 {
  static constexpr int step = 8, format = KVF_INT4;
  static INLINE void load(const uint8_t* p, F16x* x) {
    for (int i = 0; i < PARTS; ++i) {
      Ints u;
      memcpy(&u, p + i * sizeof u, sizeof u);
      for (int j = 0; j < 8; ++j) {
        const int shift = j % 4 * 8 + j / 4 * 4;
        x[j].v[i] = __builtin_convertvector(((u >> shift) & 15) - 8, Floats);
      }
    }
  }
};

static void prepare_floats(Queries&) {}

static INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class Step, int ROWS>
static INLINE void score_block(const Queries& q, int row, const Tile& tile, int block, float* s) {
  constexpr int format = Step::format, step = Step::step;
  constexpr bool per_token = format == KVF_INT8 || format == KVF_FP8;
  constexpr int64_t bytes = format == KVF_INT4 ? 64 : (format == KVF_F32 ? 64 : format == KVF_F16 ? 32 : format == KVF_FP8 ? 16 : 64);
  F16x sum[ROWS];
  for (int r = 0; r < ROWS; ++r) sum[r] = splat(0);
  const uint8_t* p = tile.block[block];
  const uint8_t* next = tile.next[block];
  const int dim = q.dim;
  for (int d = 0; d < dim; d += step, p += bytes) {
    F16x x[step];
    Step::load(p, x);
    if (next) prefetch(next + (p - tile.block[block]));
    if constexpr (format == KVF_INT4) {
      const F16x scale = load_bf16(tile.scales[block] + d / GROUP * BLOCK);
      for (int j = 0; j < step; ++j) x[j] = x[j] * scale;
    }
    for (int j = 0; j < step; ++j)
      for (int r = 0; r < ROWS; ++r)
        sum[r] = fma(splat(q.x[(row + r) * (int64_t)dim + d + j]), x[j], sum[r]);
  }
  for (int r = 0; r < ROWS; ++r) {
    if constexpr (per_token) sum[r] = sum[r] * load_bf16(tile.scales[block]);
    store(s + (row + r) * TILE + block * BLOCK, sum[r]);
  }
}

template <class Step>
static void score_generic(const Queries& q, const Tile& tile, float* s) {
  for (int block = 0; block < tile.blocks; ++block)
    for_rows<WIDTH == 16 ? 8 : 4>(q.rows, [&](auto n, int row) {
      score_block<Step, decltype(n)::value>(q, row, tile, block, s);
    });
}

template <class Step, int ROWS>
static INLINE void add_rows(int row, const float* p, const float* decay, const Tile& tile,
                            int chunk, float* o, int padded) {
  constexpr int format = Step::format, step = Step::step;
  F16x sum[ROWS];
  for (int r = 0; r < ROWS; ++r)
    sum[r] = load(o + (row + r) * (int64_t)padded + chunk * 16) * splat(decay[row + r]);
  for (int block = 0; block < tile.blocks; ++block) {
    const float* weight = p + row * TILE + block * BLOCK;
    for (int token = 0; token < BLOCK; token += step) {
      const int64_t at = step == 1
          ? bytes_of(format, (int64_t)token * padded + chunk * 16)
          : bytes_of(format, (int64_t)chunk * 256 + token * 16);
      F16x x[step];
      Step::load(tile.block[block] + at, x);
      if constexpr (format == KVF_INT4) {
        const uint16_t* scale = tile.scales[block] + chunk / 2 * BLOCK + token;
        for (int j = 0; j < step; ++j) x[j] = x[j] * splat(from_bf16(scale[j]));
      }
      for (int j = 0; j < step; ++j)
        for (int r = 0; r < ROWS; ++r) sum[r] = fma(splat(weight[r * TILE + token + j]), x[j], sum[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) store(o + (row + r) * (int64_t)padded + chunk * 16, sum[r]);
}

// Fold one scale per token into the weights.
static INLINE void scale_weights(int rows, float* p, const Tile& tile) {
  for (int block = 0; block < tile.blocks; ++block) {
    const F16x scale = load_bf16(tile.scales[block]);
    for (int r = 0; r < rows; ++r) {
      float* at = p + r * TILE + block * BLOCK;
      store(at, load(at) * scale);
    }
  }
}

template <class Step>
static void add_generic(int rows, float* p, const float* decay, const Tile& tile, float* o) {
  constexpr int format = Step::format;
  if constexpr (format == KVF_INT8 || format == KVF_FP8) scale_weights(rows, p, tile);
  const int padded = value_dim(format, tile.dim);
  for (int chunk = 0; chunk * 16 < padded; ++chunk)
    for_rows<WIDTH == 16 ? 8 : 4>(rows, [&](auto n, int row) {
      add_rows<Step, decltype(n)::value>(row, p, decay, tile, chunk, o, padded);
    });
}

}  // namespace
