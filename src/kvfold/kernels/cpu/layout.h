// Where each number of a store lies, and how rows are put there.
//
// Packed blocks hold 16 tokens. Keys: steps of STEP dimensions, [dim / STEP][16 tokens][STEP], so
// that one register holds the same dimensions of all 16 tokens and sums need no shuffles.
// Values: [dim / 16][16 / STEP][16 dims][STEP tokens], or [16 tokens][dim] where STEP is 1.
// INT4 puts dimensions (tokens) 0-3 of a step of 8 in the low halves of four bytes, 4-7 in the high.
#pragma once
#include "kernel.h"
#include "simd.h"

namespace KVF_NAMESPACE {

constexpr int BLOCK = KVF_BLOCK;
constexpr int GROUP = 32;  // dimensions that share an INT4 scale

static INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

static INLINE int step_of(int format) {
  return format == KVF_BF16 ? 2 : format == KVF_INT8 ? 4 : format == KVF_INT4 ? 8 : 1;
}

static INLINE int scale_groups(int format, int dim) {
  return format == KVF_INT4 ? round_up(dim, GROUP) / GROUP
                            : (format == KVF_INT8 || format == KVF_FP8);
}

// Keys' and values' dimensions as stored, padded with zeros.
static INLINE int key_dim(int format, int dim) {
  return round_up(dim, format == KVF_INT4 ? GROUP : step_of(format));
}
static INLINE int value_dim(int format, int dim) {
  return round_up(dim, format == KVF_INT4 ? GROUP : 16);
}

static INLINE int64_t bytes_of(int format, int64_t numbers) {
  switch (format) {
    case KVF_F32: return 4 * numbers;
    case KVF_F16:
    case KVF_BF16: return 2 * numbers;
    case KVF_INT4: return numbers / 2;
    default: return numbers;
  }
}

static INLINE int64_t key_block_bytes(int format, int dim) {
  return bytes_of(format, (int64_t)BLOCK * key_dim(format, dim));
}
static INLINE int64_t value_block_bytes(int format, int dim) {
  return bytes_of(format, (int64_t)BLOCK * value_dim(format, dim));
}

// An unpacked row: its numbers one after the other; INT8 signed; INT4 with an even dimension in
// the low half of each byte. INT4 codes are offset by 8 everywhere.
static INLINE int row_code(const uint8_t* row, int i) { return row[i / 2] >> (i % 2 * 4) & 15; }

static INLINE void set_half(uint8_t* byte, int high, int code) {
  *byte = high ? (uint8_t)((*byte & 15) | code << 4) : (uint8_t)((*byte & 0xf0) | code);
}

// Put an unpacked row at a slot of a packed block. Padding is left as it is (zeros).
static inline void place_key(int format, int dim, const uint8_t* row, uint8_t* block, int slot) {
  switch (format) {
    case KVF_F32:
      for (int d = 0; d < dim; ++d) memcpy(block + (d * 16 + slot) * 4, row + 4 * d, 4);
      break;
    case KVF_F16:
      for (int d = 0; d < dim; ++d) memcpy(block + (d * 16 + slot) * 2, row + 2 * d, 2);
      break;
    case KVF_BF16:
      for (int d = 0; d + 1 < dim; d += 2) memcpy(block + (d / 2 * 16 + slot) * 4, row + 2 * d, 4);
      if (dim % 2) memcpy(block + (dim / 2 * 16 + slot) * 4, row + 2 * (dim - 1), 2);
      break;
    case KVF_FP8:
      for (int d = 0; d < dim; ++d) block[d * 16 + slot] = row[d];
      break;
    case KVF_INT8:
      for (int d = 0; d < dim; ++d) block[(d / 4 * 16 + slot) * 4 + d % 4] = row[d] ^ 0x80;
      break;
    case KVF_INT4:
      for (int d = 0; d < key_dim(format, dim); ++d)
        set_half(block + (d / 8 * 16 + slot) * 4 + d % 4, d % 8 / 4, row_code(row, d));
      break;
  }
}

static inline void place_value(int format, int dim, const uint8_t* row, uint8_t* block, int slot) {
  const int padded = value_dim(format, dim);
  switch (format) {
    case KVF_F32: memcpy(block + 4 * slot * padded, row, 4 * dim); break;
    case KVF_F16: memcpy(block + 2 * slot * padded, row, 2 * dim); break;
    case KVF_FP8: memcpy(block + slot * padded, row, dim); break;
    case KVF_BF16:
      for (int d = 0; d < dim; ++d)
        memcpy(block + 2 * (((d / 16 * 8 + slot / 2) * 16 + d % 16) * 2 + slot % 2), row + 2 * d,
               2);
      break;
    case KVF_INT8:
      for (int d = 0; d < dim; ++d)
        block[((d / 16 * 4 + slot / 4) * 16 + d % 16) * 4 + slot % 4] = row[d];
      break;
    case KVF_INT4:
      for (int d = 0; d < padded; ++d)
        set_half(block + ((d / 16 * 2 + slot / 8) * 16 + d % 16) * 4 + slot % 4, slot % 8 / 4,
                 row_code(row, d));
      break;
  }
}

// Zero a slot of a packed block of values, whatever was there.
static inline void clear_value(int format, int dim, uint8_t* block, int slot) {
  const int padded = value_dim(format, dim);
  if (format == KVF_INT4) {
    for (int d = 0; d < padded; ++d)
      set_half(block + ((d / 16 * 2 + slot / 8) * 16 + d % 16) * 4 + slot % 4, slot % 8 / 4, 8);
    return;
  }
  uint8_t zeros[4 * KVF_MAX_DIM] = {0};
  place_value(format, padded, zeros, block, slot);
}

// Where token `slot` of a page of one head begins, unpacked; or its block, packed.
static INLINE uint8_t* page_of(const KvfSide& side, int64_t page, int head) {
  return side.data + page * side.page_stride + head * side.head_stride;
}
static INLINE uint16_t* scales_of(const KvfSide& side, int64_t page, int head) {
  return side.scales + page * side.scale_page_stride + head * side.scale_head_stride;
}

}  // namespace
