// Attention of a few queries over stored keys and values.
//
// A unit of work is (sequence, KV head, a run of keys): every key and value of it is read once,
// for all queries of the head's group. Units of one head are merged by whoever finishes last, by
// the split-KV identity: with m = max, o = sum_i 2^(m_i - m) o_i, l = sum_i 2^(m_i - m) l_i.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "latent.h"
#include "logits.h"
#include "soften.h"

namespace KVF_NAMESPACE {

// What attention asks of the format of a store's keys, or of its values.
template <class Math>
struct Stored {
  int dim;        // numbers of a row, padded
  int64_t bytes;  // of a block as it is multiplied
  void (*gather)(const KvfPart&, const Unit&, int first, uint64_t unseen, Spare&, Tile&);
  Math math;
};

static Stored<KeyMath> latent_keys(const KvfPart& part, int queries) {
  return with_words(part.k.format, queries, [&](auto f, auto w) -> Stored<KeyMath> {
    using W = decltype(w);
    return {round_up(part.k.dim, LATENT_STEP),
            BLOCK * 4 * row_words<W>(part.k.dim),
            find_latents<decltype(f), W, true>,
            {prepare_latents<W>, score_latents<W>}};
  });
}

static Stored<ValueMath> latent_values(const KvfPart& part, int queries) {
  return with_words(part.k.format, queries, [&](auto f, auto w) -> Stored<ValueMath> {
    using W = decltype(w);
    const int64_t pairs = W::numbers == 1 ? 0 : BLOCK / 2 * 4 * row_words<FloatWords>(part.v.dim);
    return {round_up(part.v.dim, 16), pairs, find_latents<decltype(f), W, false>, {add_latents<W>}};
  });
}

static Stored<KeyMath> stored_keys(const KvfPart& part, int queries) {
  if (is_latent(part)) return latent_keys(part, queries);
  return with_format(part.k.format, [&](auto f) -> Stored<KeyMath> {
    using F = decltype(f);
    return {stored_dim<F, true>(part.k.dim), block_bytes<F, true>(part.k.dim), gather<F, true>,
            F::key_math(queries)};
  });
}

static Stored<ValueMath> stored_values(const KvfPart& part, int queries) {
  if (is_latent(part)) return latent_values(part, queries);
  return with_format(part.v.format, [&](auto f) -> Stored<ValueMath> {
    using F = decltype(f);
    return {stored_dim<F, false>(part.v.dim), block_bytes<F, false>(part.v.dim), gather<F, false>,
            F::value_math(queries)};
  });
}

struct HeadWork {
  int32_t units = 0;
  int64_t first = 0;  // its first partial result
  std::atomic<int32_t> left{0};
};

struct Plan {
  const KvfAttend* call;
  int rows, padded;  // queries of a KV head; width of a partial result
  bool streams = false;
  std::vector<Unit> units;
  std::vector<HeadWork> heads;  // [B * Hkv]
  std::vector<float> partial;   // [unit][rows][padded + 2]: o, m, l
  std::atomic<int64_t> next{0};
};

struct Range {
  int32_t low, high;
};

// What a KV head's queries can see of a part: at most the sinks and the window.
static int visible(const KvfAttend& call, const KvfPart& part, int b, int head, Range out[2]) {
  const int start = call.start ? call.start[b] : 0, length = call.length[b];
  int low = begin_of(part, b, head), high = end_of(part, b, head);
  if (low < start) low = start;
  if (high > length) high = length;
  int count = 0;
  if (call.left >= 0) {
    const int64_t first = (int64_t)length - call.tokens - call.left;
    const int64_t sinks = (int64_t)start + call.sinks;
    const int sinks_end = sinks < high ? (int)sinks : high;
    if (first > sinks_end) {
      if (low < sinks_end) out[count++] = {low, sinks_end};
      if (first > low) low = (int)(first < high ? first : high);
    }
  }
  if (low < high) out[count++] = {low, high};
  return count;
}

static void make_plan(Plan& plan) {
  const KvfAttend& call = *plan.call;
  const int heads = call.num_kv_heads;
  plan.heads = std::vector<HeadWork>((size_t)call.batch * heads);
  int64_t keys = 0, bytes = 0, per_key[KVF_MAX_PARTS];
  Range ranges[2];
  for (int p = 0; p < call.num_parts; ++p)
    per_key[p] = (stored_keys(call.parts[p], call.q.format).bytes +
                  stored_values(call.parts[p], call.q.format).bytes) /
                 BLOCK;
  for (int b = 0; b < call.batch; ++b)
    for (int head = 0; head < heads; ++head)
      for (int p = 0; p < call.num_parts; ++p) {
        const int64_t before = keys;
        for (int i = 0, n = visible(call, call.parts[p], b, head, ranges); i < n; ++i)
          keys += ranges[i].high - ranges[i].low;
        bytes += (keys - before) * per_key[p];
      }
  plan.streams = bytes > OWN_CACHE * std::max(call.threads, 1);
  // About four units a thread even out what they take; a unit's first tile is not fetched ahead.
  int64_t chunk = call.chunk > 0 ? call.chunk : keys / (4 * (call.threads > 0 ? call.threads : 1));
  // A unit of many rows writes as many sums; it should read more. But every thread should have one.
  const int64_t worth = std::max(256, 2 * plan.rows), each = keys / std::max(call.threads, 1);
  if (call.chunk <= 0) chunk = std::max({chunk, std::min(worth, each), (int64_t)256});
  chunk = round_up((int)(chunk < (1 << 24) ? chunk : 1 << 24), TILE);
  int64_t count = 0;
  for (int b = 0; b < call.batch; ++b)
    for (int head = 0; head < heads; ++head) {
      HeadWork& work = plan.heads[(size_t)b * heads + head];
      work.first = count;
      for (int p = 0; p < call.num_parts; ++p)
        for (int i = 0, n = visible(call, call.parts[p], b, head, ranges); i < n; ++i)
          for (int64_t low = ranges[i].low; low < ranges[i].high;) {
            int64_t high = low / TILE * TILE + chunk;
            if (high + chunk / 4 > ranges[i].high) high = ranges[i].high;
            plan.units.push_back({b, head, p, (int)low, (int)high, work.units++});
            low = high;
          }
      work.left = work.units;
      count += work.units;
    }
  plan.partial.resize((size_t)count * plan.rows * (plan.padded + 2));
}

// Memory of one thread, for all of its units.
struct Scratch {
  Softmax softmax;
  Aligned<float> x, o;
  std::vector<float> unit;
  Aligned<uint16_t> bf16;
  Aligned<int8_t> high, low;
  std::vector<int32_t> sums;
  Spare spare;
  int sequence = -1, head = -1, part = -1;  // whose queries are prepared
  int panel = 0;                            // how many of them are interleaved
};

static void prepare_queries(const Plan& plan, const Unit& unit, const Stored<KeyMath>& stored,
                            Scratch& a, Queries& q) {
  const KvfAttend& call = *plan.call;
  const KvfSide& keys = call.parts[unit.part].k;
  const int group_size = call.num_heads / call.num_kv_heads;
  q.rows = plan.rows;
  q.dim = stored.dim;
  const size_t size = (size_t)round_up(q.rows, BLOCK) * q.dim;  // some are taken sixteen at once
  const bool ready = a.sequence == unit.b && a.head == unit.head && a.part == unit.part;
  if (!ready) {
    a.x.assign(size, 0.f);
    a.bf16.resize(size);
    a.high.resize(size);
    a.low.resize(size);
    a.unit.resize(q.rows);
    a.sums.resize((size_t)q.rows * 2 * (q.dim / LEAST_GROUP + 1));
    for (int r = 0; r < group_size; ++r)
      for (int t = 0; t < call.tokens; ++t) {
        float* x = &a.x[(size_t)(r * call.tokens + t) * q.dim];
        const void* row = row_of(call.q, unit.b, unit.head * group_size + r, t);
        load_row(call.q, row, keys.dim, x);
        if (keys.rotation) hadamard(x, q.dim, keys.rotation);
      }
  }
  q.scale = call.softcap > 0 ? call.scale : call.scale * LOG2E;
  q.x = a.x.data();
  q.bf16 = a.bf16.data();
  q.high = a.high.data();
  q.low = a.low.data();
  q.unit = a.unit.data();
  q.sums = a.sums.data();
  q.panel = a.panel;
  if (!ready) stored.math.prepare(q);
  a.panel = q.panel;
  a.sequence = unit.b;
  a.head = unit.head;
  a.part = unit.part;
}

// Turn scores into logits, and hide what a query may not see.
static void finish_scores(const Plan& plan, const Unit& unit, int first, int count, float* s) {
  const KvfAttend& call = *plan.call;
  const int group_size = call.num_heads / call.num_kv_heads;
  const int64_t oldest = (int64_t)call.length[unit.b] - call.tokens;
  if (is_plain(call, unit, oldest, oldest + call.tokens - 1, first, count)) return;
  for (int row = 0; row < plan.rows; ++row) {
    const int head = unit.head * group_size + row / call.tokens, t = row % call.tokens;
    finish_row(call, unit, head, t, oldest + t, first, count, s + row * TILE);
  }
}

// Which of a tile's tokens no row sees, bit by bit: their values may be anything, as 0 times NaN is
// NaN. Without a mask there are none within the unit.
static uint64_t unseen_by(int rows, int count, const float* s) {
  uint64_t found = 0;
  for (int j = 0; j < count; ++j) {
    bool hidden = true;
    for (int row = 0; row < rows && hidden; ++row) hidden = s[row * TILE + j] == -INFINITY;
    found |= (uint64_t)hidden << j;
  }
  return found;
}

// A head's sink logit s is a key without value: o, m and l become those of the keys and it.
static float add_sink(float s, float& m, float& l) {
  const float top = std::fmax(m, s * LOG2E);
  if (top == -INFINITY) return 0;  // nothing to see, and no sink
  const float decay = m == -INFINITY ? 0 : exp2f(m - top);
  l = l * decay + exp2f(s * LOG2E - top);
  m = top;
  return decay;
}

static void write(const Plan& plan, int b, int kv_head, int row, const float* o, float m, float l) {
  const KvfAttend& call = *plan.call;
  const int group_size = call.num_heads / call.num_kv_heads;
  const int head = kv_head * group_size + row / call.tokens, t = row % call.tokens;
  void* out = (void*)row_of(call.out, b, head, t);
  const bool nothing = l == 0;
  const float decay = call.sink_logits ? add_sink(call.sink_logits[head], m, l) : 1;
  if (nothing) memset(out, 0, (call.out.format == KVF_F32 ? 4 : 2) * (size_t)call.v_head_dim);
  else store_row(call.out, o, call.v_head_dim, decay / l, out);
  if (call.lse)
    call.lse[((int64_t)b * call.num_heads + head) * call.tokens + t] =
        l == 0 ? -INFINITY : (m + std::log2(l)) * 0.693147181f;
}

static void merge(const Plan& plan, int b, int head, const HeadWork& work, Scratch& a) {
  const int width = plan.padded + 2;
  for (int row = 0; row < plan.rows; ++row) {
    const float* parts = plan.partial.data() + (work.first * plan.rows + row) * width;
    const int64_t stride = (int64_t)plan.rows * width;
    float top = -INFINITY, l = 0;
    for (int i = 0; i < work.units; ++i) top = std::fmax(top, parts[i * stride + plan.padded]);
    a.o.assign(plan.padded, 0.f);
    for (int i = 0; i < work.units; ++i) {
      const float* part = parts + i * stride;
      const float weight = part[plan.padded] == -INFINITY ? 0 : exp2f(part[plan.padded] - top);
      l += weight * part[plan.padded + 1];
      if (part[plan.padded + 1] != 0)  // NaN included
        for (int d = 0; d < plan.padded; ++d) a.o[d] += weight * part[d];
    }
    write(plan, b, head, row, a.o.data(), top, l);
  }
}

static void run_unit(Plan& plan, const Unit& unit, Scratch& a) {
  const KvfAttend& call = *plan.call;
  const KvfPart& part = call.parts[unit.part];
  const Stored<KeyMath> keys = stored_keys(part, call.q.format);
  const Stored<ValueMath> values = stored_values(part, call.q.format);
  const int rows = plan.rows, padded = values.dim;
  Queries q;
  prepare_queries(plan, unit, keys, a, q);
  a.o.assign((size_t)rows * padded, 0.f);
  a.softmax.begin(rows);
  float* s = a.softmax.s.data();
  a.spare.blocks.resize(2 * TILE_BLOCKS * (keys.bytes + values.bytes));
  a.spare.scales.resize(2 * TILE_BLOCKS * BLOCK * (size_t)(KVF_MAX_DIM / LEAST_GROUP));
  for (int first = unit.low / BLOCK * BLOCK; first < unit.high; first += TILE) {
    Tile k{}, v{};
    k.streams = v.streams = plan.streams;
    const int left = (unit.high - first + BLOCK - 1) / BLOCK;
    k.blocks = v.blocks = left < TILE_BLOCKS ? left : TILE_BLOCKS;
    keys.gather(part, unit, first, 0, a.spare, k);
    keys.math.score(q, k, s);
    const int count = k.blocks * BLOCK;
    finish_scores(plan, unit, first, count, s);
    const uint64_t without = call.mask ? unseen_by(rows, count, s) : 0;
    soften(rows, count, a.softmax);
    values.gather(part, unit, first, without, a.spare, v);
    values.math.add(a.softmax.weights(rows), v, a.o.data());
  }
  HeadWork& work = plan.heads[(size_t)unit.b * call.num_kv_heads + unit.head];
  if (work.units == 1) {
    for (int row = 0; row < rows; ++row)
      write(plan, unit.b, unit.head, row, &a.o[(size_t)row * padded], a.softmax.m[row],
            a.softmax.l[row]);
    return;
  }
  for (int row = 0; row < rows; ++row) {
    float* to = plan.partial.data() + ((work.first + unit.slot) * rows + row) * (plan.padded + 2);
    memcpy(to, &a.o[(size_t)row * padded], sizeof(float) * call.v_head_dim);
    to[plan.padded] = a.softmax.m[row];
    to[plan.padded + 1] = a.softmax.l[row];
  }
  if (work.left.fetch_sub(1, std::memory_order_acq_rel) == 1)
    merge(plan, unit.b, unit.head, work, a);
}

static void attend_thread(void* data) {
  Plan& plan = *(Plan*)data;
  static thread_local Scratch scratch;
  scratch.sequence = -1;  // queries of an earlier call
  for (int64_t i; (i = plan.next.fetch_add(1)) < (int64_t)plan.units.size();)
    run_unit(plan, plan.units[i], scratch);
}

static void attend(const KvfAttend& call, KvfParallel parallel) {
  Plan plan;
  plan.call = &call;
  plan.rows = call.num_heads / call.num_kv_heads * call.tokens;
  plan.padded = call.v_head_dim;
  make_plan(plan);
  for (int b = 0; b < call.batch; ++b)
    for (int head = 0; head < call.num_kv_heads; ++head)
      if (!plan.heads[(size_t)b * call.num_kv_heads + head].units) {
        std::vector<float> zeros(call.v_head_dim, 0.f);
        for (int row = 0; row < plan.rows; ++row)
          write(plan, b, head, row, zeros.data(), -INFINITY, 0);
      }
  const int64_t threads = std::min<int64_t>(call.threads, plan.units.size());
  if (threads <= 1) attend_thread(&plan);
  else parallel(attend_thread, &plan, (unsigned)threads, 0);
}

}  // namespace
