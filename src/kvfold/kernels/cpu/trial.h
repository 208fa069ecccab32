// A call like another over made-up keys and values, to time copies of the kernels with.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "table.h"

// What decides which copy is fastest. Of many queries (see prefill.h), how many makes no difference.
struct CallKind {
  int32_t k_format, v_format, q_format, dim, v_dim;
  int32_t rows;  // queries that share a KV head; above eight the next multiple of eight; 0: many
  int32_t far;   // 1: few rows over more than the cores keep near, where memory's speed counts

  uint64_t key() const {  // never 0
    return 1 | (uint64_t)k_format << 1 | (uint64_t)v_format << 6 | (uint64_t)q_format << 11 |
           (uint64_t)dim << 13 | (uint64_t)v_dim << 24 | (uint64_t)rows << 35 | (uint64_t)far << 42;
  }
  static CallKind of_key(uint64_t key) {
    const auto bits = [&](int at, int n) { return (int32_t)(key >> at & ((1u << n) - 1)); };
    return {bits(1, 5),   bits(6, 5),  bits(11, 2), bits(13, 11),
            bits(24, 11), bits(35, 7), bits(42, 1)};
  }
};

constexpr int FAR_HEADS = 8;                 // of a thread
constexpr int FEW_ROWS = 8, MOST_ROWS = 64;  // rows by one, by eight; more are as so many

static int64_t token_bytes(const KvfPart& part, const IsaTable& table) {
  const int64_t values = values_within(part) ? 0 : table.block_bytes(part.v, false);
  return (table.block_bytes(part.k, true) + values) / KVF_BLOCK;
}

static bool reads_far(const KvfAttend& call, const IsaTable& table) {
  const KvfPart& part = call.parts[0];
  const int64_t window = call.left < 0 ? INT32_MAX : (int64_t)call.left + call.tokens + call.sinks;
  int64_t keys = 0;
  for (int b = 0; b < call.batch; ++b) {
    const int64_t held = end_of(part, b, 0) - begin_of(part, b, 0);
    keys += std::clamp<int64_t>(held, 0, window);
  }
  const int64_t near = OWN_CACHE * std::max(call.threads, 1);
  return keys * call.num_kv_heads * token_bytes(part, table) > near;
}

static CallKind kind_of(const KvfAttend& call, const IsaTable& table) {
  const KvfPart& part = call.parts[0];  // the main store, where there are several
  const int32_t formats[] = {part.k.format, part.v.format, call.q.format};
  CallKind kind{formats[0], formats[1], formats[2], call.head_dim, call.v_head_dim, 0, 0};
  if (call.tokens > KVF_MAX_TOKENS) return kind;
  const int rows = call.num_heads / call.num_kv_heads * call.tokens;
  kind.rows = rows <= FEW_ROWS ? rows : std::min((rows + 7) / 8 * 8, MOST_ROWS);
  kind.far = rows <= FEW_ROWS && reads_far(call, table);
  return kind;
}

