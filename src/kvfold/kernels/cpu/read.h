// Reading memory and doing next to nothing with it: the speed no kernel can exceed.
#pragma once
#include "kernel.h"
#include "simd.h"

namespace KVF_NAMESPACE {

static uint64_t read_lines(const uint8_t* data, int64_t lines) {
  typedef uint64_t Line __attribute__((vector_size(4 * WIDTH)));
  constexpr int PER_LINE = 64 / sizeof(Line);
  Line sums[4 * PER_LINE] = {};
  int64_t i = 0;
  for (; i + 4 <= lines; i += 4) {
    const uint8_t* p = data + i * 64;
    for (int j = 0; j < 4; ++j) __builtin_prefetch(p + 4096 + j * 64, 0, 3);
    for (int j = 0; j < 4 * PER_LINE; ++j) {
      Line x;
      memcpy(&x, p + j * sizeof x, sizeof x);
      sums[j] += x;
    }
  }
  uint64_t total = 0;
  for (const Line& sum : sums)
    for (size_t lane = 0; lane < sizeof(Line) / 8; ++lane) total += sum[lane];
  return total;
}

}  // namespace
