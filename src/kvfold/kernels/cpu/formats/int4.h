// Whole numbers from -8 to 7, stored with 8 added.
#pragma once
#include "../four_bits.h"

namespace KVF_NAMESPACE {

struct Int4 : FourBits<Int4> {
  static constexpr const char* name = "int4";
  static constexpr int code = 5, top = 8, offset = 8;

  static INLINE Floats level(Ints c) { return __builtin_convertvector(c - 8, Floats); }

  static INLINE int nearest(float x, float scale) { return code_of(x, scale, -8, 7) + 8; }

#if defined(__AVX512VNNI__)
  static INLINE __m512i unsigned_bytes(__m512i codes) { return codes; }
  static INLINE __m512i signed_bytes(__m512i codes) {
    return _mm512_sub_epi8(codes, _mm512_set1_epi8(offset));
  }
#endif
};

}  // namespace
