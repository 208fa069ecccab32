// Writing rows into a store: encoded, and put where the kernels read them.
#pragma once
#include <algorithm>
#include <atomic>

#include "encode.h"

namespace KVF_NAMESPACE {

static inline void append_row(const KvfSide& side, bool key, int64_t page, int head, int slot,
                              const KvfTensor& from, const void* source) {
  float x[KVF_MAX_DIM + 32] = {0};
  uint8_t row[4 * (KVF_MAX_DIM + 32)];
  uint16_t scales[KVF_MAX_DIM / GROUP + 1];
  const int padded = key ? key_dim(side.format, side.dim) : value_dim(side.format, side.dim);
  load_row(from, source, side.dim, x);
  if (side.rotation) hadamard(x, padded, side.rotation);
  // Only INT4's last group looks beyond the head, and zeros change no scale.
  encode_row(side.format, x, padded, row, scales);
  uint8_t* at = page_of(side, page, head);
  const int groups = scale_groups(side.format, side.dim);
  if (side.packed) {
    const int block = slot / BLOCK;
    if (key)
      place_key(side.format, side.dim, row, at + block * key_block_bytes(side.format, side.dim),
                slot % BLOCK);
    else
      place_value(side.format, side.dim, row, at + block * value_block_bytes(side.format, side.dim),
                  slot % BLOCK);
    uint16_t* s = groups ? scales_of(side, page, head) + (int64_t)block * groups * BLOCK : nullptr;
    for (int g = 0; g < groups; ++g) s[g * BLOCK + slot % BLOCK] = scales[g];
  } else {
    const int stored = side.format == KVF_INT4 ? padded : side.dim;
    memcpy(at + slot * side.row_stride, row, bytes_of(side.format, stored));
    uint16_t* s = groups ? scales_of(side, page, head) + (int64_t)slot * groups : nullptr;
    for (int g = 0; g < groups; ++g) s[g] = scales[g];
  }
}

static void append(const KvfAppend& call, int b, int head) {
  const KvfPart& part = call.part;
  for (int t = 0; t < call.tokens; ++t) {
    const int position = call.first[b] + t;
    const int32_t page = part.table[b * part.table_stride + position / part.page_size];
    if (page < 0) continue;
    const int slot = position % part.page_size;
    append_row(part.k, true, page, head, slot, call.k, row_of(call.k, b, head, t));
    append_row(part.v, false, page, head, slot, call.v, row_of(call.v, b, head, t));
  }
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
