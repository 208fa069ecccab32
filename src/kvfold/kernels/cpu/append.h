// Writing rows into a store: encoded, and put where the kernels read them.
#pragma once
#include <algorithm>
#include <atomic>

#include "formats.h"
#include "rows.h"

namespace KVF_NAMESPACE {

// A row as its format has it; in `room`, unless it is so already.
template <class F, bool KEY>
static INLINE const uint8_t* encoded_row(const KvfSide& side, const KvfTensor& from,
                                         const void* source, uint8_t* room, uint16_t* scales) {
  if (F::group == NO_SCALES && from.format == F::code && !side.rotation)
    return (const uint8_t*)source;
  float x[KVF_MAX_DIM];
  const int padded = stored_dim<F, KEY>(side.dim);
  load_row(from, source, side.dim, x);
  for (int i = side.dim; i < padded; ++i) x[i] = 0;
  if (side.rotation) hadamard(x, padded, side.rotation);
  // Only the last group looks beyond the head, and zeros change no scale.
  F::encode(x, padded, room, scales);
  return room;
}

// The new keys, or values, of one head of one sequence.
template <class F, bool KEY>
struct Appending {
  const KvfAppend& call;
  const KvfSide& side;
  const KvfTensor& from;
  const int b, head, groups;

  Appending(const KvfAppend& call, int b, int head)
      : call(call), side(KEY ? call.part.k : call.part.v), from(KEY ? call.k : call.v), b(b),
        head(head), groups(scale_groups<F>(side.dim)) {}

  const void* source(int position) const { return row_of(from, b, head, position - call.first[b]); }

  void row(int64_t page, int slot, int position) const {
    uint8_t room[4 * KVF_MAX_DIM];
    uint16_t scales[KVF_MAX_DIM / LEAST_GROUP];
    const int dim = side.dim;
    const uint8_t* row = encoded_row<F, KEY>(side, from, source(position), room, scales);
    uint8_t* at = page_of(side, page, head);
    if (side.packed) {
      const int block = slot / BLOCK;
      place_row<F, KEY>(dim, row, at + block * block_bytes<F, KEY>(dim), slot % BLOCK);
      uint16_t* s =
          groups ? scales_of(side, page, head) + (int64_t)block * groups * BLOCK : nullptr;
      for (int g = 0; g < groups; ++g) s[g * BLOCK + slot % BLOCK] = scales[g];
    } else {
      memcpy(at + slot * side.row_stride, row,
             bytes_of<F>(GROUPED<F> ? stored_dim<F, KEY>(dim) : dim));
      uint16_t* s = groups ? scales_of(side, page, head) + (int64_t)slot * groups : nullptr;
      for (int g = 0; g < groups; ++g) s[g] = scales[g];
    }
  }

  // All tokens of a packed block at once.
  void block(int64_t page, int slot, int position) const {
    uint8_t room[BLOCK][4 * KVF_MAX_DIM];
    uint16_t scales[BLOCK][KVF_MAX_DIM / LEAST_GROUP];
    const uint8_t* rows[BLOCK];
    const int64_t block = slot / BLOCK;
    for (int i = 0; i < BLOCK; ++i)
      rows[i] = encoded_row<F, KEY>(side, from, source(position + i), room[i], scales[i]);
    place_rows<F, KEY>(side.dim, rows,
                       page_of(side, page, head) + block * block_bytes<F, KEY>(side.dim));
    uint16_t* s = groups ? scales_of(side, page, head) + block * groups * BLOCK : nullptr;
    for (int g = 0; g < groups; ++g)
      for (int i = 0; i < BLOCK; ++i) s[g * BLOCK + i] = scales[i][g];
  }

  void positions(int low, int high) const {
    const int size = call.part.page_size;
    const int32_t* table = pages_of(call.part, b, head);
    for (int at = low; at < high;) {
      const int page = table[at / size], slot = at % size;
      const bool whole = side.packed && slot % BLOCK == 0 && at + BLOCK <= high;
      if (page >= 0 && whole) block(page, slot, at);
      else if (page >= 0) row(page, slot, at);
      at += whole ? BLOCK : 1;
    }
  }
};

struct AppendPlan {
  const KvfAppend* call;
  int piece, pieces;  // positions that are written together; pieces of a sequence's head
  std::atomic<int64_t> next{0};
};

// Pieces begin where blocks do: two threads never write to the same byte.
static void append_piece(const AppendPlan& plan, int b, int head, int piece) {
  const KvfAppend& call = *plan.call;
  const int64_t first = call.first[b], begin = first / BLOCK * BLOCK + (int64_t)piece * plan.piece;
  const int low = (int)std::max(begin, first);
  const int high = (int)std::min(begin + plan.piece, first + call.tokens);
  with_format(call.part.k.format,
              [&](auto f) { Appending<decltype(f), true>(call, b, head).positions(low, high); });
  with_format(call.part.v.format,
              [&](auto f) { Appending<decltype(f), false>(call, b, head).positions(low, high); });
}

static void append_thread(void* data) {
  AppendPlan& plan = *(AppendPlan*)data;
  const KvfAppend& call = *plan.call;
  const int64_t heads = (int64_t)call.batch * call.num_kv_heads;
  for (int64_t i; (i = plan.next.fetch_add(1)) < heads * plan.pieces;) {
    const int64_t at = i / plan.pieces;
    append_piece(plan, (int)(at / call.num_kv_heads), (int)(at % call.num_kv_heads),
                 (int)(i % plan.pieces));
  }
}

static void append_all(const KvfAppend& call, KvfParallel parallel) {
  AppendPlan plan;
  plan.call = &call;
  const int64_t heads = (int64_t)call.batch * call.num_kv_heads, rows = heads * call.tokens;
  const int threads = rows < 64 ? 1 : std::max(call.threads, 1);
  // About four pieces a thread, of whole blocks.
  const int64_t each = threads == 1 ? call.tokens : rows / (4 * threads);
  plan.piece = round_up((int)std::clamp<int64_t>(each, 1, 1 << 24), BLOCK);
  plan.pieces = (int)((call.tokens + BLOCK - 1 + (int64_t)plan.piece - 1) / plan.piece);
  const int64_t items = heads * plan.pieces;
  if (threads == 1) append_thread(&plan);
  else parallel(append_thread, &plan, (unsigned)std::min<int64_t>(threads, items), 0);
}

}  // namespace
