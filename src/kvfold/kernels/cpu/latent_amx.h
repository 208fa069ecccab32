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

// Words of a block's rows, from word i on: as they lie, or decoded.
template <int T>
static INLINE void load_words(const Tile& tile, int block, int i) {
  const uint8_t* lies = tile.lies[block];
  const void* decoded = tile.decoded + block * BLOCK * tile.stride;
  load_tile_rows<T>((lies ? lies : (const uint8_t*)decoded) + 4 * i,
                    lies ? tile.row_bytes : 4 * tile.stride);
}

// Adds words i … to the scores of a tile's tokens by sixteen queries.
template <int A, int B>
static INLINE void add_panel_scores(const Tile& tile, const uint32_t* panel, int i) {
  load_tile_rows<B>(panel + (int64_t)i * TILE_ROWS, TILE_BYTES);
  for_sums(tile.blocks, [&](auto sum) {
    load_words<A>(tile, sum.value, i);
    multiply_bf16<sum.value, A, B>();
  });
}

// Scores of a block's tokens, [token][query], become [query][token].
static INLINE void turn_scores(float* x) {
#if defined(__AVX512F__)
  __m512i r[TILE_ROWS];
  for (int t = 0; t < BLOCK; ++t) r[t] = _mm512_load_si512(x + t * TILE_ROWS);
  transpose16(r);
  for (int t = 0; t < BLOCK; ++t) _mm512_store_si512(x + t * TILE_ROWS, r[t]);
#else
  for (int t = 0; t < BLOCK; ++t)
    for (int r = 0; r < t; ++r) std::swap(x[t * TILE_ROWS + r], x[r * TILE_ROWS + t]);
#endif
}

static INLINE void finish_panel(const Queries& q, const Tile& tile, int block, float* x, int row,
                                float* s) {
  F16x scale = splat(q.scale);
  if (tile.scales[0]) scale = scale * load_bf16(tile.scales[block]);
  turn_scores(x);
  for (int r = 0; r < TILE_ROWS && row + r < q.rows; ++r)
    store(s + (row + r) * TILE + block * BLOCK, load(x + r * BLOCK) * scale);
}

static void score_panels_amx(const Queries& q, const Tile& tile, float* s) {
  const int words = q.dim / 2, rest = words % TILE_WORDS;
  alignas(64) float sums[TILE_BLOCKS][BLOCK * TILE_ROWS];
  Ahead ahead(tile, BLOCK / 2 * tile.row_bytes, groups_of(words, TILE_WORDS),
              groups_of(q.rows, TILE_ROWS));
  use_shapes_of(BLOCK, rest);
  for (int row = 0; row < q.rows; row += TILE_ROWS) {
    const uint32_t* panel = (const uint32_t*)q.bf16 + (int64_t)row * words;
    for_sums(TILE_BLOCKS, [](auto sum) { zero_tile<sum.value>(); });
    int i = 0;
    for (; i + TILE_WORDS <= words; i += TILE_WORDS, ahead.step())
      add_panel_scores<4, 5>(tile, panel, i);
    if (rest) add_panel_scores<6, 7>(tile, panel, i);
    for_sums(tile.blocks,
             [&](auto sum) { store_tile_rows<sum.value>(sums[sum.value], TILE_BYTES); });
    for (int i = 0; i < tile.blocks; ++i) finish_panel(q, tile, i, sums[i], row, s);
  }
  release_tiles();
}

// Values by few rows: a word has numbers of two dimensions, and weights beside zeros take one of them.
// So nothing is interleaved, for twice as many products.

// Sixteen rounded weights, each with a zero behind it, or before it.
static INLINE void split_weights(const uint16_t* p, uint32_t* even, uint32_t* odd) {
  for (int i = 0; i < BLOCK; i += WIDTH) {
    Halves halves;
    memcpy(&halves, p + i, sizeof halves);
    const Ints words = __builtin_convertvector(halves, Ints), shifted = words << 16;
    memcpy(even + i, &words, sizeof words);
    memcpy(odd + i, &shifted, sizeof shifted);
  }
}

