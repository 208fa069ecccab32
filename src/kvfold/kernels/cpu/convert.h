// Packed blocks of any format as blocks of Fp32 or, where the machine rounds to it, of Bf16.
#pragma once
#include "formats.h"

namespace KVF_NAMESPACE {

// Two vectors of numbers, of neighbours in a block: `next` bytes apart where they are floats.
template <class To>
static INLINE void put_pair(uint8_t* to, int64_t next, F16x first, F16x second) {
#if defined(__AVX512BF16__)
  if constexpr (To::bits == 16) {  // interleaved, two to a word
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first.v[0]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second.v[0]));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    return;
  }
#endif
  store((float*)to, first);
  store((float*)(to + next), second);
}

template <class F>
static INLINE F16x scale_of_keys(const uint16_t* scales, int d) {
  return load_bf16(scales + (GROUPED<F> ? d / F::group * BLOCK : 0));
}

// A packed block of keys: two dimensions of 16 tokens at a time.
template <class F, class To>
static void convert_keys(int dim, const uint8_t* from, const uint16_t* scales, uint8_t* to) {
  constexpr int step = F::step, loads = step == 1 ? 2 : 1, wide = step * loads;
  const int padded = stored_dim<F, true>(dim);
  for (int d = 0; d < padded; d += wide) {
    F16x x[wide];
    for (int i = 0; i < loads; ++i) {
      const int at = d + i * step;
      if (at < padded) F::template load<true>(from + at / step * STEP_BYTES<F>, x + i * step);
      else x[i] = splat(0);
    }
    for (int j = 0; j < wide; j += 2) {
      if constexpr (F::group != NO_SCALES) {
        const F16x scale = scale_of_keys<F>(scales, d);
        x[j] = x[j] * scale;
        x[j + 1] = x[j + 1] * scale;
      }
      put_pair<To>(to + (d + j) * 2 * To::bits, 2 * To::bits, x[j], x[j + 1]);
    }
  }
}

// A packed block of values: 16 dimensions of two tokens at a time.
template <class F, class To>
static void convert_values(int dim, const uint8_t* from, const uint16_t* scales, uint8_t* to) {
  constexpr int step = F::step, loads = step == 1 ? 2 : 1, wide = step * loads;
  const int padded = stored_dim<F, false>(dim), width = round_up(dim, 16);
  for (int d = 0; d < width; d += 16)
    for (int token = 0; token < BLOCK; token += wide) {
      F16x x[wide];
      for (int i = 0; i < loads; ++i)
        F::template load<false>(
            from + bytes_of<F>(step == 1 ? (int64_t)(token + i) * padded + d : d * 16 + token * 16),
            x + i);
      for (int j = 0; j < wide; j += 2) {
        if constexpr (F::group != NO_SCALES) {
          const uint16_t* scale = scales + (GROUPED<F> ? d / F::group * BLOCK : 0) + token + j;
          x[j] = x[j] * splat(from_bf16(scale[0]));
          x[j + 1] = x[j + 1] * splat(from_bf16(scale[1]));
        }
        if constexpr (To::bits == 16)
          put_pair<To>(to + d * 32 + (token + j) * 32, 0, x[j], x[j + 1]);
        else put_pair<To>(to + ((token + j) * width + d) * 4, width * 4, x[j], x[j + 1]);
      }
    }
}

}  // namespace
