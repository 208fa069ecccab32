// Latents: rows of one buffer that are keys as a whole, and values in their first numbers. All query
// heads share them, so that products bind. A tile's rows are decoded once, into words of a float or
// of two bfloat16, and both products use them as they lie:
//   scores: four words of a row of keys, the same in each quad of a register, times the same words
//   of as many queries as it has quads; nothing is transposed, and sums end in few shuffles;
//   values: a weight times a row; pairs of rows, interleaved, where words are pairs.
#pragma once
#include "latent_amx.h"
#include "latent_words.h"
#include "tile.h"

namespace KVF_NAMESPACE {

static bool is_latent(const KvfPart& part) {
  const bool whole = with_format(part.k.format, [](auto f) { return !GROUPED<decltype(f)>; });
  return whole && values_within(part) && !part.k.rotation && !part.v.rotation;
}
static bool is_latent(const KvfAttend& call) {
  return call.num_parts == 1 && is_latent(call.parts[0]);
}

// f(format, words) of a latent's format, and of words that hold its numbers exactly, and the queries'.
template <class Function>
static INLINE auto with_words(int code, int queries, Function f) {
  return with_format(code, [&](auto format) {
    using F = decltype(format);
#if defined(KVF_PAIRS)
    if constexpr (!GROUPED<F> && (F::bits == 8 || F::code == KVF_BF16))
      if (queries == KVF_BF16) return f(format, PairWords());
#endif
    (void)queries;
    if constexpr (GROUPED<F>) {
      __builtin_unreachable();
      return f(Fp32(), FloatWords());
    } else {
      return f(format, FloatWords());
    }
  });
}

template <class F, class W>
static INLINE void decode_row(const uint8_t* row, int dim, uint32_t* to) {
  constexpr int bytes = F::bits / 8;
  int i = 0;
  for (; i + 16 <= dim; i += 16) W::template put<F>(row + i * bytes, to, i);
  if (i == dim) return;
  uint8_t rest[16 * bytes] = {0};
  memcpy(rest, row + i * bytes, (dim - i) * bytes);
  W::template put<F>(rest, to, i);
}

static INLINE void zero_row(int i, int64_t words, uint32_t* rows, uint16_t* scales) {
  memset(rows + i * words, 0, 4 * words);
  if (scales) scales[i] = 0;
}

// The rows of a tile, as words; zeros for tokens outside the unit, whose memory may hold anything.
template <class F, class W>
static void gather_latents(const KvfPart& part, const Unit& unit, int first, uint64_t, Spare& spare,
                           Tile& tile) {
  const KvfSide& side = part.k;
  const int words = row_words<W>(side.dim);
  uint32_t* rows = (uint32_t*)spare.blocks.data();
  uint16_t* scales = F::group == NO_SCALES ? nullptr : spare.scales.data();
  const int32_t* page = pages_of(part, unit.b, unit.head) + first / part.page_size;
  int at = first % part.page_size;
  for (int i = 0; i < tile.blocks * BLOCK; ++i) {
    const int position = first + i;
    const bool inside = position >= unit.low && position < unit.high;
    if (inside && *page >= 0) {
      const uint8_t* row = page_of(side, *page, unit.head) + at * side.row_stride;
      decode_row<F, W>(row, side.dim, rows + (int64_t)i * words);
      if (scales) scales[i] = scales_of(side, *page, unit.head)[at];
    } else {
      zero_row(i, words, rows, scales);
    }
    if (++at < part.page_size) continue;
    at = 0;
    ++page;
  }
  tile.dim = side.dim;
  tile.stride = words;
  tile.block[0] = (const uint8_t*)rows;
  for (int i = 0; i < tile.blocks; ++i) tile.scales[i] = scales ? scales + i * BLOCK : nullptr;
}

// The same tile as values, after `gather_latents`, without what nobody sees.
template <class F, class W>
static void reuse_latents(const KvfPart& part, const Unit&, int, uint64_t unseen, Spare& spare,
                          Tile& tile) {
  const int words = row_words<W>(part.k.dim);
  uint32_t* rows = (uint32_t*)spare.blocks.data();
  uint16_t* scales = F::group == NO_SCALES ? nullptr : spare.scales.data();
  for (int i = 0; i < tile.blocks * BLOCK; ++i)
    if (unseen >> i & 1) zero_row(i, words, rows, scales);
  tile.dim = part.v.dim;
  tile.stride = words;
  if constexpr (W::numbers == 2) {
    uint32_t* pairs = rows + spare.blocks.size() / 8;
    tile.stride = row_words<FloatWords>(part.v.dim);
    for (int i = 0; i < tile.blocks * BLOCK; i += 2)
      W::interleave((uint16_t*)(rows + (int64_t)i * words), words, part.v.dim,
                    pairs + i / 2 * tile.stride);
    rows = pairs;
  }
  tile.block[0] = (const uint8_t*)rows;
  for (int i = 0; i < tile.blocks; ++i) tile.scales[i] = scales ? scales + i * BLOCK : nullptr;
}

// Four words of each of `panel` queries side by side: [dim / numbers / 4][panel][4], in their place.
template <class W>
static void prepare_latents(Queries& q) {
  q.panel = QUADS;
  W::round_queries(q);
#if defined(KVF_AMX)
  if (W::numbers == 2 && q.rows >= LEAST_AMX_ROWS) return prepare_panels(q);
#endif
  uint32_t panel[QUADS * KVF_MAX_DIM];
  const int words = q.dim / W::numbers;
  for (int row = 0; row < q.rows; row += QUADS) {
    uint32_t* x = W::queries(q) + (int64_t)row * words;
    for (int i = 0; i < words; i += 4)
      for (int r = 0; r < QUADS; ++r) memcpy(panel + i * QUADS + r * 4, x + r * words + i, 16);
    memcpy(x, panel, (size_t)4 * QUADS * words);
  }
}

// What the scores of four tokens are to be multiplied by, in each quad.
static INLINE Floats scale_of_four(const Queries& q, const Tile& tile, int token) {
  float scales[4] = {q.scale, q.scale, q.scale, q.scale};
  if (tile.scales[0])
    for (int t = 0; t < 4; ++t) scales[t] *= from_bf16(tile.scales[0][token + t]);
  return load_quads(scales);
}

template <class W, int PANELS>
static INLINE void score_panels(const Queries& q, int row, const Tile& tile, float* s) {
  const int64_t words = q.dim / W::numbers, steps = words / 4;
  const uint32_t* queries = W::queries(q) + row * words;
  for (int token = 0; token < tile.blocks * BLOCK; token += 4) {
    const uint32_t* k = (const uint32_t*)tile.block[0] + token * tile.stride;
    Floats sum[PANELS][4] = {};
    for (int64_t i = 0; i < steps; ++i) {
      Floats x[PANELS];
      for (int p = 0; p < PANELS; ++p)
        memcpy(&x[p], queries + (p * steps + i) * WIDTH, sizeof x[p]);
      for (int t = 0; t < 4; ++t) {
        const Floats y = load_quads(k + t * tile.stride + 4 * i);
        for (int p = 0; p < PANELS; ++p) sum[p][t] = W::multiply_add(sum[p][t], x[p], y);
      }
    }
    const Floats scale = scale_of_four(q, tile, token);
    for (int p = 0; p < PANELS; ++p) {
      const Floats scores = sum_quads(sum[p]) * scale;
      for (int r = 0, at = row + p * QUADS; r < QUADS && at < q.rows; ++r, ++at)
        memcpy(s + at * TILE + token, (const float*)&scores + 4 * r, 16);
    }
  }
}

// Panels, rows, and chunks of 16 dimensions whose sums are kept in registers.
constexpr int PANELS_AT_ONCE = WIDTH == 16 ? 4 : 2;
constexpr int ROWS_AT_ONCE = WIDTH == 16 ? 8 : WIDTH == 8 ? 6 : 3, CHUNKS_AT_ONCE = WIDTH / 8 | 1;

template <class W>
static void score_latents(const Queries& q, const Tile& tile, float* s) {
#if defined(KVF_AMX)
  if (q.panel == TILE_ROWS) return score_panels_amx(q, tile, s);
#endif
  for_rows<PANELS_AT_ONCE>(groups_of(q.rows, QUADS), [&](auto n, int panel) {
    score_panels<W, decltype(n)::value>(q, panel * QUADS, tile, s);
  });
}

template <class W, int ROWS, int CHUNKS>
static INLINE void add_latent_rows(const Weights& w, int row, const Tile& tile, int chunk, float* o,
                                   int padded) {
  F16x sum[ROWS][CHUNKS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHUNKS; ++c)
      sum[r][c] =
          load(o + (row + r) * (int64_t)padded + (chunk + c) * 16) * splat(w.decay[row + r]);
  const float* v = (const float*)tile.block[0] + chunk * 16;
  const float* p = w.p + row * TILE;
  for (int i = 0; i < tile.blocks * BLOCK / W::numbers; ++i, v += tile.stride) {
    F16x x[CHUNKS];
    for (int c = 0; c < CHUNKS; ++c) x[c] = load(v + c * 16);
    for (int r = 0; r < ROWS; ++r) {
      const F16x weight = splat(p[r * TILE + i]);
      for (int c = 0; c < CHUNKS; ++c)
        for (int j = 0; j < PARTS; ++j)
          sum[r][c].v[j] = W::multiply_add(sum[r][c].v[j], weight.v[j], x[c].v[j]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHUNKS; ++c)
      store(o + (row + r) * (int64_t)padded + (chunk + c) * 16, sum[r][c]);
}

template <class W>
static void add_latents(const Weights& w, const Tile& tile, float* o) {
  if (tile.scales[0]) scale_weights(w.rows, w.p, tile);
  for (int row = 0; row < w.rows; ++row) W::round_weights(w.p + row * TILE);
  const int padded = round_up(tile.dim, 16), chunks = padded / 16;
#if defined(KVF_AMX)
  if (W::numbers == 2 && w.rows >= LEAST_AMX_ROWS) return add_pairs_amx(w, tile, o);
#endif
  const auto all_rows = [&](auto across, int chunk) {
    for_rows<ROWS_AT_ONCE>(w.rows, [&](auto n, int row) {
      add_latent_rows<W, decltype(n)::value, across.value>(w, row, tile, chunk, o, padded);
    });
  };
  int chunk = 0;
  for (; chunk + CHUNKS_AT_ONCE <= chunks; chunk += CHUNKS_AT_ONCE)
    all_rows(Number<CHUNKS_AT_ONCE>(), chunk);
  for (; chunk < chunks; ++chunk) all_rows(Number<1>(), chunk);
}

}  // namespace
