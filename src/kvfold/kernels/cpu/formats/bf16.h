// bfloat16, as it is.
#pragma once
#include "../generic.h"

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

template <int ROWS, int BLOCKS>
static INLINE void score_bf16_rows(const Queries& q, int row, const Tile& tile, int block,
                                   bool fetch, float* s) {
  __m512 sum[ROWS][BLOCKS];
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BLOCKS; ++b) sum[r][b] = _mm512_setzero_ps();
  const int pairs = q.dim / 2;
  const int32_t* query = (const int32_t*)(q.bf16 + (int64_t)row * q.dim);
  for (int d = 0; d < pairs; ++d) {
    __m512i k[BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) k[b] = _mm512_loadu_si512(tile.block[block + b] + d * 64);
    if (fetch)
      for (int b = 0; b < BLOCKS; ++b) prefetch(tile.next[block + b] + d * 64);
    for (int r = 0; r < ROWS; ++r) {
      const __m512i x = _mm512_set1_epi32(query[r * pairs + d]);
      for (int b = 0; b < BLOCKS; ++b) sum[r][b] = dot_pairs(sum[r][b], k[b], x);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BLOCKS; ++b)
      _mm512_storeu_ps(s + (row + r) * TILE + (block + b) * BLOCK,
                       _mm512_mul_ps(sum[r][b], _mm512_set1_ps(q.scale)));
}

static void score_bf16(const Queries& q, const Tile& tile, float* s) {
  const bool fetch = tile.next[0] && tile.blocks == TILE_BLOCKS;
  int block = 0;
  if (q.rows <= 6)
    for (; block + 4 <= tile.blocks; block += 4)
      for_rows<6>(q.rows, [&](auto n, int row) {
        score_bf16_rows<decltype(n)::value, 4>(q, row, tile, block, fetch && row == 0, s);
      });
  for (; block + 2 <= tile.blocks; block += 2)
    for_rows<8>(q.rows, [&](auto n, int row) {
      score_bf16_rows<decltype(n)::value, 2>(q, row, tile, block, fetch && row == 0, s);
    });
  if (block < tile.blocks)
    for_rows<8>(q.rows, [&](auto n, int row) {
      score_bf16_rows<decltype(n)::value, 1>(q, row, tile, block, false, s);
    });
}

template <int ROWS, int CHUNKS>
static INLINE void add_bf16_rows(int row, const int32_t* weights, const float* decay,
                                 const Tile& tile, int chunk, bool fetch, float* o, int padded) {
  __m512 sum[ROWS][CHUNKS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHUNKS; ++c)
      sum[r][c] = _mm512_mul_ps(_mm512_loadu_ps(o + (row + r) * (int64_t)padded + (chunk + c) * 16),
                                _mm512_set1_ps(decay[row + r]));
  for (int block = 0; block < tile.blocks; ++block) {
    const uint8_t* base = tile.block[block] + (int64_t)chunk * 512;
    const uint8_t* next = fetch ? tile.next[block] + (int64_t)chunk * 512 : nullptr;
    for (int pair = 0; pair < 8; ++pair) {
      __m512i v[CHUNKS];
      for (int c = 0; c < CHUNKS; ++c) v[c] = _mm512_loadu_si512(base + c * 512 + pair * 64);
      if (fetch)
        for (int c = 0; c < CHUNKS; ++c) prefetch(next + c * 512 + pair * 64);
      for (int r = 0; r < ROWS; ++r) {
        const __m512i p = _mm512_set1_epi32(weights[(row + r) * (TILE / 2) + block * 8 + pair]);
        for (int c = 0; c < CHUNKS; ++c) sum[r][c] = dot_pairs(sum[r][c], v[c], p);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHUNKS; ++c)
      _mm512_storeu_ps(o + (row + r) * (int64_t)padded + (chunk + c) * 16, sum[r][c]);
}

static void add_bf16(int rows, float* p, const float* decay, const Tile& tile, float* o) {
  // The weights of a row, rounded, take the first half of its floats' place.
  uint16_t* weights = (uint16_t*)p;
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < tile.blocks; ++i) {
      const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(p + r * TILE + i * BLOCK));
      memcpy(weights + r * TILE + i * BLOCK, &half, sizeof half);
    }
  const int padded = round_up(tile.dim, 16), chunks = padded / 16;
  const bool fetch = tile.next[0] && tile.blocks == TILE_BLOCKS;
  const int32_t* pairs = (const int32_t*)weights;
  // As many sums as registers hold: 8 rows of 2 chunks, or 6 of 4.
  int chunk = 0;
  if (rows % 8 == 0 || rows % 8 == 7)
    for (; chunk + 2 <= chunks; chunk += 2)
      for_rows<8>(rows, [&](auto n, int row) {
        add_bf16_rows<decltype(n)::value, 2>(row, pairs, decay, tile, chunk, fetch && row == 0, o,
                                             padded);
      });
  for (; chunk + 4 <= chunks; chunk += 4)
    for_rows<6>(rows, [&](auto n, int row) {
      add_bf16_rows<decltype(n)::value, 4>(row, pairs, decay, tile, chunk, fetch && row == 0, o,
                                           padded);
    });
  for (; chunk < chunks; ++chunk)
    for_rows<8>(rows, [&](auto n, int row) {
      add_bf16_rows<decltype(n)::value, 1>(row, pairs, decay, tile, chunk, fetch && row == 0, o,
                                           padded);
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
