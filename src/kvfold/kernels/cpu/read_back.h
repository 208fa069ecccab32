// Stored keys and values back as rows of plain numbers.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "convert.h"
#include "tile.h"

namespace KVF_NAMESPACE {

constexpr int READ_AT_ONCE = 4 * TILE;  // positions of a unit of work

struct ReadBackPlan {
  const KvfReadBack* call;
  int pieces;  // units of a sequence's KV head
  std::atomic<int64_t> next{0};
};

struct ReadBackScratch {
  Spare spare;
  std::vector<float> floats, rows;  // a block; its keys, row by row
};

// [dim][16 tokens] -> [16 tokens][dim].
static void turn_keys(const float* block, int dim, float* rows) {
  int d = 0;
#if defined(__AVX512F__)
  for (; d + 16 <= dim; d += 16) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(block + (d + i) * BLOCK);
    transpose16(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(rows + i * dim + d, r[i]);
  }
#endif
  for (; d < dim; ++d)
    for (int i = 0; i < BLOCK; ++i) rows[i * dim + d] = block[d * BLOCK + i];
}

// A block's rows as floats, `stride` apart; rotated back.
template <class F, bool KEY>
static const float* rows_of(const KvfSide& side, const Tile& tile, int i, ReadBackScratch& a,
                            int& stride) {
  uint8_t* floats = (uint8_t*)a.floats.data();
  if constexpr (!KEY) {
    stride = round_up(side.dim, 16);
    convert_values<F, Fp32>(side.dim, tile.block[i], tile.scales[i], floats);
    return a.floats.data();
  }
  stride = stored_dim<F, true>(side.dim);
  convert_keys<F, Fp32>(side.dim, tile.block[i], tile.scales[i], floats);
  turn_keys(a.floats.data(), stride, a.rows.data());
  for (int slot = 0; slot < BLOCK && side.rotation; ++slot)
    hadamard(&a.rows[(size_t)slot * stride], stride, side.rotation);
  return a.rows.data();
}

template <class F, bool KEY>
static void read_side(const KvfReadBack& call, const Unit& unit, ReadBackScratch& a) {
  const KvfSide& side = KEY ? call.part.k : call.part.v;
  const KvfTensor& to = KEY ? call.k : call.v;
  const size_t numbers = (size_t)BLOCK * (stored_dim<F, KEY>(side.dim) + BLOCK);
  a.floats.resize(numbers);
  a.rows.resize(numbers);
  a.spare.blocks.resize(4 * TILE_BLOCKS * block_bytes<F, KEY>(side.dim));
  a.spare.scales.resize(2 * TILE_BLOCKS * BLOCK * (size_t)(KVF_MAX_DIM / LEAST_GROUP));
  for (int first = unit.low / BLOCK * BLOCK; first < unit.high; first += TILE) {
    Tile tile{};
    tile.blocks = std::min((unit.high - first + BLOCK - 1) / BLOCK, TILE_BLOCKS);
    gather<F, KEY>(call.part, unit, first, 0, a.spare, tile);
    for (int i = 0; i < tile.blocks; ++i) {
      int stride;
      const int begin = first + i * BLOCK;
      const float* rows = rows_of<F, KEY>(side, tile, i, a, stride);
      for (int at = std::max(begin, unit.low); at < std::min(begin + BLOCK, unit.high); ++at)
        store_row(to, rows + (at - begin) * stride, side.dim, 1,
                  (void*)row_of(to, unit.b, unit.head, at));
    }
  }
}

static void read_back_thread(void* data) {
  ReadBackPlan& plan = *(ReadBackPlan*)data;
  const KvfReadBack& call = *plan.call;
  static thread_local ReadBackScratch scratch;
  const int64_t heads = (int64_t)call.batch * call.num_kv_heads;
  for (int64_t i; (i = plan.next.fetch_add(1)) < heads * plan.pieces;) {
    const int64_t at = i / plan.pieces;
    const int b = (int)(at / call.num_kv_heads), head = (int)(at % call.num_kv_heads);
    const int first = (int)(i % plan.pieces) * READ_AT_ONCE;
    const int low = std::max(begin_of(call.part, b, head), first);
    const int high = std::min({end_of(call.part, b, head), call.keys, first + (int)READ_AT_ONCE});
    if (low >= high) continue;
    const Unit unit{b, head, 0, low, high, 0};
    with_format(call.part.k.format,
                [&](auto f) { read_side<decltype(f), true>(call, unit, scratch); });
    with_format(call.part.v.format,
                [&](auto f) { read_side<decltype(f), false>(call, unit, scratch); });
  }
}

static void read_back(const KvfReadBack& call, KvfParallel parallel) {
  ReadBackPlan plan;
  plan.call = &call;
  plan.pieces = (call.keys + READ_AT_ONCE - 1) / READ_AT_ONCE;
  const int64_t units = (int64_t)call.batch * call.num_kv_heads * plan.pieces;
  const int64_t threads = std::min<int64_t>(call.threads, units);
  if (threads <= 1) read_back_thread(&plan);
  else parallel(read_back_thread, &plan, (unsigned)threads, 0);
}

}  // namespace
