// Latents: rows of one buffer that are keys as a whole, and values in their first numbers. All query
// heads share them, so that products bind. A block's rows are decoded once, into words of a float or
// of two bfloat16, and both products use them as they lie:
//   scores: four words of a row of keys, the same in each quad of a register, times the same words
//   of as many queries as it has quads; nothing is transposed, and sums end in few shuffles;
//   values: a weight times a row; pairs of rows, interleaved on the way, where words are pairs.
// Rows that are such words already stay where they lie.
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
static void decode_row(const uint8_t* row, int dim, uint32_t* to) {
  constexpr int bytes = F::bits / 8;
  int i = 0;
  for (; i + 32 <= dim; i += 32) W::template put_more<F>(row + i * bytes, to, i);
  for (; i + 16 <= dim; i += 16) W::template put<F>(row + i * bytes, to, i);
  if (i == dim) return;
  uint8_t rest[16 * bytes] = {0};
  memcpy(rest, row + i * bytes, (dim - i) * bytes);
  W::template put<F>(rest, to, i);
}

// Whether rows are words as they lie, which need not be put elsewhere.
template <class F, class W>
static INLINE bool lies_as_words(int dim) {
  return F::code == W::stored_as && dim % LATENT_STEP == 0;
}

// What follows the tile is fetched meanwhile: of each block half of the rows while scores are made, and
// half while values are summed up.
static void set_next_latents(const KvfPart& part, const Unit& unit, int first, bool keys,
                             Tile& tile) {
  const KvfSide& side = part.k;
  const bool whole = tile.blocks == TILE_BLOCKS && first + 2 * TILE <= unit.high;
  tile.next[0] = nullptr;
  if (!whole || part.page_size % BLOCK) return;
  Walk at(part, unit, first + TILE);
  for (int i = 0; i < TILE_BLOCKS; ++i, at.step()) {
    const uint8_t* page = page_of(side, std::max(*at.page, 0), unit.head);
    tile.next[i] = page + (2 * at.block + !keys) * side.row_stride * (BLOCK / 2);
  }
}

// Rows `from` … `to` that are not words as they lie.
static INLINE void decode_latents(const Tile& tile, int dim, int from, int to) {
  for (int i = from; i < to; ++i) {
    uint32_t* place = tile.decoded + i * tile.stride;
    if (tile.words[i] == place) tile.decode(tile.rows[i], dim, place);
  }
}

// Which rows a block has, and their scales: zeros for tokens outside the unit, whose memory may hold
// anything, and for `without`. Whether it is all there, one row after the other.
static INLINE bool find_rows(const KvfPart& part, const Unit& unit, int position, uint32_t without,
                             const uint8_t** rows, uint16_t* scales) {
  static const uint8_t zeros[4 * KVF_MAX_DIM] = {0};
  const KvfSide& side = part.k;
  const int32_t* page = pages_of(part, unit.b, unit.head) + position / part.page_size;
  int at = position % part.page_size;
  if (position >= unit.low && position + BLOCK <= unit.high && at + BLOCK <= part.page_size &&
      *page >= 0 && !without) {
    const uint8_t* first = page_of(side, *page, unit.head) + at * side.row_stride;
    for (int i = 0; i < BLOCK; ++i) rows[i] = first + i * side.row_stride;
    if (scales) memcpy(scales, scales_of(side, *page, unit.head) + at, 2 * BLOCK);
    return true;
  }
  for (int i = 0; i < BLOCK; ++i) {
    const bool inside = position + i >= unit.low && position + i < unit.high;
    const bool here = inside && !(without >> i & 1) && *page >= 0;
    rows[i] = here ? page_of(side, *page, unit.head) + at * side.row_stride : zeros;
    if (scales) scales[i] = here ? scales_of(side, *page, unit.head)[at] : 0;
    if (++at < part.page_size) continue;
    at = 0;
    ++page;
  }
  return false;
}

// Where the rows of a tile lie, and where they are as words: decoded while scores are made, to be values
// after that; but for those `unseen`, of which the latter takes no notice.
template <class F, class W, bool KEY>
static void find_latents(const KvfPart& part, const Unit& unit, int first, uint64_t unseen,
                         Spare& spare, Tile& tile) {
  const KvfSide& side = part.k;
  const bool ready = lies_as_words<F, W>(side.dim);
  tile.dim = KEY ? part.k.dim : part.v.dim;
  tile.row_bytes = side.row_stride;
  tile.stride = row_words<W>(side.dim);
  tile.decode = decode_row<F, W>;
  tile.decoded = (uint32_t*)spare.blocks.data();
  tile.pairs = tile.decoded + spare.blocks.size() / 8;
  tile.rows = spare.rows;
  tile.words = spare.words;
  for (int block = 0, i = 0; block < tile.blocks; ++block, i += BLOCK) {
    const uint32_t without = unseen >> i & 0xffff;
    uint16_t* scales = F::group == NO_SCALES ? nullptr : spare.scales.data() + i;
    const bool whole = find_rows(part, unit, first + i, without, spare.rows + i, scales);
    tile.scales[block] = scales;
    tile.lies[block] = whole && ready ? spare.rows[i] : nullptr;
    for (int j = i; j < i + BLOCK; ++j)
      spare.words[j] =
          whole && ready ? (const uint32_t*)spare.rows[j] : tile.decoded + j * tile.stride;
    if (without) decode_latents(tile, side.dim, i, i + BLOCK);
  }
  set_next_latents(part, unit, first, KEY, tile);
}

