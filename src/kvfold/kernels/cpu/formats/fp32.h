// float32, as it is.
#pragma once
#include "../generic.h"

namespace KVF_NAMESPACE {

struct Fp32 : InFloats<Fp32> {
  static constexpr const char* name = "fp32";
  static constexpr int code = KVF_F32, bits = 32, step = 1, group = NO_SCALES, key_flip = 0;

  template <bool KEY>
  static INLINE void load(const uint8_t* p, F16x* x) {
    x[0] = KVF_NAMESPACE::load((const float*)p);
  }

  static INLINE F16x numbers(const uint8_t* p) { return KVF_NAMESPACE::load((const float*)p); }

  static void encode(const float* x, int padded, uint8_t* row, uint16_t*) {
    memcpy(row, x, 4 * padded);
  }
};

}  // namespace
