// What encoding a row needs: the C++ twin of kvfold/ops/rounding.py and rotation.py, bit for bit.
#pragma once
#include <algorithm>

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

static inline int code_of(float x, float scale, int low, int high) {
  const float c = scale == 0 ? 0.f : std::nearbyintf(x / scale);
  return c != c ? 0 : c < low ? low : c > high ? high : (int)c;
}

// The largest size of some numbers; NaN if one of them is. Sizes have the order of their bits.
static INLINE float largest_size(const float* x, int count) {
  int32_t top = 0;
  for (int i = 0; i < count; ++i) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    top = std::max(top, bits & 0x7fffffff);
  }
  float size;
  memcpy(&size, &top, 4);
  return size;
}

// One scale for all: the largest number gets the code of `top`. convert: x / scale to a code.
template <class Convert>
static INLINE void encode_whole(const float* x, int padded, float top, uint8_t* row,
                                uint16_t* scales, Convert convert) {
  scales[0] = scale_above(largest_size(x, padded) / top);
  const float scale = from_bf16(scales[0]);
  for (int i = 0; i < padded; ++i) row[i] = convert(x[i], scale);
}

}  // namespace
