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

// Numbers of four bits, each word eight dimensions in a row, as blocks have them: 0-3 in the low
// halves of its bytes, 4-7 in the high.
static INLINE __m512i halves_apart(__m512i words) {
  const auto spread = [](__m512i x) {  // four numbers to a byte each
    x = _mm512_or_si512(x, _mm512_slli_epi32(x, 8));
    x = _mm512_and_si512(x, _mm512_set1_epi32(0x00ff00ff));
    x = _mm512_or_si512(x, _mm512_slli_epi32(x, 4));
    return _mm512_and_si512(x, _mm512_set1_epi32(0x0f0f0f0f));
  };
  const __m512i low = spread(_mm512_and_si512(words, _mm512_set1_epi32(0xffff)));
  return _mm512_or_si512(low, _mm512_slli_epi32(spread(_mm512_srli_epi32(words, 16)), 4));
}

// Sixteen tokens' words become what a block of keys has of them.
template <class F>
static INLINE void store_words(__m512i words, uint8_t* block, int word) {
  constexpr int bits = F::bits * F::step;  // of a token that lie together
  if constexpr (F::bits == 4) words = halves_apart(words);
  if constexpr (F::key_flip) words = _mm512_xor_si512(words, _mm512_set1_epi8((char)F::key_flip));
  if constexpr (bits == 32) {
    _mm512_storeu_si512(block + word * 64, words);
  } else {
    for (int i = 0; i < 32 / bits; ++i, words = _mm512_srli_epi32(words, bits)) {
      uint8_t* to = block + (word * (32 / bits) + i) * 2 * bits;
      if constexpr (bits == 16) _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(words));
      else _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(words));
    }
  }
}

// Keys: words of sixteen rows, transposed.
template <class F>
static void place_words(const uint8_t* const rows[BLOCK], int words, uint8_t* block) {
  for (int first = 0; first < words; first += 16) {
    const int count = words - first < 16 ? words - first : 16;
    const __mmask16 some = (__mmask16)((1u << count) - 1);
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(some, rows[i] + 4 * first);
    transpose16(r);
    for (int i = 0; i < count; ++i) store_words<F>(r[i], block, first + i);
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

// Byte i of four rows in word i.
static INLINE __m512i interleaved(const __m128i* rows) {
  __m512i words = _mm512_cvtepu8_epi32(rows[0]);
  for (int i = 1; i < 4; ++i)
    words = _mm512_or_si512(words, _mm512_slli_epi32(_mm512_cvtepu8_epi32(rows[i]), 8 * i));
  return words;
}

// Values of one byte: sixteen dimensions of four tokens, interleaved.
static void place_quads(const uint8_t* const rows[BLOCK], int dim, uint8_t* block) {
  for (int d = 0; d < dim; d += 16) {
    const __mmask16 some = (__mmask16)(dim - d < 16 ? (1u << (dim - d)) - 1 : 0xffff);
    for (int quad = 0; quad < 4; ++quad) {
      __m128i four[4];
      for (int i = 0; i < 4; ++i) four[i] = _mm_maskz_loadu_epi8(some, rows[4 * quad + i] + d);
      _mm512_storeu_si512(block + d * 16 + quad * 64, interleaved(four));
    }
  }
}

// Values of four bits: the same of eight tokens, 0-3 in the low halves of bytes and 4-7 in the high.
static void place_halves(const uint8_t* const rows[BLOCK], int padded, uint8_t* block) {
  const __m128i nibble = _mm_set1_epi8(15);
  for (int d = 0; d < padded; d += 16)
    for (int eight = 0; eight < 2; ++eight) {
      __m128i codes[8];
      for (int i = 0; i < 8; ++i) {
        const __m128i both =
            _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)(rows[8 * eight + i] + d / 2)));
        codes[i] = _mm_and_si128(_mm_or_si128(both, _mm_slli_epi16(both, 4)), nibble);
      }
      for (int i = 0; i < 4; ++i)
        codes[i] = _mm_or_si128(codes[i], _mm_slli_epi16(codes[4 + i], 4));
      _mm512_storeu_si512(block + d * 8 + eight * 64, interleaved(codes));
    }
}
#endif

template <class F, bool KEY>
static INLINE void place_rows(int dim, const uint8_t* const rows[BLOCK], uint8_t* block) {
#if defined(__AVX512F__)
  if constexpr (KEY) {
    const int64_t bytes = bytes_of<F>(GROUPED<F> ? stored_dim<F, KEY>(dim) : dim);
    if (bytes % 4 == 0) return place_words<F>(rows, (int)bytes / 4, block);
  } else if constexpr (F::step == 2) {
    return place_pairs(rows, dim, block);
  } else if constexpr (F::step == 4) {
    return place_quads(rows, dim, block);
  } else if constexpr (F::bits == 4) {
    return place_halves(rows, stored_dim<F, KEY>(dim), block);
  }
#endif
  for (int slot = 0; slot < BLOCK; ++slot) place_row<F, KEY>(dim, rows[slot], block, slot);
}

}  // namespace
