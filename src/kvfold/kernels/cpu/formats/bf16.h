// bfloat16, as it is.
#pragma once
#include "../amx.h"

namespace KVF_NAMESPACE {

#if defined(__AVX512BF16__)
// With AVX512-BF16 a register holds two dimensions of 16 keys, or 16 dimensions of two values, and
// one instruction multiplies and adds both. Weights are rounded to bfloat16, as FlashAttention
// does; sums are floats.
static INLINE __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

static void prepare_bf16(Queries& q) {
  const int64_t count = (int64_t)q.rows * q.dim;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(q.x + i));
    memcpy(q.bf16 + i, &half, sizeof half);
  }
  for (; i < count; ++i) q.bf16[i] = to_bf16(q.x[i]);
}

// Steps d … d + SPLIT - 1 of so many blocks, each step into sums of its own.
template <int ROWS, int BLOCKS, int SPLIT, int SUMS>
static INLINE void score_bf16_steps(const int32_t* query, int pairs, const Tile& tile, int block,
                                    int d, __m512 (&sum)[ROWS][SUMS]) {
  __m512i k[BLOCKS * SPLIT];
  for (int i = 0; i < BLOCKS * SPLIT; ++i)
    k[i] = _mm512_loadu_si512(tile.block[block + i / SPLIT] + (d + i % SPLIT) * 64);
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < SPLIT; ++i) {
      const __m512i x = _mm512_set1_epi32(query[r * pairs + d + i]);
      for (int b = i; b < BLOCKS * SPLIT; b += SPLIT) sum[r][b] = dot_pairs(sum[r][b], k[b], x);
    }
}

template <int ROWS, int BLOCKS, int SPLIT>
static INLINE void score_bf16_rows(const Queries& q, int row, const Tile& tile, int block,
                                   Ahead& ahead, float* s) {
  static_assert(BLOCKS == 1 || SPLIT == 1, "sums are of blocks, or of one block's steps");
  __m512 sum[ROWS][BLOCKS * SPLIT];
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < BLOCKS * SPLIT; ++i) sum[r][i] = _mm512_setzero_ps();
  const int pairs = q.dim / 2;
  const int32_t* query = (const int32_t*)(q.bf16 + (int64_t)row * q.dim);
  int d = 0;
  for (; d + SPLIT <= pairs; d += SPLIT) {
    score_bf16_steps<ROWS, BLOCKS, SPLIT>(query, pairs, tile, block, d, sum);
    for (int i = 0; i < SPLIT; ++i) ahead.step();
  }
  if (d < pairs) score_bf16_steps<ROWS, BLOCKS, 1>(query, pairs, tile, block, d, sum);
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BLOCKS; ++b) {
      for (int i = 1; i < SPLIT; ++i) sum[r][b] = _mm512_add_ps(sum[r][b], sum[r][i]);
      _mm512_storeu_ps(s + (row + r) * TILE + (block + b) * BLOCK,
                       _mm512_mul_ps(sum[r][b], _mm512_set1_ps(q.scale)));
    }
}

static void score_bf16(const Queries& q, const Tile& tile, float* s) {
#if defined(KVF_AMX)
  if (q.rows >= LEAST_AMX_ROWS) return score_amx(q, tile, s);
#endif
  in_shape(q.rows, tile.blocks, tile.streams, [&](auto shape) {
    using Shape = decltype(shape);
    Ahead ahead(tile, 32 * q.dim, q.dim / 2, shape.calls(q.rows, TILE_BLOCKS));
    shape.for_all(q.rows, tile.blocks, [&](auto rows, auto across, int row, int block) {
      score_bf16_rows<rows.value, across.value, Shape::split>(q, row, tile, block, ahead, s);
    });
  });
}

