// Writing rows into a store: encoded, and put where the kernels read them.
#pragma once
#include <algorithm>
#include <atomic>

#include "formats.h"

namespace KVF_NAMESPACE {

template <class F, bool KEY>
static void append_row(const KvfSide& side, int64_t page, int head, int slot, const KvfTensor& from,
                       const void* source) {
  float x[KVF_MAX_DIM];
  uint8_t row[4 * KVF_MAX_DIM];
  uint16_t scales[KVF_MAX_DIM / LEAST_GROUP];
  const int dim = side.dim, padded = stored_dim<F, KEY>(dim);
  load_row(from, source, dim, x);
  for (int i = dim; i < padded; ++i) x[i] = 0;
  if (side.rotation) hadamard(x, padded, side.rotation);
  // Only the last group looks beyond the head, and zeros change no scale.
  F::encode(x, padded, row, scales);
  uint8_t* at = page_of(side, page, head);
  const int groups = scale_groups<F>(dim);
  if (side.packed) {
    const int block = slot / BLOCK;
    place_row<F, KEY>(dim, row, at + block * block_bytes<F, KEY>(dim), slot % BLOCK);
    uint16_t* s = groups ? scales_of(side, page, head) + (int64_t)block * groups * BLOCK : nullptr;
    for (int g = 0; g < groups; ++g) s[g * BLOCK + slot % BLOCK] = scales[g];
  } else {
    memcpy(at + slot * side.row_stride, row, bytes_of<F>(GROUPED<F> ? padded : dim));
    uint16_t* s = groups ? scales_of(side, page, head) + (int64_t)slot * groups : nullptr;
    for (int g = 0; g < groups; ++g) s[g] = scales[g];
  }
}

// The new keys, or values, of one head of one sequence.
template <class F, bool KEY>
static void append_side(const KvfAppend& call, int b, int head) {
  const KvfPart& part = call.part;
  const KvfTensor& from = KEY ? call.k : call.v;
  const int32_t* table = pages_of(part, b, head);
  for (int t = 0; t < call.tokens; ++t) {
    const int position = call.first[b] + t;
    const int32_t page = table[position / part.page_size];
    if (page < 0) continue;
    const int slot = position % part.page_size;
    append_row<F, KEY>(KEY ? part.k : part.v, page, head, slot, from, row_of(from, b, head, t));
  }
}

static void append(const KvfAppend& call, int b, int head) {
  with_format(call.part.k.format, [&](auto f) { append_side<decltype(f), true>(call, b, head); });
  with_format(call.part.v.format, [&](auto f) { append_side<decltype(f), false>(call, b, head); });
}

struct AppendPlan {
  const KvfAppend* call;
  std::atomic<int64_t> next{0};
};

static void append_thread(void* data) {
  AppendPlan& plan = *(AppendPlan*)data;
  const KvfAppend& call = *plan.call;
  for (int64_t i; (i = plan.next.fetch_add(1)) < (int64_t)call.batch * call.num_kv_heads;)
    append(call, (int)(i / call.num_kv_heads), (int)(i % call.num_kv_heads));
}

static void append_all(const KvfAppend& call, KvfParallel parallel) {
  AppendPlan plan;
  plan.call = &call;
  const int64_t items = (int64_t)call.batch * call.num_kv_heads;
  if (call.threads <= 1 || items * call.tokens < 64) append_thread(&plan);
  else parallel(append_thread, &plan, (unsigned)std::min<int64_t>(call.threads, items), 0);
}

}  // namespace