// Over pages as large as those of the call, none after its neighbour, and where memory's speed counts
// some heads side by side. All memory is 0x3f, which makes an ordinary number in every format (0.75 in
// bfloat16), scales too: these are read where the numbers lie.
class Trial {
 public:
  Trial(const KvfAttend& like, const CallKind& kind, const IsaTable& table, KvfParallel parallel)
      : far(kind.far), parallel(parallel) {
    const int each = far ? std::min(like.num_kv_heads, FAR_HEADS) : 1;
    const int heads = std::max(like.threads, 1) * each, rows = kind.rows ? kind.rows : MOST_ROWS;
    const int wide = kind.dim + kind.v_dim;
    const int64_t bytes = std::max<int64_t>(token_bytes(like.parts[0], table), 1);
    const int64_t few = std::min<int64_t>(PRODUCTS / (rows * wide + 1), OWN_CACHE / 2 / bytes);
    const int64_t keys =
        std::clamp<int64_t>(far ? OWN_CACHE * 5 / 4 / bytes / each : few, 64, 1 << 16);
    length = (int32_t)(keys / 64 * 64);
    const int size = std::min(like.parts[0].page_size, length), count = (length + size - 1) / size;
    for (int i = 0; i < count; ++i) pages.push_back(i % 2 ? i / 2 : count - 1 - i / 2);
    stored.resize((size_t)heads * count * size * bytes + LINE);
    rest.assign((size_t)heads * rows * wide * 4 + LINE, BYTE);

    call.batch = 1;
    call.num_kv_heads = heads;
    call.num_heads = kind.rows ? heads * rows : heads;
    call.tokens = kind.rows ? 1 : rows;
    call.head_dim = kind.dim;
    call.v_head_dim = kind.v_dim;
    call.q = tensor(like.q.format, rest.data(), kind.dim);
    call.out =
        tensor(like.out.format, rest.data() + (size_t)heads * rows * kind.dim * 4, kind.v_dim);
    call.length = &length;
    call.scale = 1.f / (float)kind.dim;
    call.left = call.right = -1;
    call.num_parts = 1;
    call.threads = like.threads;
    KvfPart& part = call.parts[0];
    part.table = pages.data();
    part.page_size = size;
    part.end = &length;
    const int64_t key_bytes = table.block_bytes(like.parts[0].k, true) / KVF_BLOCK;
    uint8_t* begin = stored.data() + (LINE - (uintptr_t)stored.data() % LINE) % LINE;
    part.k = side(like.parts[0].k, key_bytes, begin);
    part.v = part.k;
    part.v.dim = like.parts[0].v.dim;
    if (!values_within(like.parts[0]))
      part.v = side(like.parts[0].v, bytes - key_bytes, begin + part.k.page_stride * count);
    fill();
  }

  const KvfAttend& asked() const { return call; }

  // How long one copy takes, with keys and values in memory or near the cores.
  double seconds(const IsaTable& table) {
    if (far) fill();
    const auto start = std::chrono::steady_clock::now();
    table.attend(call, parallel);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  static constexpr int64_t PRODUCTS = 1 << 20;  // of a thread: some 50 us
  static constexpr int64_t LINE = 64;
  static constexpr uint8_t BYTE = 0x3f;

  const bool far;
  const KvfParallel parallel;
  KvfAttend call{};
  int32_t length = 0;
  std::vector<int32_t> pages;  // not one after the other
  std::vector<uint8_t> stored, rest;
  std::atomic<int32_t> next{0};

  KvfTensor tensor(int32_t format, uint8_t* data, int dim) const {
    const int64_t tokens = call.tokens;
    return {data, format, 0, tokens * dim, dim};
  }

  KvfSide side(const KvfSide& like, int64_t bytes, uint8_t* data) const {
    KvfSide made = like;
    made.data = data;
    made.head_stride = call.parts[0].page_size * bytes;
    made.page_stride = call.num_kv_heads * made.head_stride;
    made.row_stride = bytes;  // rows that are not packed take no more
    made.scales = (uint16_t*)data;
    made.scale_head_stride = made.head_stride / 2;
    made.scale_page_stride = made.page_stride / 2;
    return made;
  }

  // Write keys and values past the caches, so that they are in memory alone; on all threads.
  void fill() {
    next = 0;
    parallel(fill_share, this, (unsigned)std::max(call.threads, 1), 0);
  }

  static void fill_share(void* data) {
    Trial& trial = *(Trial*)data;
    const int64_t threads = std::max(trial.call.threads, 1), i = trial.next.fetch_add(1);
    const int64_t lines = (int64_t)trial.stored.size() / LINE - 1;
    uint8_t* begin = trial.call.parts[0].k.data;
    write_past_caches(begin + lines * i / threads * LINE, begin + lines * (i + 1) / threads * LINE);
  }

  static void write_past_caches(uint8_t* begin, uint8_t* end) {
#if defined(__x86_64__)
    const __m128i bytes = _mm_set1_epi8(BYTE);
    for (; begin < end; begin += 16) _mm_stream_si128((__m128i*)begin, bytes);
    _mm_sfence();
#else
    memset(begin, BYTE, (size_t)(end - begin));
#endif
  }
};
