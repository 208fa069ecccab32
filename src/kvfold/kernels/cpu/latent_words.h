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
  static constexpr int numbers = 1;

  static INLINE Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }

  static uint32_t* queries(const Queries& q) { return (uint32_t*)q.x; }
  static void round_queries(Queries&) {}
  static INLINE void round_weights(float*) {}

  // Sixteen numbers of a row, from number i on.
  template <class F>
  static INLINE void put(const uint8_t* from, uint32_t* to, int i) {
    store((float*)to + i, F::numbers(from));
  }
};

#if defined(KVF_PAIRS)
// Two bfloat16: what has no more digits, such as formats of eight bits. Queries that are bfloat16
// stay as they are; weights are rounded, as FlashAttention does.
struct PairWords {
  static constexpr int numbers = 2;

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

  // Two rows, `words` apart, to words of a number of each.
  static INLINE void interleave(const uint16_t* row, int words, int dim, uint32_t* to) {
    for (int i = 0; i < round_up(dim, LATENT_STEP); i += WIDTH) {
      Halves a, b;
      memcpy(&a, row + i, sizeof a);
      memcpy(&b, row + 2 * words + i, sizeof b);
      const Ints pairs = __builtin_convertvector(a, Ints) | __builtin_convertvector(b, Ints) << 16;
      memcpy(to + i, &pairs, sizeof pairs);
    }
  }
};
#endif

}  // namespace