template <int ROWS, int CHUNKS, int SPLIT>
static INLINE void add_bf16_rows(int row, const int32_t* weights, const float* decay,
                                 const Tile& tile, int chunk, Ahead& ahead, float* o, int padded) {
  static_assert(CHUNKS == 1 || SPLIT == 1, "sums are of chunks, or of one chunk's steps");
  constexpr int SUMS = CHUNKS * SPLIT;
  __m512 sum[ROWS][SUMS];
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < SUMS; ++i)
      sum[r][i] =
          i >= CHUNKS
              ? _mm512_setzero_ps()
              : _mm512_mul_ps(_mm512_loadu_ps(o + (row + r) * (int64_t)padded + (chunk + i) * 16),
                              _mm512_set1_ps(decay[row + r]));
  for (int block = 0; block < tile.blocks; ++block) {
    const uint8_t* base = tile.block[block] + (int64_t)chunk * 512;
    for (int pair = 0; pair < 8; pair += SPLIT) {
      __m512i v[SUMS];
      for (int i = 0; i < SUMS; ++i)
        v[i] = _mm512_loadu_si512(base + i / SPLIT * 512 + (pair + i % SPLIT) * 64);
      for (int i = 0; i < SPLIT; ++i) ahead.step();
      const int32_t* p = weights + row * (TILE / 2) + block * 8 + pair;
      for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < SPLIT; ++i) {
          const __m512i x = _mm512_set1_epi32(p[r * (TILE / 2) + i]);
          for (int c = i; c < SUMS; c += SPLIT) sum[r][c] = dot_pairs(sum[r][c], v[c], x);
        }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int i = CHUNKS; i < SUMS; ++i) sum[r][0] = _mm512_add_ps(sum[r][0], sum[r][i]);
    for (int c = 0; c < CHUNKS; ++c)
      _mm512_storeu_ps(o + (row + r) * (int64_t)padded + (chunk + c) * 16, sum[r][c]);
  }
}

static void add_bf16(const Weights& w, const Tile& tile, float* o) {
  // The weights of a row, rounded, take the first half of its floats' place.
  uint16_t* weights = (uint16_t*)w.p;
  for (int r = 0; r < w.rows; ++r)
    for (int i = 0; i < tile.blocks; ++i) {
      const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(w.p + r * TILE + i * BLOCK));
      memcpy(weights + r * TILE + i * BLOCK, &half, sizeof half);
    }
#if defined(KVF_AMX)
  if (w.rows >= LEAST_AMX_ROWS) return add_amx(w, weights, tile, o);
#endif
  const int padded = round_up(tile.dim, 16), chunks = padded / 16;
  const int32_t* pairs = (const int32_t*)weights;
  in_shape(w.rows, chunks, tile.streams, [&](auto shape) {
    using Shape = decltype(shape);
    Ahead ahead(tile, 32 * padded, TILE / 2, shape.calls(w.rows, chunks));
    shape.for_all(w.rows, chunks, [&](auto rows, auto across, int row, int chunk) {
      add_bf16_rows<rows.value, across.value, Shape::split>(row, pairs, w.decay, tile, chunk, ahead,
                                                            o, padded);
    });
  });
}
#endif

struct Bf16 : InFloats<Bf16> {
  static constexpr const char* name = "bf16";
  static constexpr int code = KVF_BF16, bits = 16, step = 2, group = NO_SCALES, key_flip = 0;

  template <bool KEY>
  static INLINE void load(const uint8_t* p, F16x* x) {
    for (int i = 0; i < PARTS; ++i) {
      Ints u;
      memcpy(&u, p + i * sizeof u, sizeof u);
      x[0].v[i] = (Floats)(u << 16);
      x[1].v[i] = (Floats)(u & (int32_t)0xffff0000);
    }
  }

  static INLINE F16x numbers(const uint8_t* p) { return load_bf16((const uint16_t*)p); }

  static void encode(const float* x, int padded, uint8_t* row, uint16_t*) {
    for (int i = 0; i < padded; ++i) {
      const uint16_t h = to_bf16(x[i]);
      memcpy(row + 2 * i, &h, 2);
    }
  }

#if defined(__AVX512BF16__)
  // Queries that are bfloat16 themselves may have its instruction, which rounds queries and weights
  // to it; all others ask for more digits, and get floats.
  static KeyMath key_math(int queries) {
    if (queries == KVF_BF16) return {prepare_bf16, score_bf16};
    return InFloats<Bf16>::key_math(queries);
  }
  static ValueMath value_math(int queries) {
    if (queries == KVF_BF16) return {add_bf16};
    return InFloats<Bf16>::value_math(queries);
  }
#endif
};

}  // namespace
