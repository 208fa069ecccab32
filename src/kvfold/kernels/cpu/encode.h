// Numbers to rows and back: the C++ twin of kvfold/ops/formats, bit for bit.
#pragma once
#include "layout.h"

namespace KVF_NAMESPACE {

// A row of a tensor as floats.
static inline void load_row(const KvfTensor& t, const void* row, int count, float* x) {
  if (t.format == KVF_F32) {
    memcpy(x, row, 4 * count);
    return;
  }
  const uint16_t* halves = (const uint16_t*)row;
  const bool f16 = t.format == KVF_F16;
  int i = 0;
  for (; i + 16 <= count; i += 16) store(x + i, f16 ? load_f16(halves + i) : load_bf16(halves + i));
  for (; i < count; ++i) x[i] = f16 ? from_f16(halves[i]) : from_bf16(halves[i]);
}

// Floats times a factor into a row of a tensor.
static inline void store_row(const KvfTensor& t, const float* x, int count, float factor,
                             void* row) {
  if (t.format == KVF_F32)
    for (int i = 0; i < count; ++i) ((float*)row)[i] = x[i] * factor;
  else if (t.format == KVF_F16)
    for (int i = 0; i < count; ++i) ((uint16_t*)row)[i] = to_f16(x[i] * factor);
  else
    for (int i = 0; i < count; ++i) ((uint16_t*)row)[i] = to_bf16(x[i] * factor);
}

static inline const void* row_of(const KvfTensor& t, int b, int h, int i) {
  const int64_t at = b * t.batch_stride + h * t.head_stride + i * t.token_stride;
  return (const uint8_t*)t.data + at * (t.format == KVF_F32 ? 4 : 2);
}

#if defined(__AVX512F__)
// The first four rounds of `hadamard`, over sixteen numbers: partner + self, or partner - self.
static INLINE __m512 butterfly(__m512 self, __m512 partner, __mmask16 upper) {
  return _mm512_mask_sub_ps(_mm512_add_ps(partner, self), upper, partner, self);
}

static INLINE __m512 hadamard16(__m512 x) {
  x = butterfly(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);        // neighbours
  x = butterfly(x, _mm512_permute_ps(x, 0x4e), 0xcccc);        // two apart
  x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);  // four
  return butterfly(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
}
#endif

// In place, over consecutive blocks of `size` (a power of two), times 1 / sqrt(size): its own inverse.
static inline void hadamard(float* x, int count, int size) {
  int first = 1;
#if defined(__AVX512F__)
  if (size >= 16) {
    for (int i = 0; i + 16 <= count; i += 16)
      _mm512_storeu_ps(x + i, hadamard16(_mm512_loadu_ps(x + i)));
    first = 16;
  }
#endif
  for (int start = 0; start + size <= count; start += size)
    for (int half = first; half < size; half *= 2)
      for (int i = start; i < start + size; i += 2 * half)
        for (int j = i; j < i + half; ++j) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
  const float norm = 1.0f / sqrtf((float)size);
  for (int i = 0; i < count; ++i) x[i] *= norm;
}

// The next bfloat16 at or above x >= 0, so that no code overflows.
static inline uint16_t scale_above(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((u + 0xffff) >> 16);
}

static inline uint8_t to_fp8(float x) {  // to nearest, ties to even, at most 448
  if (x != x) return 0x7f;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float size = std::fmin(std::fabs(x), 448.f);
  if (size < 0.015625f) return sign | (uint8_t)std::nearbyintf(size * 512.f);  // subnormal: 2^-9
  uint32_t u;
  memcpy(&u, &size, 4);
  u += 0x7ffff + ((u >> 20) & 1);
  return sign | (uint8_t)((u >> 20) - (120 << 3));
}

static inline int code_of(float x, float scale, int low, int high) {
  const float c = scale == 0 ? 0.f : std::nearbyintf(x / scale);
  return c != c ? 0 : c < low ? low : c > high ? high : (int)c;
}

// Encode `padded` numbers (zeros beyond the head) as an unpacked row and its scales.
static inline void encode_row(int format, const float* x, int padded, uint8_t* row,
                              uint16_t* scales) {
  if (format == KVF_F32) {
    memcpy(row, x, 4 * padded);
    return;
  }
  if (format == KVF_F16 || format == KVF_BF16) {
    for (int i = 0; i < padded; ++i) {
      const uint16_t h = format == KVF_F16 ? to_f16(x[i]) : to_bf16(x[i]);
      memcpy(row + 2 * i, &h, 2);
    }
    return;
  }
  if (format == KVF_INT4) {
    for (int g = 0; g * GROUP < padded; ++g) {
      float extreme = 0;  // signed: it gets the code -8, which has no positive twin
      for (int i = g * GROUP; i < (g + 1) * GROUP; ++i)
        if (x[i] != x[i] || std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
      const uint16_t size = scale_above(std::fabs(extreme) / 8);
      const uint16_t bits = extreme > 0 ? size | 0x8000 : size;
      scales[g] = bits;
      const float scale = from_bf16(bits);
      for (int i = g * GROUP; i < (g + 1) * GROUP; ++i)
        set_half(row + i / 2, i % 2, code_of(x[i], scale, -8, 7) + 8);
    }
    return;
  }
  float largest = 0;
  for (int i = 0; i < padded; ++i)
    if (x[i] != x[i] || std::fabs(x[i]) > largest) largest = std::fabs(x[i]);
  scales[0] = scale_above(largest / (format == KVF_INT8 ? 127.f : 448.f));
  const float scale = from_bf16(scales[0]);
  for (int i = 0; i < padded; ++i)
    row[i] = format == KVF_INT8 ? (uint8_t)code_of(x[i], scale, -127, 127)
                                : to_fp8(scale == 0 ? 0.f : x[i] / scale);
}

}  // namespace