// Four words of each of `panel` queries side by side: [dim / numbers / 4][panel][4], in their place.
template <class W>
static void prepare_latents(Queries& q) {
  q.panel = QUADS;
  W::round_queries(q);
#if defined(KVF_AMX)
  if (W::numbers == 2) return prepare_panels(q);
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

// Scores of a few tokens by queries side by side.
template <class W, int PANELS, int TOKENS>
static INLINE void score_panels(const Queries& q, int row, const Tile& tile, int token,
                                Ahead& ahead, float* s) {
  const int64_t steps = q.dim / W::numbers / 4;
  const uint32_t* queries = W::queries(q) + row * steps * 4;
  const uint32_t* const* k = tile.words + token;
  Floats sum[PANELS][TOKENS] = {};
  for (int64_t i = 0; i < steps; ++i) {
    Floats x[PANELS];
    for (int p = 0; p < PANELS; ++p) memcpy(&x[p], queries + (p * steps + i) * WIDTH, sizeof x[p]);
    for (int t = 0; t < TOKENS; ++t) {
      const Floats y = load_quads(k[t] + 4 * i);
      for (int p = 0; p < PANELS; ++p) sum[p][t] = W::multiply_add(sum[p][t], x[p], y);
    }
    ahead.step();
  }
  for (int t = 0; t < TOKENS; t += 4) {
    const Floats scale = scale_of_four(q, tile, token + t);
    for (int p = 0; p < PANELS; ++p) {
      const Floats scores = sum_quads(sum[p] + t) * scale;
      for (int r = 0, at = row + p * QUADS; r < QUADS && at < q.rows; ++r, ++at)
        memcpy(s + at * TILE + token + t, (const float*)&scores + 4 * r, 16);
    }
  }
}

constexpr int PANELS_AT_ONCE = WIDTH == 16 ? 4 : 2;

// Block by block: what was decoded is near when it is used.
template <class W>
static void score_latents(const Queries& q, const Tile& tile, float* s) {
#if defined(KVF_AMX)
  if (q.panel == TILE_ROWS) {
    decode_latents(tile, tile.dim, 0, tile.blocks * BLOCK);
    return score_panels_amx(q, tile, s);
  }
#endif
  const int panels = groups_of(q.rows, QUADS), groups = groups_of(panels, PANELS_AT_ONCE);
  const int each = panels > 1 ? 4 : 8;
  Ahead ahead(tile, BLOCK / 2 * tile.row_bytes, q.dim / W::numbers / 4,
              groups * tile.blocks * BLOCK / each);
  for (int block = 0; block < tile.blocks; ++block) {
    decode_latents(tile, tile.dim, block * BLOCK, (block + 1) * BLOCK);
    for_rows<PANELS_AT_ONCE>(panels, [&](auto n, int panel) {
      constexpr int PANELS = decltype(n)::value, TOKENS = PANELS > 1 ? 4 : 8;
      for (int token = block * BLOCK; token < (block + 1) * BLOCK; token += TOKENS)
        score_panels<W, PANELS, TOKENS>(q, panel * QUADS, tile, token, ahead, s);
    });
  }
}

// Dimensions d … of a tile's rows, or of pairs of them, times weights.
template <class W, int ROWS, int CHUNKS>
static INLINE void add_latent_rows(const Weights& w, int row, const Tile& tile, int d, float* o,
                                   int padded, Ahead& ahead) {
  F16x sum[ROWS][CHUNKS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHUNKS; ++c)
      sum[r][c] = load(o + (row + r) * (int64_t)padded + d + c * 16) * splat(w.decay[row + r]);
  const float* p = w.p + row * TILE;
  for (int i = 0; i < tile.blocks * BLOCK / W::numbers; ++i) {
    F16x x[CHUNKS];
    W::template load_values<CHUNKS>(tile.words + i * W::numbers, d, x);
    for (int r = 0; r < ROWS; ++r) {
      const F16x weight = splat(p[r * TILE + i]);
      for (int c = 0; c < CHUNKS; ++c)
        for (int j = 0; j < PARTS; ++j)
          sum[r][c].v[j] = W::multiply_add(sum[r][c].v[j], weight.v[j], x[c].v[j]);
    }
    ahead.step();
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHUNKS; ++c) store(o + (row + r) * (int64_t)padded + d + c * 16, sum[r][c]);
}

template <class W>
static void add_latents(const Weights& w, const Tile& tile, float* o) {
  if (tile.scales[0]) scale_weights(w.rows, w.p, tile);
  for (int row = 0; row < w.rows; ++row) W::round_weights(w.p + row * TILE);
#if defined(KVF_AMX)
  if constexpr (W::numbers == 2) {
    if (w.rows <= TILE_ROWS) return add_words_amx(w, tile, o);
    return add_pairs_amx<W>(w, tile, o);
  }
#endif
  const int padded = round_up(tile.dim, 16);
  constexpr int step = 16 * W::chunks;
  const int wide = padded / step, narrow = padded % step / 16;
  Ahead ahead(tile, BLOCK / 2 * tile.row_bytes, tile.blocks * BLOCK / W::numbers,
              (wide + narrow) * groups_of(w.rows, W::rows));
  const auto all_rows = [&](auto chunks, int d) {
    for_rows<W::rows>(w.rows, [&](auto n, int row) {
      add_latent_rows<W, decltype(n)::value, chunks.value>(w, row, tile, d, o, padded, ahead);
    });
  };
  int d = 0;
  for (; d + step <= padded; d += step) all_rows(Number<W::chunks>(), d);
  for (; d < padded; d += 16) all_rows(Number<1>(), d);
}

}  // namespace