// o = decay o + sums of even and of odd dimensions, side by side.
static INLINE void add_split(float* o, F16x decay, const float* even, const float* odd) {
  F16x low, high;
#if defined(__AVX512F__)
  const __m512i order = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i later = _mm512_add_epi32(order, _mm512_set1_epi32(8));
  const __m512 a = _mm512_loadu_ps(even), b = _mm512_loadu_ps(odd);
  low.v[0] = (Floats)_mm512_permutex2var_ps(a, order, b);
  high.v[0] = (Floats)_mm512_permutex2var_ps(a, later, b);
#else
  float both[32];
  for (int i = 0; i < 32; ++i) both[i] = (i % 2 ? odd : even)[i / 2];
  low = load(both), high = load(both + 16);
#endif
  store(o, fma(load(o), decay, low));
  store(o + 16, fma(load(o + 16), decay, high));
}

// Sums are 0 to 3, weights 4 and 5, values 6 and 7; of 32 dimensions each, or of fewer.
static void use_split_shapes(int rows, int dims) {
  TileShapes shapes;
  for (int t = 0; t < 4; ++t) shapes.set(t, rows, 2 * dims);
  for (int t : {4, 5}) shapes.set(t, rows, TILE_BYTES);
  for (int t : {6, 7}) shapes.set(t, BLOCK, 2 * dims);
  use_shapes(shapes);
}

struct SplitWeights {
  alignas(64) uint32_t even[TILE_ROWS * TILE], odd[TILE_ROWS * TILE];
};

// Dimensions d … of a tile's values, times the weights: even and odd ones of 32, or of twice 32. What is
// loaded goes before what is multiplied, as the two hardly overlap.
template <int COUNT>
static INLINE void sum_words(const SplitWeights& weights, const Tile& tile, int d, Ahead& ahead,
                             float* sums) {
  constexpr int SUM = TILE_ROWS * 16;
  for_sums(2 * COUNT, [](auto sum) { zero_tile<sum.value>(); });
  for (int i = 0; i < tile.blocks; ++i, ahead.step()) {
    load_tile_rows<4>(weights.even + i * BLOCK, 4 * TILE);
    load_tile_rows<5>(weights.odd + i * BLOCK, 4 * TILE);
    load_words<6>(tile, i, d / 2);
    if constexpr (COUNT == 2) load_words<7>(tile, i, d / 2 + 16);
    multiply_bf16<0, 4, 6>();
    multiply_bf16<1, 5, 6>();
    if constexpr (COUNT == 1) continue;
    multiply_bf16<2, 4, 7>();
    multiply_bf16<3, 5, 7>();
  }
  for_sums(2 * COUNT,
           [&](auto sum) { store_tile_rows<sum.value>(sums + sum.value * SUM, TILE_BYTES); });
}

static void add_words_amx(const Weights& w, const Tile& tile, float* o) {
  constexpr int SUM = TILE_ROWS * 16;
  const int padded = round_up(tile.dim, 16);
  SplitWeights weights;
  alignas(64) float sums[4 * SUM];
  for (int row = 0; row < w.rows; ++row)
    for (int i = row * TILE; i < row * TILE + tile.blocks * BLOCK; i += BLOCK)
      split_weights((const uint16_t*)(w.p + row * TILE) + i % TILE, weights.even + i,
                    weights.odd + i);
  Ahead ahead(tile, BLOCK / 2 * tile.row_bytes, tile.blocks, groups_of(padded, 64));
  const auto finish = [&](int d, const float* sums) {
    for (int row = 0; row < w.rows; ++row)
      add_split(o + (int64_t)row * padded + d, splat(w.decay[row]), sums + row * 16,
                sums + SUM + row * 16);
  };
  use_split_shapes(w.rows, 32);
  int d = 0;
  for (; d + 64 <= padded; d += 64) {
    sum_words<2>(weights, tile, d, ahead, sums);
    finish(d, sums);
    finish(d + 32, sums + 2 * SUM);
  }
  if (d + 32 <= padded) {
    sum_words<1>(weights, tile, d, ahead, sums);
    finish(d, sums);
    d += 32;
  }
  if (d < padded) {
    use_split_shapes(w.rows, 16);
    sum_words<1>(weights, tile, d, ahead, sums);
    for (int row = 0; row < w.rows; ++row) {
      alignas(64) float last[32] = {};
      float* to = o + (int64_t)row * padded + d;
      store(last, load(to));
      add_split(last, splat(w.decay[row]), sums + row * 16, sums + SUM + row * 16);
      store(to, load(last));
    }
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
