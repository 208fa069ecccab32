// Plain rows into a packed block, sixteen at once: what place_row does one at a time.
#pragma once
#include "layout.h"

namespace KVF_NAMESPACE {

#if defined(__AVX512F__)
// Transpose sixteen registers of sixteen 32-bit numbers.
static INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// [16][words] -> [words][16], 32-bit words: keys in float32, or pairs of bfloat16.
static void place_words(const uint8_t* const rows[BLOCK], int words, uint8_t* block) {
  for (int first = 0; first < words; first += 16) {
    const int count = words - first < 16 ? words - first : 16;
    const __mmask16 some = (__mmask16)((1u << count) - 1);
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(some, rows[i] + 4 * first);
    transpose16(r);
    for (int i = 0; i < count; ++i) _mm512_storeu_si512(block + (first + i) * 64, r[i]);
  }
}

// Values: sixteen dimensions of two tokens, interleaved.
static void place_pairs(const uint8_t* const rows[BLOCK], int dim, uint8_t* block) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; ++i) {
    order[2 * i] = (uint16_t)i;
    order[2 * i + 1] = (uint16_t)(32 + i);
  }
  const __m512i interleave = _mm512_load_si512(order);
  for (int chunk = 0; chunk * 16 < dim; ++chunk) {
    const int count = dim - chunk * 16 < 16 ? dim - chunk * 16 : 16;
    const __mmask32 some = (__mmask32)((1u << count) - 1);
    for (int pair = 0; pair < 8; ++pair) {
      const __m512i a = _mm512_maskz_loadu_epi16(some, rows[2 * pair] + chunk * 32);
      const __m512i b = _mm512_maskz_loadu_epi16(some, rows[2 * pair + 1] + chunk * 32);
      _mm512_storeu_si512(block + (chunk * 8 + pair) * 64,
                          _mm512_permutex2var_epi16(a, interleave, b));
    }
  }
}
#endif

template <class F, bool KEY>
static INLINE void place_rows(int dim, const uint8_t* const rows[BLOCK], uint8_t* block) {
#if defined(__AVX512F__)
  if constexpr (KEY && F::bits * F::step == 32 && !F::key_flip) {
    if (dim % F::step == 0) return place_words(rows, dim / F::step, block);
  }
  if constexpr (!KEY && F::bits == 16 && F::step == 2) return place_pairs(rows, dim, block);
#endif
  for (int slot = 0; slot < BLOCK; ++slot) place_row<F, KEY>(dim, rows[slot], block, slot);
}

}  // namespace
