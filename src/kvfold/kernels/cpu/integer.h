// INT8 and INT4 with AVX512-VNNI, which multiplies unsigned by signed bytes, four at a time.
//
// Queries and weights become 16-bit integers, split into two planes of bytes (256 high + low), so
// that what rounding them adds, 2^-16 of the largest, is nothing beside what the cache has lost.
// Weights of INT4 values need one plane where none of them stands out.
// Keys are unsigned (offset by 128 or 8); the offset's share is taken off in advance.
#pragma once
#include "generic.h"

#if defined(__AVX512VNNI__)
namespace KVF_NAMESPACE {

// Call f(i, which lanes) for sixteen numbers at a time.
template <class Function>
static INLINE void for_vectors(int first, int end, Function f) {
  for (int i = first; i < end; i += 16)
    f(i, end - i < 16 ? (__mmask16)((1u << (end - i)) - 1) : (__mmask16)0xffff);
}

static void prepare_integers(Queries& q, int group, int offset) {
  const int groups = q.dim / group;
  for (int r = 0; r < q.rows; ++r) {
    const float* x = q.x + (int64_t)r * q.dim;
    __m512 top = _mm512_setzero_ps();
    bool finite = true;
    for_vectors(0, q.dim, [&](int i, __mmask16 some) {
      const __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(some, x + i));
      finite = finite && _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ) == 0;
      top = _mm512_max_ps(top, size);
    });
    const float unit =
        _mm512_reduce_max_ps(top) / 32512.f;  // 127 * 256, so that the high plane fits
    q.unit[r] = finite ? unit * q.scale : NAN;
    const __m512 inverse = _mm512_set1_ps(finite && unit > 0 ? 1 / unit : 0);
    for (int g = 0; g < groups; ++g) {
      __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
      for_vectors(g * group, (g + 1) * group, [&](int i, __mmask16 some) {
        const __m512i n =
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + i), inverse));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
        const __m512i low = _mm512_sub_epi32(n, _mm512_slli_epi32(high, 8));
        _mm512_mask_cvtepi32_storeu_epi8(q.high + (int64_t)r * q.dim + i, some, high);
        _mm512_mask_cvtepi32_storeu_epi8(q.low + (int64_t)r * q.dim + i, some, low);
        high_sum = _mm512_add_epi32(high_sum, high);
        low_sum = _mm512_add_epi32(low_sum, low);
      });
      q.sums[(r * groups + g) * 2] = -offset * _mm512_reduce_add_epi32(high_sum);
      q.sums[(r * groups + g) * 2 + 1] = -offset * _mm512_reduce_add_epi32(low_sum);
    }
  }
}

static void prepare_int8(Queries& q) { prepare_integers(q, q.dim, 128); }
static void prepare_int4(Queries& q) { prepare_integers(q, GROUP, 8); }

static INLINE __m512i dword(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

static INLINE __m512 joined(__m512i high, __m512i low) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.f), _mm512_cvtepi32_ps(low));
}

static INLINE __m512 scales16(const uint16_t* p) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)),
                                   16);
}

