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
  int rows, dim;       // dim: padded to the keys'
  float scale;         // what scores are to be multiplied by
  float* x;            // [rows][dim], the queries (rotated where the keys are)
  uint16_t* bf16;      // [rows][dim]
  int8_t *high, *low;  // [rows][dim], 256 high + low = the query as a 16-bit integer …
  float* unit;         // [rows], … times this
  int32_t* sums;       // [rows][dim / GROUP + 1], sums of those integers over groups, last over all
};

struct KeyKernel {
  void (*prepare)(Queries&);
  // s[row * TILE + token] = scale * q . k, for tile.blocks * 16 tokens.
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
    case 7:
      if constexpr (LIMIT > 7) f(Number<7>(), r);
      break;
    case 6:
      if constexpr (LIMIT > 6) f(Number<6>(), r);
      break;
    case 5:
      if constexpr (LIMIT > 5) f(Number<5>(), r);
      break;
    case 4:
      if constexpr (LIMIT > 4) f(Number<4>(), r);
      break;
    case 3:
      if constexpr (LIMIT > 3) f(Number<3>(), r);
      break;
    case 2:
      if constexpr (LIMIT > 2) f(Number<2>(), r);
      break;
    case 1: f(Number<1>(), r); break;
    default: break;
  }
}

// A format's step: the same dimensions of 16 tokens (keys), or 16 dimensions of the same tokens
// (values), as floats. Scales: keys' and values' per token are applied elsewhere; INT4's here.
struct StepF32 {
  static constexpr int step = 1, format = KVF_F32;
  static INLINE void load(const uint8_t* p, F16x* x) {
    x[0] = KVF_NAMESPACE::load((const float*)p);
  }
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

static void prepare_floats(Queries& q) {
  for (int64_t i = 0; i < (int64_t)q.rows * q.dim; ++i) q.x[i] *= q.scale;
}

static INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Rows and blocks (or chunks of 16 dimensions) whose sums are kept in registers: enough to hide
// the latency of a multiplication, and to use each broadcast number more than once.
template <int ROWS>
static constexpr int across() {
  return WIDTH == 16 ? (ROWS <= 4 ? 4 : 2) : WIDTH == 8 ? (ROWS <= 2 ? 2 : 1) : 1;
}
constexpr int ROW_LIMIT = WIDTH == 16 ? 8 : 4;

template <class Step>
static constexpr int64_t step_bytes() {  // of 16 tokens or dimensions
  return Step::format == KVF_F16 ? 32 : Step::format == KVF_FP8 ? 16 : 64;
}

template <class Step, int ROWS, int BLOCKS>
static INLINE void score_blocks(const Queries& q, int row, const Tile& tile, int block, float* s) {
  constexpr int format = Step::format, step = Step::step;
  F16x sum[ROWS][BLOCKS];
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BLOCKS; ++b) sum[r][b] = splat(0);
  const bool fetch = tile.next[0] && row == 0;
  const int dim = q.dim;
  const float* query = q.x + (int64_t)row * dim;
  int64_t at = 0;
  for (int d = 0; d < dim; d += step, at += step_bytes<Step>()) {
    F16x x[BLOCKS][step];
    for (int b = 0; b < BLOCKS; ++b) {
      Step::load(tile.block[block + b] + at, x[b]);
      if (fetch) prefetch(tile.next[block + b] + at);
      if constexpr (format == KVF_INT4) {
        const F16x scale = load_bf16(tile.scales[block + b] + d / GROUP * BLOCK);
        for (int j = 0; j < step; ++j) x[b][j] = x[b][j] * scale;
      }
    }
    for (int j = 0; j < step; ++j)
      for (int r = 0; r < ROWS; ++r) {
        const F16x number = splat(query[(int64_t)r * dim + d + j]);
        for (int b = 0; b < BLOCKS; ++b) sum[r][b] = fma(number, x[b][j], sum[r][b]);
      }
  }
  for (int b = 0; b < BLOCKS; ++b)
    for (int r = 0; r < ROWS; ++r) {
      if constexpr (format == KVF_INT8 || format == KVF_FP8)
        sum[r][b] = sum[r][b] * load_bf16(tile.scales[block + b]);
      store(s + (row + r) * TILE + (block + b) * BLOCK, sum[r][b]);
    }
}

template <class Step>
static void score_generic(const Queries& q, const Tile& tile, float* s) {
  for_rows<ROW_LIMIT>(q.rows, [&](auto n, int row) {
    constexpr int ROWS = decltype(n)::value, BLOCKS = across<ROWS>();
    int block = 0;
    for (; block + BLOCKS <= tile.blocks; block += BLOCKS)
      score_blocks<Step, ROWS, BLOCKS>(q, row, tile, block, s);
    for (; block < tile.blocks; ++block) score_blocks<Step, ROWS, 1>(q, row, tile, block, s);
  });
}

template <class Step, int ROWS, int CHUNKS>
static INLINE void add_chunks(int row, const float* p, const float* decay, const Tile& tile,
                              int chunk, float* o, int padded) {
  constexpr int format = Step::format, step = Step::step;
  F16x sum[ROWS][CHUNKS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHUNKS; ++c)
      sum[r][c] = load(o + (row + r) * (int64_t)padded + (chunk + c) * 16) * splat(decay[row + r]);
  const bool fetch = tile.next[0] && row == 0;
  for (int block = 0; block < tile.blocks; ++block) {
    const float* weight = p + row * TILE + block * BLOCK;
    for (int token = 0; token < BLOCK; token += step) {
      F16x x[CHUNKS][step];
      for (int c = 0; c < CHUNKS; ++c) {
        const int64_t at = step == 1 ? bytes_of(format, (int64_t)token * padded + (chunk + c) * 16)
                                     : bytes_of(format, (int64_t)(chunk + c) * 256 + token * 16);
        Step::load(tile.block[block] + at, x[c]);
        if (fetch) prefetch(tile.next[block] + at);
        if constexpr (format == KVF_INT4) {
          const uint16_t* scale = tile.scales[block] + (chunk + c) / 2 * BLOCK + token;
          for (int j = 0; j < step; ++j) x[c][j] = x[c][j] * splat(from_bf16(scale[j]));
        }
      }
      for (int j = 0; j < step; ++j)
        for (int r = 0; r < ROWS; ++r) {
          const F16x number = splat(weight[r * TILE + token + j]);
          for (int c = 0; c < CHUNKS; ++c) sum[r][c] = fma(number, x[c][j], sum[r][c]);
        }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHUNKS; ++c)
      store(o + (row + r) * (int64_t)padded + (chunk + c) * 16, sum[r][c]);
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
  const int padded = value_dim(format, tile.dim), chunks = padded / 16;
  for_rows<ROW_LIMIT>(rows, [&](auto n, int row) {
    constexpr int ROWS = decltype(n)::value, CHUNKS = across<ROWS>();
    int chunk = 0;
    for (; chunk + CHUNKS <= chunks; chunk += CHUNKS)
      add_chunks<Step, ROWS, CHUNKS>(row, p, decay, tile, chunk, o, padded);
    for (; chunk < chunks; ++chunk)
      add_chunks<Step, ROWS, 1>(row, p, decay, tile, chunk, o, padded);
  });
}

}  // namespace
