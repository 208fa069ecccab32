// Whole numbers within 127, one scale per row. Keys in packed blocks are unsigned, offset by 128.
#pragma once
#include "../integer.h"

namespace KVF_NAMESPACE {

struct Int8 : InFloats<Int8> {
  static constexpr const char* name = "int8";
  static constexpr int code = 4, bits = 8, step = 4, group = WHOLE_ROW, key_flip = 0x80;

  template <bool KEY>
  static INLINE void load(const uint8_t* p, F16x* x) {
    for (int i = 0; i < PARTS; ++i) {
      Ints u;
      memcpy(&u, p + i * sizeof u, sizeof u);
      if (KEY) u ^= (int32_t)0x80808080;
      for (int j = 0; j < 4; ++j)
        x[j].v[i] = __builtin_convertvector((u << (24 - 8 * j)) >> 24, Floats);
    }
  }

  static INLINE F16x numbers(const uint8_t* p) {
    F16x x;
    for (int i = 0; i < PARTS; ++i)
      x.v[i] = __builtin_convertvector(load_signed(p + i * WIDTH), Floats);
    return x;
  }

  static void encode(const float* x, int padded, uint8_t* row, uint16_t* scales) {
    encode_whole(x, padded, 127.f, row, scales, [](float number, float scale) {
      return (uint8_t)code_of(number, scale, -127, 127);
    });
  }

#if defined(__AVX512VNNI__)
  static KeyMath key_math(int) { return {prepare, score_integers<Int8>}; }
  static ValueMath value_math(int) { return {add}; }

  static void prepare(Queries& q) { prepare_integers(q, q.dim, 128); }

  template <int ROWS, int BLOCKS>
  static INLINE void score_rows(const Queries& q, int row, const Tile& tile, int block, bool fetch,
                                float* s) {
    __m512i high[ROWS][BLOCKS], low[ROWS][BLOCKS];
    for (int r = 0; r < ROWS; ++r)
      for (int b = 0; b < BLOCKS; ++b) {
        high[r][b] = _mm512_set1_epi32(q.sums[(row + r) * 2]);
        low[r][b] = _mm512_set1_epi32(q.sums[(row + r) * 2 + 1]);
      }
    for (int d = 0; d < q.dim; d += 4) {
      __m512i k[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b) k[b] = _mm512_loadu_si512(tile.block[block + b] + d * 16);
      if (fetch)
        for (int b = 0; b < BLOCKS; ++b) prefetch(tile.next[block + b] + d * 16);
      for (int r = 0; r < ROWS; ++r) {
        const int64_t at = (int64_t)(row + r) * q.dim + d;
        const __m512i h = dword(q.high + at), l = dword(q.low + at);
        for (int b = 0; b < BLOCKS; ++b) {
          high[r][b] = dot_quads(high[r][b], k[b], h);
          low[r][b] = dot_quads(low[r][b], k[b], l);
        }
      }
    }
    for (int b = 0; b < BLOCKS; ++b) {
      const __m512 scale = scales16(tile.scales[block + b]);
      for (int r = 0; r < ROWS; ++r)
        _mm512_storeu_ps(s + (row + r) * TILE + (block + b) * BLOCK,
                         _mm512_mul_ps(joined(high[r][b], low[r][b]),
                                       _mm512_mul_ps(scale, _mm512_set1_ps(q.unit[row + r]))));
    }
  }

  template <int ROWS, int CHUNKS>
  static INLINE void add_rows(int row, const Planes& planes, const float* decay, const Tile& tile,
                              int chunk, bool fetch, float* o, int padded) {
    __m512i high[ROWS][CHUNKS], low[ROWS][CHUNKS];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < CHUNKS; ++c) high[r][c] = low[r][c] = _mm512_setzero_si512();
    for (int block = 0; block < tile.blocks; ++block) {
      const uint8_t* base = tile.block[block] + chunk * 256;
      for (int quad = 0; quad < 4; ++quad) {
        __m512i v[CHUNKS];
        for (int c = 0; c < CHUNKS; ++c) v[c] = _mm512_loadu_si512(base + c * 256 + quad * 64);
        if (fetch)
          for (int c = 0; c < CHUNKS; ++c)
            prefetch(tile.next[block] + (chunk + c) * 256 + quad * 64);
        for (int r = 0; r < ROWS; ++r) {
          const __m512i h = dword(planes.high[r] + block * BLOCK + quad * 4);
          const __m512i l = dword(planes.low[r] + block * BLOCK + quad * 4);
          for (int c = 0; c < CHUNKS; ++c) {
            high[r][c] = dot_quads(high[r][c], h, v[c]);
            low[r][c] = dot_quads(low[r][c], l, v[c]);
          }
        }
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < CHUNKS; ++c) {
        add_sums<2>(o + (row + r) * (int64_t)padded + (chunk + c) * 16, decay[row + r],
                    planes.unit[r], high[r][c], low[r][c]);
      }
  }

  static void add(const Weights& w, const Tile& tile, float* o) {
    const int rows = w.rows;
    float* p = w.p;
    const float* decay = w.decay;
    const int padded = round_up(tile.dim, 16), chunks = padded / 16;
    for_rows<4>(rows, [&](auto n, int row) {
      constexpr int ROWS = decltype(n)::value;
      Planes planes;
      split_weights(ROWS, p + row * TILE, w.top + row, tile, 0, planes);
      const bool fetch = tile.next[0] && row == 0;
      int chunk = 0;
      if (in_order<Int8>(rows, tile))
        for (; chunk < chunks; ++chunk)
          add_rows<ROWS, 1>(row, planes, decay, tile, chunk, fetch, o, padded);
      for (; chunk + 2 <= chunks; chunk += 2)
        add_rows<ROWS, 2>(row, planes, decay, tile, chunk, fetch, o, padded);
      if (chunk < chunks) add_rows<ROWS, 1>(row, planes, decay, tile, chunk, fetch, o, padded);
    });
  }
#endif
};

}  // namespace
