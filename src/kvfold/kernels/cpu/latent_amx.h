// Latents with AMX, whose tiles take rows of keys as they lie, and pairs of rows of values.
#pragma once
#include "latent_words.h"
#include "rows.h"

#if defined(KVF_AMX)
namespace KVF_NAMESPACE {

constexpr int TILE_WORDS = TILE_BYTES / 4;

// Of sixteen queries side by side: [dim / 2][16] words, in their place.
static void prepare_panels(Queries& q) {
  uint32_t panel[TILE_ROWS * KVF_MAX_DIM / 2];
  const int words = q.dim / 2;
  q.panel = TILE_ROWS;
  for (int row = 0; row < q.rows; row += TILE_ROWS) {
    uint32_t* x = (uint32_t*)q.bf16 + (int64_t)row * words;
    for (int i = 0; i < words; ++i)
      for (int r = 0; r < TILE_ROWS; ++r) panel[i * TILE_ROWS + r] = x[r * words + i];
    memcpy(x, panel, (size_t)4 * TILE_ROWS * words);
  }
}

// Tiles 0 to 3 are sums; rows of one side and of the other are in 4 and 5, shorter ones in 6 and 7.
static void use_shapes_of(int rows, int rest_words) {
  TileShapes shapes;
  for (int t = 0; t < 4; ++t) shapes.set(t, rows, TILE_BYTES);
  shapes.set(4, rows, TILE_BYTES);
  shapes.set(5, TILE_WORDS, TILE_BYTES);
  if (rest_words) shapes.set(6, rows, 4 * rest_words);
  if (rest_words) shapes.set(7, rest_words, TILE_BYTES);
  use_shapes(shapes);
}

// Adds words i … to the scores of a tile's tokens by sixteen queries.
template <int A, int B>
static INLINE void add_panel_scores(const Tile& tile, const uint32_t* panel, int i) {
  load_tile_rows<B>(panel + (int64_t)i * TILE_ROWS, TILE_BYTES);
  for_sums(tile.blocks, [&](auto sum) {
    const uint32_t* k = tile.decoded + sum.value * BLOCK * tile.stride;
    load_tile_rows<A>(k + i, 4 * tile.stride);
    multiply_bf16<sum.value, A, B>();
  });
}

// Scores of a block's tokens, [token][query], to where they belong.
static INLINE void turn_scores(const Queries& q, const Tile& tile, int block, const float* x,
                               int row, float* s) {
  F16x scale = splat(q.scale);
  if (tile.scales[0]) scale = scale * load_bf16(tile.scales[block]);
  alignas(64) float turned[BLOCK * TILE_ROWS];
  for (int t = 0; t < BLOCK; ++t)
    for (int r = 0; r < TILE_ROWS; ++r) turned[r * BLOCK + t] = x[t * TILE_ROWS + r];
  for (int r = 0; r < TILE_ROWS && row + r < q.rows; ++r)
    store(s + (row + r) * TILE + block * BLOCK, load(turned + r * BLOCK) * scale);
}

static void score_panels_amx(const Queries& q, const Tile& tile, float* s) {
  const int words = q.dim / 2, rest = words % TILE_WORDS;
  alignas(64) float sums[TILE_BLOCKS][BLOCK * TILE_ROWS];
  use_shapes_of(BLOCK, rest);
  for (int row = 0; row < q.rows; row += TILE_ROWS) {
    const uint32_t* panel = (const uint32_t*)q.bf16 + (int64_t)row * words;
    for_sums(TILE_BLOCKS, [](auto sum) { zero_tile<sum.value>(); });
    int i = 0;
    for (; i + TILE_WORDS <= words; i += TILE_WORDS) add_panel_scores<4, 5>(tile, panel, i);
    if (rest) add_panel_scores<6, 7>(tile, panel, i);
    for_sums(tile.blocks,
             [&](auto sum) { store_tile_rows<sum.value>(sums[sum.value], TILE_BYTES); });
    for (int i = 0; i < tile.blocks; ++i) turn_scores(q, tile, i, sums[i], row, s);
  }
  release_tiles();
}

// Adds what words i … of the weights, of two tokens each, make of up to four chunks of values.
template <int A, int B>
static INLINE void add_panel_values(const float* weights, const Tile& tile, int chunk, int count,
                                    int i) {
  const int64_t stride = row_words<FloatWords>(tile.dim);
  load_tile_rows<A>(weights + i, 4 * TILE);
  for_sums(count, [&](auto sum) {
    load_tile_rows<B>(tile.pairs + i * stride + (chunk + sum.value) * 16, 4 * stride);
    multiply_bf16<sum.value, A, B>();
  });
}

template <class W>
static void add_pairs_amx(const Weights& w, const Tile& tile, float* o) {
  const int padded = round_up(tile.dim, 16), chunks = padded / 16;
  const int words = tile.blocks * BLOCK / 2, rest = words % TILE_WORDS;
  for (int i = 0; i < words; ++i)
    for (int d = 0; d < padded; d += 16)
      store((float*)tile.pairs + i * row_words<FloatWords>(tile.dim) + d,
            W::interleaved(tile.words + 2 * i, d));
  for (int row = 0; row < w.rows; ++row)
    for (int d = 0; d < padded; d += 16) {
      float* x = o + (int64_t)row * padded + d;
      store(x, load(x) * splat(w.decay[row]));
    }
  for_tile_rows(w.rows, [&](int row, int count) {
    use_shapes_of(count, rest);
    for (int chunk = 0; chunk < chunks; chunk += 4) {
      const int some = std::min(4, chunks - chunk);
      float* to = o + (int64_t)row * padded + chunk * 16;
      for_sums(some, [&](auto sum) { load_tile_rows<sum.value>(to + sum.value * 16, 4 * padded); });
      int i = 0;
      for (; i + TILE_WORDS <= words; i += TILE_WORDS)
        add_panel_values<4, 5>(w.p + row * TILE, tile, chunk, some, i);
      if (rest) add_panel_values<6, 7>(w.p + row * TILE, tile, chunk, some, i);
      for_sums(some,
               [&](auto sum) { store_tile_rows<sum.value>(to + sum.value * 16, 4 * padded); });
    }
  });
  release_tiles();
}

}  // namespace
#endif
