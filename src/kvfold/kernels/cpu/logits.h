// What becomes of the scores of queries and keys before they are weights.
#pragma once
#include <algorithm>

#include "tile.h"

namespace KVF_NAMESPACE {

constexpr float LOG2E = 1.44269504f;  // logits are kept in base 2

// Whether queries at positions `oldest` to `newest` see all of `count` keys from `first` on, and their
// scores are logits as they are.
static bool is_plain(const KvfAttend& call, const Unit& unit, int64_t oldest, int64_t newest,
                     int first, int count) {
  if (call.softcap > 0 || call.alibi_slopes || call.mask) return false;
  if (first < unit.low || first + count > unit.high) return false;
  if (call.left >= 0 && first < newest - call.left) return false;
  return call.right < 0 || first + count <= oldest + call.right + 1;
}

// One row's scores become logits: those of query t, at `position`, of a head over `count` keys (a
// multiple of 16) from `first` on. They are capped and biased; what it may not see is hidden.
static void finish_row(const KvfAttend& call, const Unit& unit, int head, int t, int64_t position,
                       int first, int count, float* x) {
  if (call.softcap > 0) {
    const F16x inverse = splat(1 / call.softcap), cap = splat(call.softcap * LOG2E);
    for (int j = 0; j < count; j += 16) store(x + j, cap * tanh(load(x + j) * inverse));
  }
  if (call.alibi_slopes)
    for (int j = 0; j < count; ++j)
      x[j] -= call.alibi_slopes[head] * LOG2E * std::fabs((float)(position - (first + j)));
  if (call.mask) {
    const float* mask = call.mask + unit.b * call.mask_batch_stride + head * call.mask_head_stride +
                        t * call.mask_token_stride + first;
    for (int j = 0; j < count; ++j)  // a hidden key's score may be NaN
      if (first + j >= unit.low && first + j < unit.high)
        x[j] = mask[j] == -INFINITY ? -INFINITY : x[j] + mask[j] * LOG2E;
  }
  int64_t low = unit.low, high = unit.high, sinks_end = 0;
  if (call.right >= 0) high = std::min(high, position + call.right + 1);
  if (call.left >= 0) {
    sinks_end = (int64_t)(call.start ? call.start[unit.b] : 0) + call.sinks;
    low = std::max(low, position - call.left);
  }
  if (first >= low && first + count <= high) return;
  for (int j = 0; j < count; ++j) {
    const int64_t at = first + j;
    const bool sink = at >= unit.low && at < sinks_end;  // hidden by right all the same
    if (at >= high || (at < low && !sink)) x[j] = -INFINITY;
  }
}

}  // namespace