template <int ROWS, int BLOCKS>
static INLINE void score_int8_rows(const Queries& q, int row, const Tile& tile, int block,
                                   bool fetch, float* s) {
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
        high[r][b] = _mm512_dpbusd_epi32(high[r][b], k[b], h);
        low[r][b] = _mm512_dpbusd_epi32(low[r][b], k[b], l);
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

template <int ROWS, int BLOCKS>
static INLINE void score_int4_rows(const Queries& q, int row, const Tile& tile, int block,
                                   bool fetch, float* s) {
  const int groups = q.dim / GROUP;
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
    for (int d = g * GROUP; d < (g + 1) * GROUP; d += 8) {
      __m512i k[BLOCKS][2];
      for (int b = 0; b < BLOCKS; ++b) {
        const __m512i both = _mm512_loadu_si512(tile.block[block + b] + d * 8);
        if (fetch) prefetch(tile.next[block + b] + d * 8);
        k[b][0] = _mm512_and_si512(both, nibble);
        k[b][1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
      }
      for (int half = 0; half < 2; ++half)
        for (int r = 0; r < ROWS; ++r) {
          const int64_t at = (int64_t)(row + r) * q.dim + d + 4 * half;
          const __m512i h = dword(q.high + at), l = dword(q.low + at);
          for (int b = 0; b < BLOCKS; ++b) {
            high[r][b] = _mm512_dpbusd_epi32(high[r][b], k[b][half], h);
            low[r][b] = _mm512_dpbusd_epi32(low[r][b], k[b][half], l);
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

#define KVF_SCORE(name, rows_function)                                                   \
  static void name(const Queries& q, const Tile& tile, float* s) {                       \
    const bool fetch = tile.next[0] != nullptr;                                          \
    int block = 0;                                                                       \
    for (; block + 2 <= tile.blocks; block += 2)                                         \
      for_rows<4>(q.rows, [&](auto n, int row) {                                         \
        rows_function<decltype(n)::value, 2>(q, row, tile, block, fetch && row == 0, s); \
      });                                                                                \
    if (block < tile.blocks)                                                             \
      for_rows<4>(q.rows, [&](auto n, int row) {                                         \
        rows_function<decltype(n)::value, 1>(q, row, tile, block, false, s);             \
      });                                                                                \
  }
KVF_SCORE(score_int8, score_int8_rows)
KVF_SCORE(score_int4, score_int4_rows)
#undef KVF_SCORE

// The low bytes of 64 numbers below 256. Packing works within lanes of four; the last step mends
// the order.
static INLINE __m512i bytes_of_tile(const __m512i* n) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(
      order, _mm512_packus_epi16(_mm512_packus_epi32(n[0], n[1]), _mm512_packus_epi32(n[2], n[3])));
}

// Weights of up to eight rows as two planes of unsigned bytes.
struct Planes {
  uint8_t high[8][TILE], low[8][TILE];
  float unit[8];
};

// The largest weight of each row, and the largest scale of a tile's group.
static INLINE void largest_weights(int rows, const float* p, int blocks, float* tops) {
  for (int r = 0; r < rows; ++r) {
    __m512 top = _mm512_loadu_ps(p + r * TILE);
    for (int b = 1; b < blocks; ++b)
      top = _mm512_max_ps(top, _mm512_loadu_ps(p + r * TILE + b * BLOCK));
    tops[r] = _mm512_reduce_max_ps(top);
  }
}

static INLINE float largest_scale(const Tile& tile, int group) {
  __m512 top = _mm512_setzero_ps();
  for (int b = 0; b < tile.blocks; ++b)
    top = _mm512_max_ps(top, _mm512_abs_ps(scales16(tile.scales[b] + group * BLOCK)));
  return _mm512_reduce_max_ps(top);
}

// Weights times scales as integers up to 255 * 256, in units of what cannot be exceeded.
// INT4's scales may be negative; add_int4_rows gives their sign to the values.
static INLINE void split_weights(int rows, const float* p, const float* tops, const Tile& tile,
                                 int group, Planes& planes) {
  const float scale_top = largest_scale(tile, group);
  __m512 scales[TILE_BLOCKS];
  for (int b = 0; b < tile.blocks; ++b)
    scales[b] = _mm512_abs_ps(scales16(tile.scales[b] + group * BLOCK));
  for (int r = 0; r < rows; ++r) {
    const float top = tops[r] * scale_top;
    planes.unit[r] = top * (1 / 65280.f);
    const __m512 inverse = _mm512_set1_ps(top > 0 ? 65280.f / top : 0);
    for (int b = 0; b < tile.blocks; ++b) {
      const __m512 w = _mm512_mul_ps(_mm512_loadu_ps(p + r * TILE + b * BLOCK), scales[b]);
      const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(w, inverse));
      _mm_storeu_si128((__m128i*)(planes.high[r] + b * BLOCK),
                       _mm512_cvtepi32_epi8(_mm512_srli_epi32(n, 8)));
      _mm_storeu_si128((__m128i*)(planes.low[r] + b * BLOCK), _mm512_cvtepi32_epi8(n));
    }
  }
}

// o = decay o + unit (256 high + low), 16 numbers; one plane is low alone.
template <int PLANES>
static INLINE void add_sums(float* o, float decay, float unit, __m512i high, __m512i low) {
  const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(o), _mm512_set1_ps(decay));
  const __m512 sum = PLANES > 1 ? joined(high, low) : _mm512_cvtepi32_ps(low);
  _mm512_storeu_ps(o, _mm512_fmadd_ps(sum, _mm512_set1_ps(unit), old));
}

template <int ROWS, int CHUNKS>
static INLINE void add_int8_rows(int row, const Planes& planes, const float* decay,
                                 const Tile& tile, int chunk, bool fetch, float* o, int padded) {
  __m512i high[ROWS][CHUNKS], low[ROWS][CHUNKS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHUNKS; ++c) high[r][c] = low[r][c] = _mm512_setzero_si512();
  for (int block = 0; block < tile.blocks; ++block) {
    const uint8_t* base = tile.block[block] + chunk * 256;
    for (int quad = 0; quad < 4; ++quad) {
      __m512i v[CHUNKS];
      for (int c = 0; c < CHUNKS; ++c) v[c] = _mm512_loadu_si512(base + c * 256 + quad * 64);
      if (fetch)
        for (int c = 0; c < CHUNKS; ++c) prefetch(tile.next[block] + (chunk + c) * 256 + quad * 64);
      for (int r = 0; r < ROWS; ++r) {
        const __m512i h = dword(planes.high[r] + block * BLOCK + quad * 4);
        const __m512i l = dword(planes.low[r] + block * BLOCK + quad * 4);
        for (int c = 0; c < CHUNKS; ++c) {
          high[r][c] = _mm512_dpbusd_epi32(high[r][c], h, v[c]);
          low[r][c] = _mm512_dpbusd_epi32(low[r][c], l, v[c]);
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

static void add_int8(int rows, float* p, const float* decay, const Tile& tile, float* o) {
  const int padded = value_dim(KVF_INT8, tile.dim), chunks = padded / 16;
  for_rows<4>(rows, [&](auto n, int row) {
    constexpr int ROWS = decltype(n)::value;
    Planes planes;
    float tops[ROWS];
    largest_weights(ROWS, p + row * TILE, tile.blocks, tops);
    split_weights(ROWS, p + row * TILE, tops, tile, 0, planes);
    const bool fetch = tile.next[0] && row == 0;
    int chunk = 0;
    for (; chunk + 2 <= chunks; chunk += 2)
      add_int8_rows<ROWS, 2>(row, planes, decay, tile, chunk, fetch, o, padded);
    if (chunk < chunks) add_int8_rows<ROWS, 1>(row, planes, decay, tile, chunk, fetch, o, padded);
  });
}

// Weights of one plane need no more than their bytes where no weight stands out: at most FLAT times
// the mean, they are off by at most FLAT / 510 of it. That is below what four bits did to values.
constexpr float FLAT = 16;

static INLINE bool is_flat(int rows, const float* p, const float* tops, int blocks) {
  for (int r = 0; r < rows; ++r) {
    __m512 sum = _mm512_loadu_ps(p + r * TILE);
    for (int b = 1; b < blocks; ++b)
      sum = _mm512_add_ps(sum, _mm512_loadu_ps(p + r * TILE + b * BLOCK));
    if (!(tops[r] * (blocks * BLOCK) <= FLAT * _mm512_reduce_add_ps(sum))) return false;
  }
  return true;
}

// Weights become shares of 255 of their row's largest.
static INLINE void normalize_weights(int rows, float* p, const float* tops, int blocks) {
  for (int r = 0; r < rows; ++r) {
    const __m512 inverse = _mm512_set1_ps(tops[r] > 0 ? 255.f / tops[r] : 0);
    for (int b = 0; b < blocks; ++b) {
      float* x = p + r * TILE + b * BLOCK;
      _mm512_storeu_ps(x, _mm512_mul_ps(_mm512_loadu_ps(x), inverse));
    }
  }
}

// Normalized weights times scales, in one plane.
static INLINE void round_weights(int rows, const float* p, const float* tops, const Tile& tile,
                                 int group, Planes& planes) {
  const float scale_top = largest_scale(tile, group);
  const __m512 inverse = _mm512_set1_ps(scale_top > 0 ? 1 / scale_top : 0);
  __m512 scales[TILE_BLOCKS];
  for (int b = 0; b < tile.blocks; ++b)
    scales[b] = _mm512_mul_ps(_mm512_abs_ps(scales16(tile.scales[b] + group * BLOCK)), inverse);
  for (int r = 0; r < rows; ++r) {
    planes.unit[r] = tops[r] * scale_top * (1 / 255.f);
    __m512i n[TILE_BLOCKS];
    for (int b = 0; b < TILE_BLOCKS; ++b)
      n[b] = b < tile.blocks ? _mm512_cvtps_epi32(_mm512_mul_ps(
                                   _mm512_loadu_ps(p + r * TILE + b * BLOCK), scales[b]))
                             : _mm512_setzero_si512();
    _mm512_storeu_si512(planes.low[r], bytes_of_tile(n));
  }
}

// A group of 32 dimensions is two chunks. A scale's sign (the format gives the code -8 to the
// largest number, whatever its sign) moves to the values: codes of such tokens are negated.
template <int ROWS, int CHUNKS, int PLANES>
static INLINE void add_int4_rows(int row, const Planes& planes, const float* decay,
                                 const Tile& tile, int chunk, bool fetch, float* o, int padded) {
  const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
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
          const __m512i codes = _mm512_sub_epi8(_mm512_and_si512(both, nibble), eight);
          v[c] = _mm512_sub_epi8(_mm512_xor_si512(codes, sign), sign);
        }
        for (int r = 0; r < ROWS; ++r) {
          const __m512i l = dword(planes.low[r] + block * BLOCK + quad * 4);
          for (int c = 0; c < CHUNKS; ++c) low[r][c] = _mm512_dpbusd_epi32(low[r][c], l, v[c]);
          if constexpr (PLANES > 1) {
            const __m512i h = dword(planes.high[r] + block * BLOCK + quad * 4);
            for (int c = 0; c < CHUNKS; ++c) high[r][c] = _mm512_dpbusd_epi32(high[r][c], h, v[c]);
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
static INLINE void add_int4_group(int row, const float* p, const float* tops, bool flat,
                                  const float* decay, const Tile& tile, int group, bool fetch,
                                  float* o, int padded) {
  Planes planes;
  const int chunk = group * 2;
  if (flat) {
    round_weights(ROWS, p, tops, tile, group, planes);
    add_int4_rows<ROWS, 2, 1>(row, planes, decay, tile, chunk, fetch, o, padded);
    return;
  }
  split_weights(ROWS, p, tops, tile, group, planes);
  if constexpr (ROWS <= 4) {
    add_int4_rows<ROWS, 2, 2>(row, planes, decay, tile, chunk, fetch, o, padded);
  } else {
    add_int4_rows<ROWS, 1, 2>(row, planes, decay, tile, chunk, fetch, o, padded);
    add_int4_rows<ROWS, 1, 2>(row, planes, decay, tile, chunk + 1, fetch, o, padded);
  }
}

static void add_int4(int rows, float* p, const float* decay, const Tile& tile, float* o) {
  const int padded = value_dim(KVF_INT4, tile.dim);
  for_rows<8>(rows, [&](auto n, int row) {
    constexpr int ROWS = decltype(n)::value;
    float tops[ROWS];
    float* weights = p + row * TILE;
    largest_weights(ROWS, weights, tile.blocks, tops);
    const bool flat = is_flat(ROWS, weights, tops, tile.blocks);
    if (flat) normalize_weights(ROWS, weights, tops, tile.blocks);
    for (int group = 0; group * GROUP < padded; ++group)
      add_int4_group<ROWS>(row, weights, tops, flat, decay, tile, group, tile.next[0] && row == 0,
                           o, padded);
  });
}

}  // namespace
#endif
