// Scores and weighted sums of bfloat16 with AMX, which multiplies up to 16 rows by a register's worth
// of keys or values at once. Packed blocks are tiles as they lie: of keys, 16 pairs of dimensions of 16
// tokens; of values, 8 pairs of tokens of 16 dimensions.
#pragma once
#include "amx_tiles.h"
#include "generic.h"

#if defined(KVF_AMX)
namespace KVF_NAMESPACE {

constexpr int LEAST_AMX_ROWS = 8;  // with fewer, most of a tile would be empty

// Tiles 0 to 3 are sums; queries or weights, and keys or values, 4 and 5, of shorter rows 6 and 7.
template <class Function>
static INLINE void for_sums(int count, Function f) {
  static_assert(TILE_BLOCKS == 4, "a sum for every block");
  f(Number<0>());
  if (count > 1) f(Number<1>());
  if (count > 2) f(Number<2>());
  if (count > 3) f(Number<3>());
}

// f(first row, how many) of groups of up to 16 rows, as even as can be.
template <class Function>
static INLINE void for_tile_rows(int rows, Function f) {
  int row = 0;
  for (int groups = groups_of(rows, TILE_ROWS); groups; --groups) {
    const int count = (rows - row + groups - 1) / groups;
    f(row, count);
    row += count;
  }
}

// Adds dimensions d … to the scores of a tile's blocks: a whole tile of them, or what is left.
template <int A, int B>
static INLINE void add_scores(const Queries& q, int row, const Tile& tile, int d) {
  load_tile_rows<A>(q.bf16 + (int64_t)row * q.dim + d, 2 * q.dim);
  for_sums(tile.blocks, [&](auto sum) {
    load_tile_rows<B>(tile.block[sum.value] + d * 32, TILE_BYTES);
    multiply_bf16<sum.value, A, B>();
  });
}

static void score_amx(const Queries& q, const Tile& tile, float* s) {
  constexpr int DIMS = TILE_BYTES / 2;
  const int rest = q.dim % DIMS;
  Ahead ahead(tile, 32 * q.dim, groups_of(q.dim, DIMS), groups_of(q.rows, TILE_ROWS));
  for_tile_rows(q.rows, [&](int row, int count) {
    TileShapes shapes;
    for (int t = 0; t < 4; ++t) shapes.set(t, count, TILE_BYTES);
    shapes.set(4, count, TILE_BYTES);
    shapes.set(5, DIMS / 2, TILE_BYTES);
    if (rest) shapes.set(6, count, 2 * rest);
    if (rest) shapes.set(7, rest / 2, TILE_BYTES);
    use_shapes(shapes);
    for_sums(4, [](auto sum) { zero_tile<sum.value>(); });
    int d = 0;
    for (; d + DIMS <= q.dim; d += DIMS, ahead.step()) add_scores<4, 5>(q, row, tile, d);
    if (rest) add_scores<6, 7>(q, row, tile, d);
    if (rest) ahead.step();
    float* to = s + row * TILE;
    for_sums(tile.blocks,
             [&](auto sum) { store_tile_rows<sum.value>(to + sum.value * BLOCK, 4 * TILE); });
  });
  release_tiles();
  const F16x scale = splat(q.scale);
  for (int row = 0; row < q.rows; ++row)
    for (int i = 0; i < tile.blocks; ++i) {
      float* x = s + row * TILE + i * BLOCK;
      store(x, load(x) * scale);
    }
}

// o = decay o + weights . values; the weights are [rows][TILE] bfloat16.
static void add_amx(const Weights& w, const uint16_t* weights, const Tile& tile, float* o) {
  const int padded = round_up(tile.dim, 16), chunks = padded / 16;
  for (int row = 0; row < w.rows; ++row)
    for (int d = 0; d < padded; d += 16) {
      float* x = o + (int64_t)row * padded + d;
      store(x, load(x) * splat(w.decay[row]));
    }
  Ahead ahead(tile, 32 * padded, TILE_BLOCKS * groups_of(chunks, 4), groups_of(w.rows, TILE_ROWS));
  for_tile_rows(w.rows, [&](int row, int count) {
    TileShapes shapes;
    for (int t = 0; t < 4; ++t) shapes.set(t, count, TILE_BYTES);
    shapes.set(4, count, 2 * BLOCK);
    shapes.set(5, BLOCK / 2, TILE_BYTES);
    use_shapes(shapes);
    for (int chunk = 0; chunk < chunks; chunk += 4) {
      float* to = o + (int64_t)row * padded + chunk * 16;
      const auto each_sum = [&](auto f) { for_sums(chunks - chunk, f); };
      each_sum([&](auto sum) { load_tile_rows<sum.value>(to + sum.value * 16, 4 * padded); });
      for (int block = 0; block < tile.blocks; ++block, ahead.step()) {
        load_tile_rows<4>(weights + row * TILE + block * BLOCK, 2 * TILE);
        each_sum([&](auto sum) {
          load_tile_rows<5>(tile.block[block] + (int64_t)(chunk + sum.value) * 512, TILE_BYTES);
          multiply_bf16<sum.value, 4, 5>();
        });
      }
      each_sum([&](auto sum) { store_tile_rows<sum.value>(to + sum.value * 16, 4 * padded); });
    }
  });
  release_tiles();
}

}  // namespace
#endif
