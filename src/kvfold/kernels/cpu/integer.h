// Whole numbers with AVX512-VNNI, which multiplies unsigned by signed bytes, four at a time.
//
// Queries and weights become 16-bit integers, split into two planes of bytes (256 high + low), so
// that what rounding them adds, 2^-16 of the largest, is nothing beside what the cache has lost.
// Keys are unsigned (offset by 128 or 8); the offset's share is taken off in advance.
#pragma once
#include "generic.h"

#if defined(__AVX512VNNI__)
namespace KVF_NAMESPACE {

// sum + a . b, four bytes at a time: a unsigned, b signed. The intrinsic would do, but GCC (12) copies
// every sum for it, three instructions for one.
static INLINE __m512i dot_quads(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

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

// Whether a tile is best taken as it lies, as memory's speed is the limit.
template <class F>
static INLINE bool in_order(int rows, const Tile& tile) {
  return F::bits == 8 && rows <= 2 && tile.streams;
}

// scale * q . k by F::score_rows, which takes up to four rows and two blocks at a time.
template <class F>
static void score_integers(const Queries& q, const Tile& tile, float* s) {
  const bool fetch = tile.next[0] != nullptr;
  int block = 0;
  if (in_order<F>(q.rows, tile))
    for (; block < tile.blocks; ++block)
      for_rows<2>(q.rows, [&](auto n, int row) {
        F::template score_rows<decltype(n)::value, 1>(q, row, tile, block, fetch, s);
      });
  for (; block + 2 <= tile.blocks; block += 2)
    for_rows<4>(q.rows, [&](auto n, int row) {
      F::template score_rows<decltype(n)::value, 2>(q, row, tile, block, fetch && row == 0, s);
    });
  if (block < tile.blocks)
    for_rows<4>(q.rows, [&](auto n, int row) {
      F::template score_rows<decltype(n)::value, 1>(q, row, tile, block, false, s);
    });
}

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

// The largest scale of a tile's group.
static INLINE float largest_scale(const Tile& tile, int group) {
  __m512 top = _mm512_setzero_ps();
  for (int b = 0; b < tile.blocks; ++b)
    top = _mm512_max_ps(top, _mm512_abs_ps(scales16(tile.scales[b] + group * BLOCK)));
  return _mm512_reduce_max_ps(top);
}

// Weights times scales as integers up to 255 * 256, in units of what cannot be exceeded.
// Scales may be negative: FourBits gives their sign to the values.
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

// Weights of one plane need no more than their bytes where no weight stands out. They are off by at
// most half of 1/255 of their tile's largest each: may all of that, over all tiles so far, come to
// FLAT / 510 of the sum of all weights so far? That is below what four bits did to values. Tiles whose
// weights are even, or small beside earlier ones, leave room for others.
constexpr float FLAT = 16;

static INLINE bool is_flat(const Weights& w) {
  const auto after = [&](int row) {
    return fma(load(w.spent + row), load(w.decay + row), splat(TILE) * load(w.top + row));
  };
  bool flat = true;
  for_vectors(0, w.rows, [&](int row, __mmask16 some) {
    const F16x limit = splat(FLAT) * load(w.l + row);
    flat &= _mm512_mask_cmp_ps_mask(some, (__m512)after(row).v[0], (__m512)limit.v[0],
                                    _CMP_NLE_UQ) == 0;
  });
  for_vectors(0, w.rows, [&](int row, __mmask16) {
    store(w.spent + row, flat ? after(row) : load(w.spent + row) * load(w.decay + row));
  });
  return flat;
}

// Weights become shares of 255 of their row's largest.
static INLINE void normalize_weights(const Weights& w, int blocks) {
  for (int r = 0; r < w.rows; ++r) {
    const __m512 inverse = _mm512_set1_ps(w.top[r] > 0 ? 255.f / w.top[r] : 0);
    for (int b = 0; b < blocks; ++b) {
      float* x = w.p + r * TILE + b * BLOCK;
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

// o = decay o + unit (256 high + low), 16 numbers; one plane is low alone.
template <int PLANES>
static INLINE void add_sums(float* o, float decay, float unit, __m512i high, __m512i low) {
  const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(o), _mm512_set1_ps(decay));
  const __m512 sum = PLANES > 1 ? joined(high, low) : _mm512_cvtepi32_ps(low);
  _mm512_storeu_ps(o, _mm512_fmadd_ps(sum, _mm512_set1_ps(unit), old));
}

}  // namespace
#endif
