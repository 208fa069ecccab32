// float8 e4m3 (bias 7, no infinities), one scale per row.
#pragma once
#include "../generic.h"

namespace KVF_NAMESPACE {

static INLINE F16x load_e4m3(const uint8_t* p) {
#if defined(__AVX2__)
  // Its bits, moved into a float16's place, lack 15 - 7 in the exponent, tiny numbers as well.
  const __m256i x = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  const __m256i size = _mm256_and_si256(x, _mm256_set1_epi16(0x3f80));
  const __m256i nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x3f80));
  const __m256i half = _mm256_and_si256(x, _mm256_set1_epi16((short)0xbfff));
  return from_f16(_mm256_or_si256(half, _mm256_srli_epi16(nan, 1))) * splat(256);
#else
  F16x r;
  for (int i = 0; i < PARTS; ++i) {
    Bytes b;
    memcpy(&b, p + i * WIDTH, sizeof b);
    Ints x = __builtin_convertvector(b, Ints);
    Ints sign = (x & 0x80) << 24, bits = x & 0x7f;
    // A normal number's bits, moved into a float's place, lack 127 - 7 in the exponent.
    Floats normal = (Floats)((bits << 20) + (120 << 23));
    Floats tiny = __builtin_convertvector(bits, Floats) * 0.001953125f;
    Floats size = bits > 7 ? normal : tiny;
    size = bits == 0x7f ? NAN - Floats{} : size;
    r.v[i] = (Floats)((Ints)size | sign);
  }
  return r;
#endif
}

static inline uint8_t to_e4m3(float x) {  // to nearest, ties to even, at most 448
  uint32_t all, u;                        // without branches, so that compilers do many at a time
  memcpy(&all, &x, 4);
  const float size = std::fabs(x) < 448.f ? std::fabs(x) : 448.f;
  const int tiny = (int)std::nearbyintf(size * 512.f);  // subnormal: 2^-9
  memcpy(&u, &size, 4);
  const int normal = (int)((u + 0x7ffff + ((u >> 20) & 1)) >> 20) - (120 << 3);
  const int code = size < 0.015625f ? tiny : normal;
  return (uint8_t)(x != x ? 0x7f : code | (int)(all >> 24 & 0x80));
}

struct Fp8 : InFloats<Fp8> {
  static constexpr const char* name = "fp8";
  static constexpr int code = 3, bits = 8, step = 1, group = WHOLE_ROW, key_flip = 0;

  template <bool KEY>
  static INLINE void load(const uint8_t* p, F16x* x) {
    x[0] = load_e4m3(p);
  }

  static INLINE F16x numbers(const uint8_t* p) { return load_e4m3(p); }

  static void encode(const float* x, int padded, uint8_t* row, uint16_t* scales) {
    encode_whole(x, padded, 448.f, row, scales, [](float number, float scale) {
      return to_e4m3(scale == 0 ? 0.f : number / scale);
    });
  }
};

}  // namespace
