// From scores to weights, tile by tile: the softmax of rows of which only a part has been seen.
#pragma once
#include <cfloat>

#include "aligned.h"
#include "generic.h"

namespace KVF_NAMESPACE {

// Of each row: the largest score m so far, and the sum l of 2^(score - m); of the last tile: its
// scores, then weights, the largest and the sum of these, and by what earlier sums must decay.
struct Softmax {
  Aligned<float> s, m, l, top, sum, decay;
  Aligned<float> spent;  // belongs to values' formats
  Aligned<float> parts;  // [rows][16], to be reduced

  void begin(int rows) {
    const int padded = round_up(rows, 16);  // some is done for sixteen rows at once
    s.resize((size_t)rows * TILE);
    parts.resize((size_t)rows * 16);
    m.assign(padded, -INFINITY);
    l.assign(padded, 0.f);
    top.assign(padded, -INFINITY);
    sum.assign(padded, 0.f);
    decay.resize(padded);
    spent.assign(padded, 0.f);
  }

  Weights weights(int rows) {
    return {rows, s.data(), decay.data(), top.data(), l.data(), spent.data()};
  }
};

static INLINE float larger_of(float a, float b) { return a > b ? a : b; }  // b where a is NaN

// What scores are relative to: the largest so far, or anything finite while there is none.
static INLINE F16x base_of(F16x m) { return max(m, splat(-FLT_MAX)); }

// A tile that is not full ends in tokens that nobody sees.
static void hide_rest(int rows, int count, float* s) {
  static_assert(TILE_BLOCKS == 4, "tiles are four registers wide below");
  for (; count < TILE; count += BLOCK)
    for (int row = 0; row < rows; ++row) store(s + row * TILE + count, splat(-INFINITY));
}

// The largest score of each row of a tile.
static void find_tops(int rows, const float* s, float* top) {
  for_rows<4>(rows, [&](auto n, int row) {
    constexpr int ROWS = decltype(n)::value;
    F16x largest[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      const float* x = s + (row + r) * TILE;
      largest[r] = max(max(load(x), load(x + 16)), max(load(x + 32), load(x + 48)));
    }
    reduce_max<ROWS>(largest, top + row);
  });
}

static void add_parts(int rows, const float* parts, float* sum) {
  for_rows<4>(rows, [&](auto n, int row) {
    constexpr int ROWS = decltype(n)::value;
    F16x x[ROWS];
    for (int r = 0; r < ROWS; ++r) x[r] = load(parts + (row + r) * 16);
    reduce_add<ROWS>(x, sum + row);
  });
}

// Scores to weights 2^(s - m), m being the largest score so far; what was summed before must decay.
// Loop after loop over all rows: what a row waits for, others do meanwhile.
static void soften(int rows, int count, Softmax& a) {
  float *s = a.s.data(), *top = a.top.data(), *m = a.m.data(), *parts = a.parts.data();
  hide_rest(rows, count, s);
  find_tops(rows, s, top);
  for (int row = 0; row < rows; ++row) {
    float* x = s + row * TILE;
    const F16x base = base_of(splat(larger_of(top[row], m[row])));
    F16x p[TILE_BLOCKS];
    for (int i = 0; i < TILE_BLOCKS; ++i) {
      p[i] = exp2_nonpositive(load(x + i * BLOCK) - base);
      store(x + i * BLOCK, p[i]);
    }
    store(parts + row * 16, (p[0] + p[1]) + (p[2] + p[3]));
  }
  add_parts(rows, parts, a.sum.data());
  for (int row = 0; row < rows; row += 16) {
    const F16x before = load(m + row), largest = load(top + row), now = max(largest, before);
    const F16x base = base_of(now), decay = exp2_nonpositive(before - base);
    store(m + row, now);
    store(top + row, exp2_nonpositive(largest - base));
    store(&a.l[row], fma(load(&a.l[row]), decay, load(&a.sum[row])));
    store(&a.decay[row], decay);
  }
}

}  // namespace
