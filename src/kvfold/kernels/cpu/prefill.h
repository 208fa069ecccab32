// Attention of many queries over stored keys and values, as prompts bring them: bound by arithmetic.
//
// A unit of work is (sequence, KV head, some queries in a row) over all keys that these see. Tiles
// of keys and values become numbers that the machine multiplies as they lie, once for all rows of
// the unit: bfloat16 where there is an instruction for it and the queries are, else floats. What
// lies so already is used in place. Rows are token after token, so that those who see a tile of
// keys follow one another, and nobody else is computed.
#pragma once
#include "attend.h"
#include "convert.h"

namespace KVF_NAMESPACE {

constexpr int SPAN = 4;  // tiles between two looks at the largest score so far

struct Prefill {
  const KvfAttend* call;
  int group, tokens;  // query heads of a KV head; queries of a unit
  int64_t blocks;     // units of a sequence's KV head
  std::atomic<int64_t> next{0};
};

// The queries of a unit: `tokens` of them, of which the first stands at `position`.
struct Block {
  int b, head, first, tokens;
  int64_t position;
};

// One side of a store as it is multiplied.
struct Multiplied {
  int dim;              // numbers of a row of keys, padded
  int64_t bytes, room;  // of a block as it lies, and as it is multiplied
  void (*load)(const KvfPart&, const Unit&, int first, uint64_t unseen, Spare&, uint8_t* room,
               Tile&);
};

// Find a tile's blocks, and convert them into `room` unless they can be multiplied where they lie.
template <class F, class To, bool KEY>
static void load_tile(const KvfPart& part, const Unit& unit, int first, uint64_t unseen,
                      Spare& spare, uint8_t* room, Tile& tile) {
  gather<F, KEY>(part, unit, first, unseen, spare, tile);
  tile.next[0] = nullptr;
  if constexpr (F::code != To::code) {
    const int dim = KEY ? part.k.dim : part.v.dim;
    const int64_t bytes = block_bytes<To, KEY>(KEY ? stored_dim<F, true>(dim) : dim);
    for (int i = 0; i < tile.blocks; ++i) {
      uint8_t* to = room + i * bytes;
      if constexpr (KEY) convert_keys<F, To>(dim, tile.block[i], tile.scales[i], to);
      else convert_values<F, To>(dim, tile.block[i], tile.scales[i], to);
      tile.block[i] = to;
    }
  }
}

// In place of a format: rows of latents as words.
template <class W>
struct Latents {
  static KeyMath key_math(int) { return {prepare_latents<W>, score_latents<W>}; }
  static ValueMath value_math(int) { return {add_latents<W>}; }
};

template <class F, class W, bool KEY>
static void load_latents(const KvfPart& part, const Unit& unit, int first, uint64_t unseen,
                         Spare& spare, uint8_t*, Tile& tile) {
  find_latents<F, W, KEY>(part, unit, first, unseen, spare, tile);
  if constexpr (!KEY) decode_latents(tile, part.k.dim, 0, tile.blocks * BLOCK);
}

template <bool KEY, class W>
static Multiplied multiplied(Latents<W>, const KvfPart& part) {
  const int queries = W::numbers == 2 ? KVF_BF16 : KVF_F32;
  return with_words(part.k.format, queries, [&](auto f, auto) -> Multiplied {
    const Stored<KeyMath> keys = latent_keys(part, queries);
    const int64_t bytes = KEY ? keys.bytes : latent_values(part, queries).bytes;
    return {keys.dim, bytes, 0, load_latents<decltype(f), W, KEY>};
  });
}

template <bool KEY, class To>
static Multiplied multiplied(To, const KvfPart& part) {
  const KvfSide& side = KEY ? part.k : part.v;
  return with_format(side.format, [&](auto f) -> Multiplied {
    using F = decltype(f);
    const int dim = KEY ? stored_dim<To, true>(stored_dim<F, true>(side.dim)) : side.dim;
    return {dim, block_bytes<F, KEY>(side.dim), block_bytes<To, KEY>(dim), load_tile<F, To, KEY>};
  });
}

// Memory of one thread, for all of its units.
struct PrefillScratch {
  Aligned<float> x, o, s, m, l, ones;
  std::vector<uint16_t> bf16;
  std::vector<uint8_t> room;
  Spare spare;
};

// What the queries of a block see of a part: at most the sinks and the window.
static int visible(const KvfAttend& call, const KvfPart& part, const Block& block, Range out[2]) {
  const int64_t start = call.start ? call.start[block.b] : 0;
  int64_t low = std::max<int64_t>(begin_of(part, block.b, block.head), start);
  int64_t high = std::min(end_of(part, block.b, block.head), call.length[block.b]);
  if (call.right >= 0) high = std::min(high, block.position + block.tokens + call.right);
  int count = 0;
  if (call.left >= 0) {
    const int64_t first = block.position - call.left;
    const int64_t sinks_end = std::min(start + call.sinks, high);
    if (first > sinks_end) {
      if (low < sinks_end) out[count++] = {(int32_t)low, (int32_t)sinks_end};
      low = std::max(low, first);
    }
  }
  if (low < high) out[count++] = {(int32_t)low, (int32_t)high};
  return count;
}

// The tokens of a block that see some of the keys first <= j < end.
static Range who_sees(const KvfAttend& call, const Block& block, int64_t first, int64_t end) {
  const int64_t start = call.start ? call.start[block.b] : 0;
  int64_t from = 0, to = block.tokens;
  if (call.right >= 0) from = std::max<int64_t>(from, first - call.right - block.position);
  if (call.left >= 0 && first >= start + call.sinks)
    to = std::min(to, end + call.left - block.position);
  from = std::min<int64_t>(from, block.tokens);
  return {(int32_t)from, (int32_t)std::max(from, to)};
}

// Up to SPAN tiles whose scores are in flight; rows `from <= row < to` see something of a tile.
struct Span {
  int tiles = 0;
  int first[SPAN], blocks[SPAN], from[SPAN], to[SPAN];
};

// A row's scores to weights 2^(s - max); what was summed so far decays.
static void soften_row(const Span& span, int rows, int row, float* s, int padded, float* o,
                       float& m, float& l) {
  float* seen[SPAN];
  int counts[SPAN], tiles = 0;
  for (int i = 0; i < span.tiles; ++i)
    if (row >= span.from[i] && row < span.to[i]) {
      seen[tiles] = s + ((int64_t)i * rows + row) * TILE;
      counts[tiles++] = span.blocks[i] * BLOCK;
    }
  if (!tiles) return;
  F16x top = load(seen[0]);
  for (int i = 0; i < tiles; ++i)
    for (int j = 0; j < counts[i]; j += 16) top = max(top, load(seen[i] + j));
  const float before = m, now = std::max(before, reduce_max(top));
  const F16x base = splat(now == -INFINITY ? 0 : now);
  F16x sum = splat(0);
  for (int i = 0; i < tiles; ++i)
    for (int j = 0; j < counts[i]; j += 16) {
      const F16x p = exp2_nonpositive(load(seen[i] + j) - base);
      store(seen[i] + j, p);
      sum = sum + p;
    }
  if (before != now) {
    const F16x decay = splat(before == -INFINITY ? 0 : exp2f(before - now));
    for (int d = 0; d < padded; d += 16) store(o + d, load(o + d) * decay);
    l *= decay.v[0][0];
    m = now;
  }
  l += reduce_add(sum);
}

// What the rows of a block have summed up, and what they do it with.
template <class To>
struct Rows {
  const Prefill& plan;
  const Block& block;
  PrefillScratch& a;
  Queries q;
  int rows, padded;  // padded: numbers of a row of outputs
};

// Load the queries as keys of a part need them.
template <class To>
static void prepare_rows(Rows<To>& r, const KvfSide& keys, int dim) {
  const KvfAttend& call = *r.plan.call;
  r.a.x.assign((size_t)round_up(r.rows, BLOCK) * dim, 0.f);  // some are taken sixteen at once
  r.a.bf16.resize(r.a.x.size());
  for (int row = 0; row < r.rows; ++row) {
    float* x = &r.a.x[(size_t)row * dim];
    const int head = r.block.head * r.plan.group + row % r.plan.group;
    const int t = r.block.first + row / r.plan.group;
    load_row(call.q, row_of(call.q, r.block.b, head, t), keys.dim, x);
    if (keys.rotation) hadamard(x, dim, keys.rotation);
  }
  r.q.rows = r.rows;
  r.q.dim = dim;
  r.q.scale = call.softcap > 0 ? call.scale : call.scale * LOG2E;
  r.q.x = r.a.x.data();
  r.q.bf16 = r.a.bf16.data();
  r.q.panel = 1;
  To::key_math(call.q.format).prepare(r.q);
}

template <class To>
static void score_tile(Rows<To>& r, const KvfPart& part, const Unit& unit, const Multiplied& keys,
                       Span& span, int i, float* s) {
  const KvfAttend& call = *r.plan.call;
  const int first = span.first[i], count = span.blocks[i] * BLOCK;
  Tile tile{};
  tile.blocks = span.blocks[i];
  keys.load(part, unit, first, 0, r.a.spare, r.a.room.data(), tile);
  Queries some = r.q;
  const int from = span.from[i] / some.panel * some.panel;  // what is not asked for is not read
  some.rows = span.to[i] - from;
  some.x += (int64_t)from * r.q.dim;
  some.bf16 += (int64_t)from * r.q.dim;
  To::key_math(call.q.format).score(some, tile, s + from * TILE);
  for (int row = span.from[i]; row < span.to[i]; ++row) {
    const int t = row / r.plan.group, head = r.block.head * r.plan.group + row % r.plan.group;
    finish_row(call, unit, head, r.block.first + t, r.block.position + t, first, count,
               s + row * TILE);
  }
}

template <class To>
static void run_span(Rows<To>& r, const KvfPart& part, const Unit& unit, const Multiplied& keys,
                     const Multiplied& values, Span& span) {
  const int64_t size = (int64_t)r.rows * TILE;
  float* s = r.a.s.data();
  for (int i = 0; i < span.tiles; ++i) score_tile(r, part, unit, keys, span, i, s + i * size);
  uint64_t without[SPAN] = {};
  for (int i = 0; i < span.tiles && r.plan.call->mask; ++i)
    without[i] = unseen_by(span.to[i] - span.from[i], span.blocks[i] * BLOCK,
                           s + i * size + span.from[i] * TILE);
  for (int row = 0; row < r.rows; ++row)
    soften_row(span, r.rows, row, s, r.padded, &r.a.o[(size_t)row * r.padded], r.a.m[row],
               r.a.l[row]);
  for (int i = 0; i < span.tiles; ++i) {
    const int from = span.from[i];
    Tile tile{};
    tile.blocks = span.blocks[i];
    values.load(part, unit, span.first[i], without[i], r.a.spare, r.a.room.data(), tile);
    const float* ones = r.a.ones.data();  // nothing decays
    Weights weights{};
    weights.rows = span.to[i] - from;
    weights.p = s + i * size + from * TILE;
    weights.decay = ones;
    To::value_math(r.plan.call->q.format).add(weights, tile, &r.a.o[(size_t)from * r.padded]);
  }
}

template <class To>
static void run_part(Rows<To>& r, const KvfPart& part) {
  const KvfAttend& call = *r.plan.call;
  Range ranges[2];
  const int count = visible(call, part, r.block, ranges);
  if (!count) return;
  const Multiplied keys = multiplied<true>(To(), part), values = multiplied<false>(To(), part);
  prepare_rows(r, part.k, keys.dim);
  r.a.spare.blocks.resize(2 * TILE_BLOCKS * (keys.bytes + values.bytes));
  r.a.spare.scales.resize(2 * TILE_BLOCKS * BLOCK * (size_t)(KVF_MAX_DIM / LEAST_GROUP));
  r.a.room.resize(TILE_BLOCKS * std::max(keys.room, values.room));
  for (int i = 0; i < count; ++i) {
    const Unit unit{r.block.b, r.block.head, 0, ranges[i].low, ranges[i].high, 0};
    for (int first = unit.low / BLOCK * BLOCK; first < unit.high;) {
      Span span;
      for (; span.tiles < SPAN && first < unit.high; first += TILE) {
        const int n = span.tiles, left = (unit.high - first + BLOCK - 1) / BLOCK;
        const Range seeing = who_sees(call, r.block, first, (int64_t)first + TILE);
        span.first[n] = first;
        span.blocks[n] = std::min(left, TILE_BLOCKS);
        span.from[n] = seeing.low * r.plan.group;
        span.to[n] = seeing.high * r.plan.group;
        span.tiles += seeing.low < seeing.high;
      }
      run_span(r, part, unit, keys, values, span);
    }
  }
}

template <class To>
static void write_row(const Rows<To>& r, int row) {
  const KvfAttend& call = *r.plan.call;
  const int t = r.block.first + row / r.plan.group;
  const int head = r.block.head * r.plan.group + row % r.plan.group;
  void* out = (void*)row_of(call.out, r.block.b, head, t);
  float m = r.a.m[row], l = r.a.l[row];
  const bool nothing = l == 0;
  const float decay = call.sink_logits ? add_sink(call.sink_logits[head], m, l) : 1;
  if (nothing) memset(out, 0, (call.out.format == KVF_F32 ? 4 : 2) * (size_t)call.v_head_dim);
  else store_row(call.out, &r.a.o[(size_t)row * r.padded], call.v_head_dim, decay / l, out);
  if (call.lse)
    call.lse[((int64_t)r.block.b * call.num_heads + head) * call.tokens + t] =
        l == 0 ? -INFINITY : (m + std::log2(l)) * 0.693147181f;
}

template <class To>
static void run_block(const Prefill& plan, const Block& block, PrefillScratch& a) {
  Rows<To> r{plan, block, a, {}, block.tokens * plan.group, round_up(plan.call->v_head_dim, 16)};
  a.o.assign((size_t)r.rows * r.padded, 0.f);
  a.s.resize((size_t)SPAN * r.rows * TILE);
  a.m.assign(r.rows, -INFINITY);
  a.l.assign(r.rows, 0.f);
  a.ones.assign(r.rows, 1.f);
  for (int p = 0; p < plan.call->num_parts; ++p) run_part(r, plan.call->parts[p]);
  for (int row = 0; row < r.rows; ++row) write_row(r, row);
}

static void run_block(const Prefill& plan, const Block& block, PrefillScratch& scratch) {
  const KvfAttend& call = *plan.call;
  if (is_latent(call))
    return with_words(call.parts[0].k.format, call.q.format,
                      [&](auto, auto w) { run_block<Latents<decltype(w)>>(plan, block, scratch); });
#if defined(__AVX512BF16__)
  if (call.q.format == KVF_BF16) return run_block<Bf16>(plan, block, scratch);
#endif
  run_block<Fp32>(plan, block, scratch);
}

static void prefill_thread(void* data) {
  Prefill& plan = *(Prefill*)data;
  const KvfAttend& call = *plan.call;
  static thread_local PrefillScratch scratch;
  const int64_t units = plan.blocks * call.batch * call.num_kv_heads;
  for (int64_t i; (i = plan.next.fetch_add(1)) < units;) {
    // The last queries see the most keys: those who come last should have little to do.
    const int64_t heads = (int64_t)call.batch * call.num_kv_heads;
    const int first = (int)(plan.blocks - 1 - i / heads) * plan.tokens;
    const int b = (int)(i % heads / call.num_kv_heads), head = (int)(i % call.num_kv_heads);
    const Block block{b, head, first, std::min(plan.tokens, call.tokens - first),
                      (int64_t)call.length[b] - call.tokens + first};
    run_block(plan, block, scratch);
  }
}

constexpr int PREFILL_ROWS = 256, PREFILL_NUMBERS = 1 << 15;  // of a unit, at most
constexpr int LATENT_ROWS = 128;  // the same, where decoding a tile costs more than fetching sums

static void prefill(const KvfAttend& call, KvfParallel parallel) {
  Prefill plan;
  plan.call = &call;
  plan.group = call.num_heads / call.num_kv_heads;
  const int wide = std::max(call.head_dim, call.v_head_dim);
  const int rows = is_latent(call) ? LATENT_ROWS : std::min(PREFILL_ROWS, PREFILL_NUMBERS / wide);
  plan.tokens = std::clamp(rows / plan.group, 1, std::max(call.tokens, 1));
  plan.blocks = (call.tokens + plan.tokens - 1) / plan.tokens;
  const int64_t units = plan.blocks * call.batch * call.num_kv_heads;
  const int64_t threads = std::min<int64_t>(call.threads, units);
  if (threads <= 1) prefill_thread(&plan);
  else parallel(prefill_thread, &plan, (unsigned)threads, 0);
}

// Few queries read each key once; many compute with it.
static void attend_any(const KvfAttend& call, KvfParallel parallel) {
  if (call.tokens > KVF_MAX_TOKENS) prefill(call, parallel);
  else attend(call, parallel);
}

}  // namespace
