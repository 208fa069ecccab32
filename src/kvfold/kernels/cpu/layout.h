// Where each number of a store lies, and how rows are put there.
//
// Packed blocks hold 16 tokens. Keys: steps of STEP dimensions, [dim / STEP][16 tokens][STEP], so
// that one register holds the same dimensions of all 16 tokens and sums need no shuffles.
// Values: [dim / 16][16 / STEP][16 dims][STEP tokens], or [16 tokens][dim] where STEP is 1.
// Numbers of four bits come in steps of 8: dimensions (tokens) 0-3 of a step in the low halves of
// four bytes, 4-7 in the high.
//
// F is a format (see formats.h): `bits` of a number, `step`, and the `group` of numbers that share
// a scale. Its rows, unpacked, are those of kvfold/ops/formats: numbers one after the other, of
// four bits an even dimension in the low half of each byte.
#pragma once
#include "kernel.h"
#include "simd.h"

namespace KVF_NAMESPACE {

constexpr int BLOCK = KVF_BLOCK;
constexpr int NO_SCALES = 0, WHOLE_ROW = 1 << 30;  // a group that no row fills
constexpr int LEAST_GROUP = 32;                    // of any format: scratch memory has room for it

template <class F>
constexpr bool GROUPED = F::group != NO_SCALES && F::group != WHOLE_ROW;

static INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

template <class F>
static INLINE int scale_groups(int dim) {
  return F::group == NO_SCALES ? 0 : F::group == WHOLE_ROW ? 1 : (dim + F::group - 1) / F::group;
}

// Keys' and values' dimensions as stored, padded with zeros.
template <class F, bool KEY>
static INLINE int stored_dim(int dim) {
  return round_up(dim, GROUPED<F> ? F::group : KEY ? F::step : 16);
}

template <class F>
static INLINE int64_t bytes_of(int64_t numbers) {
  return F::bits == 4 ? numbers / 2 : numbers * (F::bits / 8);
}

template <class F, bool KEY>
static INLINE int64_t block_bytes(int dim) {
  return bytes_of<F>((int64_t)BLOCK * stored_dim<F, KEY>(dim));
}

static INLINE int half_of(const uint8_t* row, int i) { return row[i / 2] >> (i % 2 * 4) & 15; }

static INLINE void set_half(uint8_t* byte, int high, int code) {
  *byte = high ? (uint8_t)((*byte & 15) | code << 4) : (uint8_t)((*byte & 0xf0) | code);
}

// Put an unpacked row at a slot of a packed block. Padding is left as it is (zeros).
template <class F, bool KEY>
static inline void place_row(int dim, const uint8_t* row, uint8_t* block, int slot) {
  constexpr int size = F::bits / 8;
  const int padded = stored_dim<F, KEY>(dim);
  if constexpr (F::bits == 4) {
    static_assert(F::step == 8, "numbers of four bits come in steps of 8");
    if (KEY) {
      for (int d = 0; d < padded; d += 8)
        for (int i = 0; i < 4; ++i)
          block[(d / 8 * 16 + slot) * 4 + i] = half_of(row, d + i) | half_of(row, d + 4 + i) << 4;
    } else {
      for (int d = 0; d < padded; ++d)
        set_half(block + ((d / 16 * 2 + slot / 8) * 16 + d % 16) * 4 + slot % 4, slot % 8 / 4,
                 half_of(row, d));
    }
  } else if constexpr (KEY) {
    constexpr int bytes = F::step * size;
    uint8_t* to = block + slot * bytes;
    int at = 0;
    for (; at + bytes <= dim * size; at += bytes, to += 16 * bytes)
      for (int i = 0; i < bytes; ++i) to[i] = row[at + i] ^ F::key_flip;
    for (int i = 0; i < dim * size - at; ++i) to[i] = row[at + i] ^ F::key_flip;
  } else if constexpr (F::step == 1) {
    memcpy(block + slot * padded * size, row, dim * size);
  } else {
    constexpr int step = F::step;
    for (int d = 0; d < dim; ++d) {
      const int line = d / 16 * (16 / step) + slot / step;
      memcpy(block + ((line * 16 + d % 16) * step + slot % step) * size, row + d * size, size);
    }
  }
}

// Zero a slot of a packed block of values, whatever was there.
template <class F>
static inline void clear_value(int dim, uint8_t* block, int slot) {
  static const uint8_t zeros[4 * KVF_MAX_DIM] = {0};  // on the stack they would be made each time
  place_row<F, false>(stored_dim<F, false>(dim), zeros, block, slot);
}

// Where token `slot` of a page of one head begins, unpacked; or its block, packed.
static INLINE uint8_t* page_of(const KvfSide& side, int64_t page, int head) {
  return side.data + page * side.page_stride + head * side.head_stride;
}
static INLINE uint16_t* scales_of(const KvfSide& side, int64_t page, int head) {
  return side.scales + page * side.scale_page_stride + head * side.scale_head_stride;
}

}  // namespace
