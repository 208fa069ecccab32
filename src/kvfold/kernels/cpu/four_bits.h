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

  // A group of 32 dimensions is two chunks. A scale's sign (the format gives the code -8 to the
  // largest number, whatever its sign) moves to the values: codes of such tokens are negated.
  template <int ROWS, int CHUNKS, int PLANES>
  static INLINE void add_rows(int row, const Planes& planes, const float* decay, const Tile& tile,
                              int chunk, bool fetch, float* o, int padded) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i high[ROWS][CHUNKS], low[ROWS][CHUNKS];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < CHUNKS; ++c) high[r][c] = low[r][c] = _mm512_setzero_si512();
    for (int block = 0; block < tile.blocks; ++block) {
      const uint8_t* base = tile.block[block] + chunk * 128;
      const __m256i scales =
          _mm256_loadu_si256((const __m256i*)(tile.scales[block] + chunk / 2 * BLOCK));
      // 16 bytes, all ones where the token's scale is negative
      const __m128i negative = _mm256_cvtepi16_epi8(_mm256_srai_epi16(scales, 15));
      alignas(16) int32_t signs[4];
      _mm_store_si128((__m128i*)signs, negative);
      for (int eighth = 0; eighth < 2; ++eighth)
        for (int half = 0; half < 2; ++half) {
          const int quad = eighth * 2 + half;
          const __m512i sign = _mm512_set1_epi32(signs[quad]);
          __m512i v[CHUNKS];
          for (int c = 0; c < CHUNKS; ++c) {
            __m512i both = _mm512_loadu_si512(base + c * 128 + eighth * 64);
            if (fetch && half == 0) prefetch(tile.next[block] + (chunk + c) * 128 + eighth * 64);
            if (half) both = _mm512_srli_epi16(both, 4);
            const __m512i codes = F::signed_bytes(_mm512_and_si512(both, nibble));
            v[c] = _mm512_sub_epi8(_mm512_xor_si512(codes, sign), sign);
          }
          for (int r = 0; r < ROWS; ++r) {
            const __m512i l = dword(planes.low[r] + block * BLOCK + quad * 4);
            for (int c = 0; c < CHUNKS; ++c) low[r][c] = dot_quads(low[r][c], l, v[c]);
            if constexpr (PLANES > 1) {
              const __m512i h = dword(planes.high[r] + block * BLOCK + quad * 4);
              for (int c = 0; c < CHUNKS; ++c) high[r][c] = dot_quads(high[r][c], h, v[c]);
            }
          }
        }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < CHUNKS; ++c)
        add_sums<PLANES>(o + (row + r) * (int64_t)padded + (chunk + c) * 16, decay[row + r],
                         planes.unit[r], high[r][c], low[r][c]);
  }

  template <int ROWS>
  static INLINE void add_group(int row, const float* p, const float* tops, bool flat,
                               const float* decay, const Tile& tile, int group, bool fetch,
                               float* o, int padded) {
    Planes planes;
    const int chunk = group * 2;
    if (flat) {
      round_weights(ROWS, p, tops, tile, group, planes);
      add_rows<ROWS, 2, 1>(row, planes, decay, tile, chunk, fetch, o, padded);
      return;
    }
    split_weights(ROWS, p, tops, tile, group, planes);
    if constexpr (ROWS <= 4) {
      add_rows<ROWS, 2, 2>(row, planes, decay, tile, chunk, fetch, o, padded);
    } else {
      add_rows<ROWS, 1, 2>(row, planes, decay, tile, chunk, fetch, o, padded);
      add_rows<ROWS, 1, 2>(row, planes, decay, tile, chunk + 1, fetch, o, padded);
    }
  }

  static void add(const Weights& w, const Tile& tile, float* o) {
    const int rows = w.rows;
    float* p = w.p;
    const float* decay = w.decay;
    const int padded = round_up(tile.dim, group);
    for_rows<8>(rows, [&](auto n, int row) {
      constexpr int ROWS = decltype(n)::value;
      float tops[ROWS];
      float* weights = p + row * TILE;
      largest_weights(ROWS, weights, tile.blocks, tops);
      const bool flat = is_flat(ROWS, weights, tops, tile.blocks);
      if (flat) normalize_weights(ROWS, weights, tops, tile.blocks);
      for (int g = 0; g * group < padded; ++g)
        add_group<ROWS>(row, weights, tops, flat, decay, tile, g, tile.next[0] && row == 0, o,
                        padded);
    });
  }
#endif
};

}  // namespace
