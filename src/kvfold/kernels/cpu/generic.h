// Scores and weighted sums for every format and instruction set: numbers become floats in
// registers on the way. Formats whose layout the machine can multiply directly have kernels of
// their own (formats/bf16.h; integer.h).
#pragma once
#include <algorithm>

#include "encode.h"

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
  bool streams;  // the call reads more than a core's own caches hold
  // Of latents (latent.h): rows as stored, their bytes, and as words; where decoded rows are to be,
  // `stride` words apart, and pairs of them; of blocks whose rows are words as they lie the first one.
  void (*decode)(const uint8_t* row, int dim, uint32_t* to);
  const uint8_t* const* rows;
  const uint32_t* const* words;
  const uint8_t* lies[TILE_BLOCKS];
  uint32_t *decoded, *pairs;
  int64_t row_bytes, stride;
};

// Query rows of one KV head, prepared for a format of keys; which members are used is its business.
struct Queries {
  int rows, dim;       // dim: padded to the keys'
  int panel;           // queries that are interleaved (latent.h)
  float scale;         // what scores are to be multiplied by
  float* x;            // [rows][dim], the queries (rotated where the keys are)
  uint16_t* bf16;      // [rows][dim]
  int8_t *high, *low;  // [rows][dim], 256 high + low = the query as a 16-bit integer …
  float* unit;         // [rows], … times this
  int32_t*
      sums;  // [rows][dim / LEAST_GROUP + 1], sums of those integers over groups, last over all
};

struct KeyMath {
  void (*prepare)(Queries&);
  // s[row * TILE + token] = scale * q . k, for tile.blocks * 16 tokens.
  void (*score)(const Queries&, const Tile&, float* s);
};

// Weights of a tile's tokens.
struct Weights {
  int rows;
  float* p;            // [rows][TILE]; scratch that may be overwritten
  const float* decay;  // [rows], of what was summed before
  const float* top;    // [rows], the largest of each row …
  const float* l;      // [rows], … and the sum so far; not asked for where values are floats
  float* spent;        // [rows], what weights were rounded by so far (integer.h)
};

struct ValueMath {
  // o[row] = decay[row] * o[row] + sum over tokens of p[row][token] v. o rows are stored_dim apart.
  void (*add)(const Weights&, const Tile&, float* o);
};

template <int N>
struct Number {
  static constexpr int value = N;
};

static INLINE int groups_of(int count, int size) { return (count + size - 1) / size; }

// f(Number<R>) of R = count, 1 to LIMIT.
template <int LIMIT, class Function>
static INLINE void with_number(int count, Function f) {
  if constexpr (LIMIT > 1)
    if (count < LIMIT) return with_number<LIMIT - 1>(count, f);
  f(Number<LIMIT>());
}

// Call f(Number<R>, first) for groups of R <= LIMIT rows, as few and as even as can be: a group of
// one row would wait for each of its sums.
template <int LIMIT, class Function>
static INLINE void for_rows(int rows, Function f) {
  int row = 0;
  for (int groups = groups_of(rows, LIMIT); groups; --groups) {
    const int count = (rows - row + groups - 1) / groups;
    with_number<LIMIT>(count, [&](auto n) { f(n, row); });
    row += count;
  }
}

static void prepare_floats(Queries& q) {
  for (int64_t i = 0; i < (int64_t)q.rows * q.dim; ++i) q.x[i] *= q.scale;
}

// To the second level: fetched to the first, what follows came no sooner than without on AMD's Zen 4,
// whose kernels read 10% to 30% faster so; on Intel's it made no difference.
static INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// What follows a tile is fetched meanwhile, in the order in which it lies: a few lines of 64 bytes at
// every step of every call that goes over the tile. What lies near the core need not be.
struct Ahead {
  const Tile& tile;
  int64_t bytes, at = 0;  // of a block
  int block, each;        // lines at a step

  Ahead(const Tile& tile, int64_t bytes, int steps, int calls)
      : tile(tile), bytes(bytes), block(tile.next[0] && tile.streams ? 0 : TILE_BLOCKS),
        each(groups_of((int)(bytes / 64) * TILE_BLOCKS, std::max(1, steps * calls))) {}

  INLINE void step() {
    if (block == TILE_BLOCKS) return;
    for (int i = 0; i < each; ++i) prefetch(tile.next[block] + at + i * 64);
    at += each * 64;
    if (at < bytes) return;
    at = 0;
    ++block;
  }
};

// How many rows, and blocks of keys or chunks of values, go at once, and how many sums each has, so
// that additions need not wait for each other.
template <int ROWS, int ACROSS, int SPLIT>
struct Shape {
  static constexpr int split = SPLIT;

  int calls(int rows, int across) const {
    return groups_of(rows, ROWS) * groups_of(across, ACROSS);
  }

