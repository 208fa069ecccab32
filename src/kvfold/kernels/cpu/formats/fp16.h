// IEEE float16, as it is.
#pragma once
#include "../generic.h"

namespace KVF_NAMESPACE {

struct Fp16 : InFloats<Fp16> {
  static constexpr const char* name = "fp16";
  static constexpr int code = KVF_F16, bits = 16, step = 1, group = NO_SCALES, key_flip = 0;

  template <bool KEY>
  static INLINE void load(const uint8_t* p, F16x* x) {
    x[0] = load_f16((const uint16_t*)p);
  }

  static INLINE F16x numbers(const uint8_t* p) { return load_f16((const uint16_t*)p); }

  static void encode(const float* x, int padded, uint8_t* row, uint16_t*) {
    for (int i = 0; i < padded; ++i) {
      const uint16_t h = to_f16(x[i]);
      memcpy(row + 2 * i, &h, 2);
    }
  }
};

}  // namespace
