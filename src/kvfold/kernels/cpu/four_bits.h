// Formats of four bits: one scale per group of 32 dimensions, which has the sign of the group's
// largest number, so that this gets the lowest level, F::top below zero, exactly or nearly.
//
// F has `top`; `level`, the numbers that codes stand for; `nearest`, the code of a number in units
// of its scale; with AVX512-VNNI also `signed_bytes`, the levels as bytes, and `unsigned_bytes`,
// the same with `offset` added.
#pragma once
#include "integer.h"

namespace KVF_NAMESPACE {

template <class F>
struct FourBits : InFloats<F> {
  static constexpr int bits = 4, step = 8, group = 32, key_flip = 0;

  template <bool KEY>
  static INLINE void load(const uint8_t* p, F16x* x) {
    for (int i = 0; i < PARTS; ++i) {
      Ints u;
      memcpy(&u, p + i * sizeof u, sizeof u);
      for (int j = 0; j < 8; ++j) x[j].v[i] = F::level((u >> (j % 4 * 8 + j / 4 * 4)) & 15);
    }
  }

  // Whether the first of a group's numbers that is as large as its largest is above zero.
  static INLINE bool is_positive(const float* x, float largest) {
    int above = 0, below = 0;  // how far it is from the end, most likely one alone
    for (int i = 0; i < group; ++i) {
      above = std::max(above, x[i] == largest ? group - i : 0);
      below = std::max(below, x[i] == -largest ? group - i : 0);
    }
    return largest > 0 && above > below;
  }

  static void encode(const float* x, int padded, uint8_t* row, uint16_t* scales) {
    for (int g = 0; g * group < padded; ++g) {
      const float* numbers = x + g * group;
      const float largest = largest_size(numbers, group);
      const uint16_t size = scale_above(largest / F::top);
      scales[g] = largest == largest && is_positive(numbers, largest) ? size | 0x8000 : size;
      const float scale = from_bf16(scales[g]);
      int32_t codes[group];
      for (int i = 0; i < group; ++i) codes[i] = F::nearest(numbers[i], scale);
      uint64_t pairs[group / 2];  // the second number of a pair is in the upper half
      memcpy(pairs, codes, sizeof pairs);
      for (int i = 0; i < group / 2; ++i)
        row[g * group / 2 + i] = (uint8_t)(pairs[i] | pairs[i] >> 28);
    }
  }

#if defined(__AVX512VNNI__)
  static KeyMath key_math(int) { return {prepare, score_integers<F>}; }
  static ValueMath value_math(int) { return {add}; }

  static void prepare(Queries& q) { prepare_integers(q, group, F::offset); }

  template <int ROWS, int BLOCKS>
  static INLINE void score_rows(const Queries& q, int row, const Tile& tile, int block, bool fetch,
                                float* s) {
    const int groups = q.dim / group;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 sum[ROWS][BLOCKS];
    for (int r = 0; r < ROWS; ++r)
      for (int b = 0; b < BLOCKS; ++b) sum[r][b] = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      __m512i high[ROWS][BLOCKS], low[ROWS][BLOCKS];
      for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BLOCKS; ++b) {
          high[r][b] = _mm512_set1_epi32(q.sums[((row + r) * groups + g) * 2]);
          low[r][b] = _mm512_set1_epi32(q.sums[((row + r) * groups + g) * 2 + 1]);
        }
      for (int d = g * group; d < (g + 1) * group; d += 8) {
        __m512i k[BLOCKS][2];
        for (int b = 0; b < BLOCKS; ++b) {
          const __m512i both = _mm512_loadu_si512(tile.block[block + b] + d * 8);
          if (fetch) prefetch(tile.next[block + b] + d * 8);
          k[b][0] = F::unsigned_bytes(_mm512_and_si512(both, nibble));
          k[b][1] = F::unsigned_bytes(_mm512_and_si512(_mm512_srli_epi16(both, 4), nibble));
        }
        for (int half = 0; half < 2; ++half)
          for (int r = 0; r < ROWS; ++r) {
            const int64_t at = (int64_t)(row + r) * q.dim + d + 4 * half;
            const __m512i h = dword(q.high + at), l = dword(q.low + at);
            for (int b = 0; b < BLOCKS; ++b) {
              high[r][b] = dot_quads(high[r][b], k[b][half], h);
              low[r][b] = dot_quads(low[r][b], k[b][half], l);
            }
          }
      }
      for (int b = 0; b < BLOCKS; ++b) {
        const __m512 scale = scales16(tile.scales[block + b] + g * BLOCK);
        for (int r = 0; r < ROWS; ++r)
          sum[r][b] = _mm512_fmadd_ps(joined(high[r][b], low[r][b]), scale, sum[r][b]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int b = 0; b < BLOCKS; ++b)
        _mm512_storeu_ps(s + (row + r) * TILE + (block + b) * BLOCK,
                         _mm512_mul_ps(sum[r][b], _mm512_set1_ps(q.unit[row + r])));
  }

  // A tile's values as signed bytes, four tokens of a chunk at a time. A scale's sign (the format gives
  // the code -8 to the largest number, whatever its sign) moves to them: those of such tokens are
  // negated.
  struct AsStored {
    const Tile& tile;
    int chunk;
    bool fetch;
    alignas(16) int32_t signs[4] = {};