  // f(Number<rows>, Number<across>, first row, first block or chunk)
  template <class Function>
  INLINE void for_all(int rows, int across, Function f) const {
    for_rows<ROWS>(rows, [&](auto n, int row) {
      int i = 0;
      for (; i + ACROSS <= across; i += ACROSS) f(n, Number<ACROSS>(), row, i);
      for (; i < across; ++i) f(n, Number<1>(), row, i);
    });
  }
};

// f(Shape): what comes from memory is best taken as it lies there, a block or a chunk at a time;
// with many rows, or near the core, it counts that each number loaded is used often.
template <class Function>
static INLINE void in_shape(int rows, int across, bool streams, Function f) {
  if (across >= 4 && (rows > 8 || !streams)) f(Shape<6, 4, 1>());
  else if (across >= 2 && rows > 4) f(Shape<8, 2, 1>());
  else f(Shape<4, 1, 2>());
}

// Rows and blocks (or chunks of 16 dimensions) whose sums are kept in registers: enough to hide
// the latency of a multiplication, and to use each broadcast number more than once.
template <int ROWS>
static constexpr int across() {
  return WIDTH == 16 ? (ROWS <= 4 ? 4 : 2) : WIDTH == 8 ? (ROWS <= 2 ? 2 : 1) : 1;
}
constexpr int ROW_LIMIT = WIDTH == 16 ? 8 : 4;

// Bytes of one step of 16 tokens (keys) or dimensions (values).
template <class F>
constexpr int64_t STEP_BYTES = 2 * F::step * F::bits;

template <class F, int ROWS, int BLOCKS>
static INLINE void score_blocks(const Queries& q, int row, const Tile& tile, int block, float* s) {
  constexpr int step = F::step;
  F16x sum[ROWS][BLOCKS];
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BLOCKS; ++b) sum[r][b] = splat(0);
  const bool fetch = tile.next[0] && row == 0;
  const int dim = q.dim;
  const float* query = q.x + (int64_t)row * dim;
  int64_t at = 0;
  for (int d = 0; d < dim; d += step, at += STEP_BYTES<F>) {
    F16x x[BLOCKS][step];
    for (int b = 0; b < BLOCKS; ++b) {
      F::template load<true>(tile.block[block + b] + at, x[b]);
      if (fetch) prefetch(tile.next[block + b] + at);
      if constexpr (GROUPED<F>) {
        const F16x scale = load_bf16(tile.scales[block + b] + d / F::group * BLOCK);
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
      if constexpr (F::group == WHOLE_ROW)
        sum[r][b] = sum[r][b] * load_bf16(tile.scales[block + b]);
      store(s + (row + r) * TILE + (block + b) * BLOCK, sum[r][b]);
    }
}

template <class F>
static void score_floats(const Queries& q, const Tile& tile, float* s) {
  for_rows<ROW_LIMIT>(q.rows, [&](auto n, int row) {
    constexpr int ROWS = decltype(n)::value, BLOCKS = across<ROWS>();
    int block = 0;
    for (; block + BLOCKS <= tile.blocks; block += BLOCKS)
      score_blocks<F, ROWS, BLOCKS>(q, row, tile, block, s);
    for (; block < tile.blocks; ++block) score_blocks<F, ROWS, 1>(q, row, tile, block, s);
  });
}

template <class F, int ROWS, int CHUNKS>
static INLINE void add_chunks(int row, const float* p, const float* decay, const Tile& tile,
                              int chunk, float* o, int padded) {
  constexpr int step = F::step;
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
        const int64_t at = bytes_of<F>(step == 1 ? (int64_t)token * padded + (chunk + c) * 16
                                                 : (int64_t)(chunk + c) * 256 + token * 16);
        F::template load<false>(tile.block[block] + at, x[c]);
        if (fetch) prefetch(tile.next[block] + at);
        if constexpr (GROUPED<F>) {
          const uint16_t* scale = tile.scales[block] + (chunk + c) * 16 / F::group * BLOCK + token;
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

template <class F>
static void add_floats(const Weights& w, const Tile& tile, float* o) {
  if constexpr (F::group == WHOLE_ROW) scale_weights(w.rows, w.p, tile);
  const int padded = stored_dim<F, false>(tile.dim), chunks = padded / 16;
  for_rows<ROW_LIMIT>(w.rows, [&](auto n, int row) {
    constexpr int ROWS = decltype(n)::value, CHUNKS = across<ROWS>();
    int chunk = 0;
    for (; chunk + CHUNKS <= chunks; chunk += CHUNKS)
      add_chunks<F, ROWS, CHUNKS>(row, w.p, w.decay, tile, chunk, o, padded);
    for (; chunk < chunks; ++chunk)
      add_chunks<F, ROWS, 1>(row, w.p, w.decay, tile, chunk, o, padded);
  });
}

// For formats that have no kernels of their own.
template <class F>
struct InFloats {
  static KeyMath key_math(int) { return {prepare_floats, score_floats<F>}; }
  static ValueMath value_math(int) { return {add_floats<F>}; }
};

}  // namespace
