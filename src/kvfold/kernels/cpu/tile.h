// Finding the blocks of a store that a tile of keys or values is made of.
#pragma once
#include <vector>

#include "aligned.h"
#include "formats.h"
#include "rows.h"

namespace KVF_NAMESPACE {

struct Unit {
  int32_t b, head, part, low, high;  // positions low <= j < high
  int32_t slot;                      // its place among the head's units
};

// Room for blocks that cannot be used where they lie; keys in the first half, values in the second.
struct Spare {
  Aligned<uint8_t> blocks;
  std::vector<uint16_t> scales;
  const uint8_t* rows[TILE];  // of latents (latent.h)
  const uint32_t* words[TILE];
};

// A block for tokens that are not there: zeros, whatever the format.
template <class F, bool KEY>
static void clear_block(int dim, uint8_t* to, uint16_t* scales) {
  memset(to, 0, block_bytes<F, KEY>(dim));
  memset(scales, 0, 2 * scale_groups<F>(dim) * BLOCK);
}

// Copy a packed block of values without the tokens outside the unit, or that nobody sees.
template <class F>
static void copy_inside(int dim, const Unit& unit, int position, uint32_t without, const Tile& tile,
                        int i, uint8_t* to, uint16_t* scales) {
  const int groups = scale_groups<F>(dim);
  memcpy(to, tile.block[i], block_bytes<F, false>(dim));
  if (groups) memcpy(scales, tile.scales[i], 2 * groups * BLOCK);
  for (int slot = 0; slot < BLOCK; ++slot) {
    const bool inside = position + slot >= unit.low && position + slot < unit.high;
    if (inside && !(without >> slot & 1)) continue;
    clear_value<F>(dim, to, slot);
    for (int g = 0; g < groups; ++g) scales[g * BLOCK + slot] = 0;
  }
}

// Pack the rows of the unit that fall into a block.
template <class F, bool KEY>
static void collect_rows(const KvfPart& part, const Unit& unit, int position, uint32_t without,
                         uint8_t* to, uint16_t* scales) {
  const KvfSide& side = KEY ? part.k : part.v;
  const int groups = scale_groups<F>(side.dim);
  const int32_t* table = pages_of(part, unit.b, unit.head);
  const uint8_t* rows[BLOCK];
  int found = 0;
  clear_block<F, KEY>(side.dim, to, scales);
  for (int slot = 0; slot < BLOCK; ++slot) {
    const int at = position + slot;
    const bool inside = at >= unit.low && at < unit.high && !(without >> slot & 1);
    const int32_t page = inside ? table[at / part.page_size] : -1;
    rows[slot] = nullptr;
    if (page < 0) continue;
    const int row = at % part.page_size;
    rows[slot] = page_of(side, page, unit.head) + row * side.row_stride;
    ++found;
    for (int g = 0; g < groups; ++g)
      scales[g * BLOCK + slot] = scales_of(side, page, unit.head)[(int64_t)row * groups + g];
  }
  if (found == BLOCK) return place_rows<F, KEY>(side.dim, rows, to);
  for (int slot = 0; slot < BLOCK; ++slot)
    if (rows[slot]) place_row<F, KEY>(side.dim, rows[slot], to, slot);
}

// Goes through the packed blocks of a sequence; dividing once, as it costs more than reading.
struct Walk {
  const int32_t* page;
  int block, blocks;  // in the page

  Walk(const KvfPart& part, const Unit& unit, int position)
      : page(pages_of(part, unit.b, unit.head) + position / part.page_size),
        block(position % part.page_size / BLOCK), blocks(part.page_size / BLOCK) {}

  void step() {
    if (++block == blocks) {
      block = 0;
      ++page;
    }
  }
};

// What follows the tile, so that it can be fetched ahead of use; its scales are, here.
static void set_next(const KvfSide& side, const Unit& unit, int64_t bytes, int groups, Walk at,
                     Tile& tile) {
  for (int i = 0; i < TILE_BLOCKS; ++i, at.step()) {
    const int32_t page = *at.page < 0 ? 0 : *at.page;
    tile.next[i] = page_of(side, page, unit.head) + at.block * bytes;
    const uint16_t* scales = scales_of(side, page, unit.head) + (int64_t)at.block * groups * BLOCK;
    for (int g = 0; g < groups; g += 2) prefetch(scales + g * BLOCK);  // 64 bytes
  }
}

// One side's blocks of a tile. Whole packed blocks are used where they lie; others (at the ends,
// unpacked, or missing) are put together in scratch, with zeros for tokens outside the unit, whose
// memory may hold anything, and for those of `unseen`, bits of the tile's tokens.
template <class F, bool KEY>
static void gather(const KvfPart& part, const Unit& unit, int first, uint64_t unseen, Spare& spare,
                   Tile& tile) {
  const KvfSide& side = KEY ? part.k : part.v;
  const int64_t bytes = block_bytes<F, KEY>(side.dim);
  const int groups = scale_groups<F>(side.dim);
  const size_t half = spare.blocks.size() / 2, scale_half = spare.scales.size() / 2;
  tile.dim = side.dim;
  Walk at(part, unit, first);
  for (int i = 0; i < tile.blocks; ++i, at.step()) {
    const int position = first + i * BLOCK;
    const uint32_t without = unseen >> (i * BLOCK) & 0xffff;
    const bool whole = position >= unit.low && position + BLOCK <= unit.high && !without;
    const bool here = side.packed && *at.page >= 0;
    if (here) {
      tile.block[i] = page_of(side, *at.page, unit.head) + at.block * bytes;
      if (groups)
        tile.scales[i] = scales_of(side, *at.page, unit.head) + (int64_t)at.block * groups * BLOCK;
      if (whole || KEY) continue;  // scores of keys outside are thrown away
    }
    uint8_t* to = spare.blocks.data() + (KEY ? 0 : half) + i * bytes;
    uint16_t* scales = spare.scales.data() + (KEY ? 0 : scale_half) + (int64_t)i * groups * BLOCK;
    if (here) copy_inside<F>(side.dim, unit, position, without, tile, i, to, scales);
    else if (!side.packed) collect_rows<F, KEY>(part, unit, position, without, to, scales);
    else clear_block<F, KEY>(side.dim, to, scales);
    tile.block[i] = to;
    tile.scales[i] = scales;
  }
  tile.next[0] = nullptr;
  if (side.packed && tile.blocks == TILE_BLOCKS && first + 2 * TILE <= unit.high)
    set_next(side, unit, bytes, groups, at, tile);
}

}  // namespace