    INLINE void begin(int block) {
      const __m256i scales =
          _mm256_loadu_si256((const __m256i*)(tile.scales[block] + chunk / 2 * BLOCK));
      // 16 bytes, all ones where the token's scale is negative
      _mm_store_si128((__m128i*)signs, _mm256_cvtepi16_epi8(_mm256_srai_epi16(scales, 15)));
    }

    INLINE __m512i quad(int block, int i, int c) const {
      const int64_t at = (int64_t)(chunk + c) * 128 + i / 2 * 64;
      __m512i both = _mm512_loadu_si512(tile.block[block] + at);
      if (fetch && i % 2 == 0) prefetch(tile.next[block] + at);
      if (i % 2) both = _mm512_srli_epi16(both, 4);
      const __m512i sign = _mm512_set1_epi32(signs[i]);
      const __m512i x = F::signed_bytes(_mm512_and_si512(both, _mm512_set1_epi8(15)));
      return _mm512_sub_epi8(_mm512_xor_si512(x, sign), sign);
    }
  };

  // Those of a group's two chunks, unpacked once for many rows.
  struct Unpacked {
    const __m512i (*quads)[4][2];
    int first;

    INLINE void begin(int) {}
    INLINE __m512i quad(int block, int i, int c) const { return quads[block][i][first + c]; }
  };

  static INLINE void unpack(AsStored values, __m512i (*to)[4][2]) {
    for (int block = 0; block < values.tile.blocks; ++block) {
      values.begin(block);
      for (int i = 0; i < 4; ++i)
        for (int c = 0; c < 2; ++c) to[block][i][c] = values.quad(block, i, c);
    }
  }

  // o += weights times the values of chunks.
  template <int ROWS, int CHUNKS, int PLANES, class Values>
  static INLINE void add_rows(const Planes& planes, const float* decay, int blocks, Values values,
                              float* o, int padded) {
    __m512i high[ROWS][CHUNKS], low[ROWS][CHUNKS];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < CHUNKS; ++c) high[r][c] = low[r][c] = _mm512_setzero_si512();
    for (int block = 0; block < blocks; ++block) {
      values.begin(block);
      for (int i = 0; i < 4; ++i) {
        __m512i v[CHUNKS];
        for (int c = 0; c < CHUNKS; ++c) v[c] = values.quad(block, i, c);
        for (int r = 0; r < ROWS; ++r) {
          const __m512i l = dword(planes.low[r] + block * BLOCK + i * 4);
          for (int c = 0; c < CHUNKS; ++c) low[r][c] = dot_quads(low[r][c], l, v[c]);
          if constexpr (PLANES > 1) {
            const __m512i h = dword(planes.high[r] + block * BLOCK + i * 4);
            for (int c = 0; c < CHUNKS; ++c) high[r][c] = dot_quads(high[r][c], h, v[c]);
          }
        }
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < CHUNKS; ++c)
        add_sums<PLANES>(o + r * (int64_t)padded + c * 16, decay[r], planes.unit[r], high[r][c],
                         low[r][c]);
  }

  // A group of 32 dimensions is two chunks: values(0) gives both, values(1) the second.
  template <int ROWS, class Values>
  static INLINE void add_group(int row, const Weights& w, bool flat, const Tile& tile, int g,
                               Values values, float* o, int padded) {
    Planes planes;
    const float *p = w.p + row * TILE, *decay = w.decay + row, *top = w.top + row;
    const int blocks = tile.blocks;
    float* to = o + row * (int64_t)padded + g * group;
    if (flat) {
      round_weights(ROWS, p, top, tile, g, planes);
      return add_rows<ROWS, 2, 1>(planes, decay, blocks, values(0), to, padded);
    }
    split_weights(ROWS, p, top, tile, g, planes);
    if constexpr (ROWS <= 4) {
      add_rows<ROWS, 2, 2>(planes, decay, blocks, values(0), to, padded);
    } else {
      add_rows<ROWS, 1, 2>(planes, decay, blocks, values(0), to, padded);
      add_rows<ROWS, 1, 2>(planes, decay, blocks, values(1), to + 16, padded);
    }
  }

  static void add(const Weights& w, const Tile& tile, float* o) {
    const int padded = round_up(tile.dim, group);
    const bool flat = is_flat(w), fetch = tile.next[0] != nullptr;
    if (flat) normalize_weights(w, tile.blocks);
    if (w.rows <= 8)
      return with_number<8>(w.rows, [&](auto n) {
        for (int g = 0; g * group < padded; ++g)
          add_group<n.value>(
              0, w, flat, tile, g, [&](int c) { return AsStored{tile, 2 * g + c, fetch}; }, o,
              padded);
      });
    __m512i quads[TILE_BLOCKS][4][2];
    for (int g = 0; g * group < padded; ++g) {
      unpack(AsStored{tile, 2 * g, fetch}, quads);
      for_rows<8>(w.rows, [&](auto n, int row) {
        add_group<n.value>(
            row, w, flat, tile, g, [&](int c) { return Unpacked{quads, c}; }, o, padded);
      });
    }
  }
#endif
};

}  // namespace
