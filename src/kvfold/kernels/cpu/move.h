// Moving stored tokens to later positions of their sequence, as they are: nothing is decoded.
#pragma once
#include <algorithm>
#include <atomic>

#include "formats.h"

namespace KVF_NAMESPACE {

// A token of a packed block to a slot of another, or of the same.
template <class F, bool KEY>
static inline void move_row(int dim, const uint8_t* from, int slot, uint8_t* to, int at) {
  const int padded = stored_dim<F, KEY>(dim);
  if constexpr (KEY) {
    constexpr int bytes = F::step * F::bits / 8;
    for (int line = 0; line < padded / F::step * BLOCK; line += BLOCK)
      memcpy(to + (line + at) * bytes, from + (line + slot) * bytes, bytes);
  } else if constexpr (F::step == 1) {
    const int64_t bytes = bytes_of<F>(padded);
    memcpy(to + at * bytes, from + slot * bytes, bytes);
  } else if constexpr (F::bits == 4) {
    for (int d = 0; d < padded; ++d) {
      const auto byte = [d](int i) { return ((d / 16 * 2 + i / 8) * 16 + d % 16) * 4 + i % 4; };
      const int code = from[byte(slot)] >> (slot % 8 / 4 * 4) & 15;
      set_half(to + byte(at), at % 8 / 4, code);
    }
  } else {
    constexpr int step = F::step, size = F::bits / 8;
    for (int d = 0; d < padded; ++d) {
      const auto number = [d](int i) {
        return ((d / 16 * (16 / step) + i / step) * 16 + d % 16) * step + i % step;
      };
      memcpy(to + number(at) * size, from + number(slot) * size, size);
    }
  }
}

// One side of a token from one page and slot to another.
template <class F, bool KEY>
static void move_token(const KvfSide& side, int64_t from, int slot, int64_t to, int at) {
  const uint8_t* source = page_of(side, from, 0);
  uint8_t* target = page_of(side, to, 0);
  const int groups = scale_groups<F>(side.dim);
  const uint16_t* scales = groups ? scales_of(side, from, 0) : nullptr;
  uint16_t* own = groups ? scales_of(side, to, 0) : nullptr;
  if (!side.packed) {
    memcpy(target + at * side.row_stride, source + slot * side.row_stride,
           bytes_of<F>(GROUPED<F> ? stored_dim<F, KEY>(side.dim) : side.dim));
    for (int g = 0; g < groups; ++g) own[at * groups + g] = scales[slot * groups + g];
    return;
  }
  const int64_t bytes = block_bytes<F, KEY>(side.dim);
  move_row<F, KEY>(side.dim, source + slot / BLOCK * bytes, slot % BLOCK,
                   target + at / BLOCK * bytes, at % BLOCK);
  for (int g = 0; g < groups; ++g)
    own[(at / BLOCK * groups + g) * BLOCK + at % BLOCK] =
        scales[(slot / BLOCK * groups + g) * BLOCK + slot % BLOCK];
}

// The last token goes first: none is written over before it has moved.
template <class F, bool KEY>
static void move_side(const KvfMove& call, int b) {
  const KvfSide& side = KEY ? call.part.k : call.part.v;
  const int32_t* table = pages_of(call.part, b, 0);
  const int size = call.part.page_size, first = begin_of(call.part, b, 0);
  const int32_t* from = call.from + call.offset[b];
  for (int64_t i = call.offset[b + 1] - call.offset[b]; i-- > 0;) {
    const int to = first + (int)i;
    if (from[i] != to)
      move_token<F, KEY>(side, table[from[i] / size], from[i] % size, table[to / size], to % size);
  }
}

struct MovePlan {
  const KvfMove* call;
  std::atomic<int32_t> next{0};
};

static void move_thread(void* data) {
  MovePlan& plan = *(MovePlan*)data;
  const KvfMove& call = *plan.call;
  for (int32_t i; (i = plan.next.fetch_add(1)) < 2 * call.batch;) {
    const int b = i / 2;
    if (i % 2 == 0)
      with_format(call.part.k.format, [&](auto f) { move_side<decltype(f), true>(call, b); });
    else if (call.part.v.dim)
      with_format(call.part.v.format, [&](auto f) { move_side<decltype(f), false>(call, b); });
  }
}

static void move(const KvfMove& call, KvfParallel parallel) {
  MovePlan plan;
  plan.call = &call;
  const int threads = std::min(call.threads, 2 * call.batch);
  if (threads <= 1) move_thread(&plan);
  else parallel(move_thread, &plan, (unsigned)threads, 0);
}

}  // namespace
