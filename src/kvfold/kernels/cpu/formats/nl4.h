// Codes of four bits for levels that stand closer together near zero.
#pragma once
#include "../four_bits.h"

namespace KVF_NAMESPACE {

struct Nl4 : FourBits<Nl4> {
  static constexpr const char* name = "nl4";
  static constexpr int code = 6, top = 127, offset = 128;

  // The whole number nearest to c (12.75 + 25 / 512 c^2), c from -8 to 7; all before rounding is
  // exact.
  static INLINE Floats level(Ints code) {
    const Floats c = __builtin_convertvector(code - 8, Floats);
    const Floats magic = 12582912.f - Floats{};  // 1.5 * 2^23: adding it rounds to an integer
    return (c * (12.75f + c * c * (25.f / 512)) + magic) - magic;
  }

  static constexpr int8_t LEVELS[16] = {-127, -106, -87, -70, -54, -40, -26, -13,
                                        0,    13,   26,  40,  54,  70,  87,  106};

  static INLINE int nearest(float x, float scale) {
    const float y = scale == 0 ? 0.f : x / scale;
    int code = 0;
    for (int i = 0; i < 15; ++i) code += y > (LEVELS[i] + LEVELS[i + 1]) * 0.5f;
    return code;
  }

#if defined(__AVX512VNNI__)
  static INLINE __m512i signed_bytes(__m512i codes) {
    const __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)LEVELS));
    return _mm512_shuffle_epi8(levels, codes);
  }
  static INLINE __m512i unsigned_bytes(__m512i codes) {
    return _mm512_xor_si512(signed_bytes(codes), _mm512_set1_epi8((char)offset));
  }
#endif
};

}  // namespace
