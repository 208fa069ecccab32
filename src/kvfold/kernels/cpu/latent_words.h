// What latents' rows, queries and weights are made of when they are multiplied: words of 32 bits.
#pragma once
#include "amx.h"
#include "formats.h"

#if defined(__AVX512BF16__) || defined(KVF_EMULATE_BF16)
#define KVF_PAIRS
#endif

namespace KVF_NAMESPACE {

constexpr int LATENT_STEP = 16;  // numbers that rows are padded to

// Words from a row to the next: whole cache lines, and an odd number of them, so that a few numbers
// of many rows do not fall into the same places of the cache.
template <class W>
static INLINE int row_words(int dim) {
  const int lines = (round_up(dim, LATENT_STEP) / W::numbers + 15) / 16;
  return (lines | 1) * 16;
}

// A float.
struct FloatWords {
  static constexpr int numbers = 1, stored_as = KVF_F32;
  // Rows, and chunks of 16 dimensions, whose sums are kept in registers.
  static constexpr int rows = WIDTH == 16 ? 8 : WIDTH == 8 ? 6 : 3, chunks = WIDTH / 8 | 1;

  static INLINE Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }

  static uint32_t* queries(const Queries& q) { return (uint32_t*)q.x; }
  static void round_queries(Queries&) {}
  static INLINE void round_weights(float*) {}

  // Sixteen numbers of a row, from number i on.
  template <class F>
  static INLINE void put(const uint8_t* from, uint32_t* to, int i) {
    store((float*)to + i, F::numbers(from));
  }
  template <class F>
  static INLINE void put_more(const uint8_t* from, uint32_t* to, int i) {
    put<F>(from, to, i);
    put<F>(from + 2 * F::bits, to, i + 16);
  }

  // Dimensions d … of a row.
  template <int CHUNKS>
  static INLINE void load_values(const uint32_t* const* row, int d, F16x* x) {
    for (int c = 0; c < CHUNKS; ++c) x[c] = load((const float*)row[0] + d + 16 * c);
  }
};

#if defined(KVF_PAIRS)
#if !defined(KVF_EMULATE_BF16)
// Of sizes of e4m3, 0 to 127, bfloat16's bits.
struct SizesOfE4m3 {
  alignas(64) uint16_t bits[128] = {};

  constexpr SizesOfE4m3() {
    for (int code = 1; code < 127; ++code) {
      int exponent = code >> 3, digits = code & 7;
      if (!exponent) {  // digits * 2^-9
        for (exponent = 1; !(digits & 8); --exponent) digits <<= 1;
        digits &= 7;
      }
      bits[code] = (uint16_t)((exponent + 120) << 7 | digits << 4);
    }
    bits[127] = 0x7fc0;
  }
};
constexpr SizesOfE4m3 SIZES_OF_E4M3;

static INLINE __m512i bf16_of_e4m3(const uint8_t* p) {
  const uint16_t* bits = SIZES_OF_E4M3.bits;
  const __m512i x = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
  const __m512i small =
      _mm512_permutex2var_epi16(_mm512_load_si512(bits), x, _mm512_load_si512(bits + 32));
  const __m512i large =
      _mm512_permutex2var_epi16(_mm512_load_si512(bits + 64), x, _mm512_load_si512(bits + 96));
  const __mmask32 is_large = _mm512_test_epi16_mask(x, _mm512_set1_epi16(64));
  const __m512i size = _mm512_mask_blend_epi16(is_large, small, large);
  return _mm512_or_si512(size, _mm512_and_si512(x, _mm512_set1_epi16((short)0x8000)));
}
#endif

// Which numbers of two rows of 32 make sixteen pairs.
alignas(64) constexpr uint16_t PAIRED[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                             37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                             11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// Two bfloat16: what has no more digits, such as formats of eight bits. Queries that are bfloat16
// stay as they are; weights are rounded, as FlashAttention does.
struct PairWords {
  static constexpr int numbers = 2, stored_as = KVF_BF16;
  static constexpr int rows = 12, chunks = 2;

  static INLINE Floats multiply_add(Floats sum, Floats a, Floats b) {
#if defined(KVF_EMULATE_BF16)
    const Ints x = (Ints)a, y = (Ints)b, high = (int32_t)0xffff0000 + Ints{};
    return sum + ((Floats)(x << 16) * (Floats)(y << 16) + (Floats)(x & high) * (Floats)(y & high));
#else
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  }

  static INLINE void round16(const float* from, uint16_t* to) {
#if defined(KVF_EMULATE_BF16)
    for (int i = 0; i < 16; ++i) to[i] = to_bf16(from[i]);
#else
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
    memcpy(to, &half, sizeof half);
#endif
  }

  static uint32_t* queries(const Queries& q) { return (uint32_t*)q.bf16; }
  static void round_queries(Queries& q) {
    const int64_t count = (int64_t)round_up(q.rows, BLOCK) * q.dim;
    for (int64_t i = 0; i < count; i += 16) round16(q.x + i, q.bf16 + i);
  }
  // Into the first half of their place.
  static INLINE void round_weights(float* p) {
    for (int i = 0; i < TILE; i += 16) round16(p + i, (uint16_t*)p + i);
  }

  template <class F>
  static INLINE void put(const uint8_t* from, uint32_t* to, int i) {
    uint16_t* at = (uint16_t*)to + i;
    if constexpr (F::code == KVF_BF16) {
      memcpy(at, from, 32);
    } else {
      alignas(64) float x[16];
      store(x, F::numbers(from));
      round16(x, at);
    }
  }

  // The same of 32 numbers.
  template <class F>
  static INLINE void put_more(const uint8_t* from, uint32_t* to, int i) {
#if !defined(KVF_EMULATE_BF16)
    uint16_t* at = (uint16_t*)to + i;
    if constexpr (F::code == Fp8::code) return _mm512_storeu_si512(at, bf16_of_e4m3(from));
    if constexpr (F::code == Int8::code) {
      const F16x first = F::numbers(from), second = F::numbers(from + 16);
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second.v[0], (__m512)first.v[0]);
      memcpy(at, &both, sizeof both);
      return;
    }
#endif
    put<F>(from, to, i);
    put<F>(from + 2 * F::bits, to, i + 16);
  }

  // Words of a number of each of two rows: sixteen of them, from dimension d on.
  static INLINE F16x interleaved(const uint32_t* const* rows, int d) {
    F16x x;
    for (int i = 0; i < PARTS; ++i) {
      Halves a, b;
      memcpy(&a, (const uint16_t*)rows[0] + d + i * WIDTH, sizeof a);
      memcpy(&b, (const uint16_t*)rows[1] + d + i * WIDTH, sizeof b);
      x.v[i] = (Floats)(__builtin_convertvector(a, Ints) | __builtin_convertvector(b, Ints) << 16);
    }
    return x;
  }

  template <int CHUNKS>
  static INLINE void load_values(const uint32_t* const* rows, int d, F16x* x) {
#if !defined(KVF_EMULATE_BF16)
    if constexpr (CHUNKS == 2) {
      const __m512i a = _mm512_loadu_si512((const uint16_t*)rows[0] + d);
      const __m512i b = _mm512_loadu_si512((const uint16_t*)rows[1] + d);
      const __m512i first = _mm512_load_si512(PAIRED);
      const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
      x[0].v[0] = (Floats)_mm512_permutex2var_epi16(a, first, b);
      x[1].v[0] = (Floats)_mm512_permutex2var_epi16(a, second, b);
      return;
    }
#endif
    for (int c = 0; c < CHUNKS; ++c) x[c] = interleaved(rows, d + 16 * c);
  }
};
#endif

}  // namespace
