// Which pages of keys a step of decoding reads: those whose summaries promise most of its weight.
//
// A page's summary is two rows, a centre c and a spread r (kvfold/ops/select.py). Of each query q
// the page's scores are estimated as
//   KVF_SPREAD: q.c + spreads * sqrt(sum_d q_d^2 r_d^2)
//   KVF_BOX:    q.c + sum_d |q_d| r_d
// so both are a product with c, and one with r or r^2. What a KV head's queries make of all pages
// is turned into weights that sum to 1 for each query; a page counts with their mean.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "generic.h"
#include "logits.h"

namespace KVF_NAMESPACE {

constexpr int AHEAD = 6;  // pages that are fetched before they are looked at

struct Promises {
  Aligned<float> q, sized;       // [rows][padded]: queries; their squares, or sizes
  Aligned<float> scores, more;   // [rows][room]: a page's product with c, and that with r or r^2
  Aligned<float> first, second;  // [room]: what c and r are in units of
  Aligned<float> weights;        // [room]
  std::vector<int32_t> order;
  int rows, padded;
  int64_t room;
};

static INLINE F16x root(F16x x) {
  for (int i = 0; i < PARTS; ++i) {
#if defined(__AVX512F__)
    x.v[i] = (Floats)_mm512_sqrt_ps((__m512)x.v[i]);
#elif defined(__AVX2__)
    x.v[i] = (Floats)_mm256_sqrt_ps((__m256)x.v[i]);
#else
    for (int j = 0; j < WIDTH; ++j) x.v[i][j] = sqrtf(x.v[i][j]);
#endif
  }
  return x;
}

template <int ROWS>
static INLINE void add_products(F16x c, F16x s, int row, int d, const Promises& a, F16x* x,
                                F16x* y) {
  for (int r = 0; r < ROWS; ++r) {
    const int64_t at = (int64_t)(row + r) * a.padded + d;
    x[r] = fma(c, load(&a.q[at]), x[r]);
    y[r] = fma(s, load(&a.sized[at]), y[r]);
  }
}

// Both products of one page with some of the queries.
template <class F, int ROWS>
static INLINE void multiply_page(int dim, bool squares, const uint8_t* centre,
                                 const uint8_t* spread, int row, Promises& a, int64_t page) {
  constexpr int size = F::bits / 8;
  const int whole = dim / 16 * 16;
  F16x x[ROWS], y[ROWS];
  for (int r = 0; r < ROWS; ++r) x[r] = y[r] = splat(0);
  for (int d = 0; d < whole; d += 16) {
    const F16x s = F::numbers(spread + d * size);
    add_products<ROWS>(F::numbers(centre + d * size), squares ? s * s : s, row, d, a, x, y);
  }
  if (whole < dim) {  // what follows the row may be nobody's memory
    alignas(64) uint8_t rest[2][16 * size] = {};
    memcpy(rest[0], centre + whole * size, (size_t)(dim - whole) * size);
    memcpy(rest[1], spread + whole * size, (size_t)(dim - whole) * size);
    const F16x s = F::numbers(rest[1]);
    add_products<ROWS>(F::numbers(rest[0]), squares ? s * s : s, row, whole, a, x, y);
  }
  float product[ROWS], more[ROWS];
  reduce_add<ROWS>(x, product);
  reduce_add<ROWS>(y, more);
  for (int r = 0; r < ROWS; ++r) {
    a.scores[(row + r) * a.room + page] = product[r];
    a.more[(row + r) * a.room + page] = more[r];
  }
}

static void take_queries(const KvfSelect& call, int b, int head, Promises& a) {
  const int group = call.num_heads / call.num_kv_heads;
  a.rows = group * call.tokens;
  a.padded = round_up(call.head_dim, 16);
  a.q.assign((size_t)a.rows * a.padded, 0.f);
  a.sized.assign((size_t)a.rows * a.padded, 0.f);
  for (int row = 0; row < a.rows; ++row) {
    float* q = &a.q[(size_t)row * a.padded];
    const int h = head * group + row / call.tokens;
    load_row(call.q, row_of(call.q, b, h, row % call.tokens), call.head_dim, q);
    float* sized = &a.sized[(size_t)row * a.padded];
    for (int d = 0; d < call.head_dim; ++d)
      sized[d] = call.kind == KVF_SPREAD ? q[d] * q[d] : std::fabs(q[d]);
  }
}

// Estimates become weights: of each query by a softmax over all pages, then their mean.
static void weigh_pages(const KvfSelect& call, int pages, Promises& a) {
  const F16x log2e = splat(LOG2E), inverse = splat(call.softcap > 0 ? 1 / call.softcap : 0);
  a.weights.assign(a.room, 0.f);
  for (int row = 0; row < a.rows; ++row) {
    float* s = &a.scores[row * a.room];
    F16x most = splat(-INFINITY), sum = splat(0);
    for (int64_t i = 0; i < a.room; i += 16) {
      F16x beyond = load(&a.more[row * a.room + i]);
      if (call.kind == KVF_SPREAD) beyond = root(beyond);
      F16x x = fma(load(s + i), load(&a.first[i]), beyond * load(&a.second[i]));
      if (call.softcap > 0) x = tanh(x * inverse) * splat(call.softcap);
      store(s + i, x);
    }
    for (int64_t i = pages; i < a.room; ++i) s[i] = -INFINITY;
    for (int64_t i = 0; i < a.room; i += 16) most = max(load(s + i), most);
    const float top = reduce_max(most);
    if (!(top > -INFINITY && top < INFINITY)) continue;
    for (int64_t i = 0; i < a.room; i += 16) {
      const F16x e = exp2_nonpositive((load(s + i) - splat(top)) * log2e);
      store(s + i, e);
      sum = sum + e;
    }
    const F16x share = splat(1 / (reduce_add(sum) * a.rows));
    for (int64_t i = 0; i < a.room; i += 16)
      store(&a.weights[i], fma(load(s + i), share, load(&a.weights[i])));
  }
  for (float& weight : a.weights)
    if (!(weight >= 0)) weight = 0;  // NaN has no place in an order
}

// The pages that count most, best first; of equals the earlier.
static int best_pages(const KvfSelect& call, int b, int pages, Promises& a) {
  const float* w = a.weights.data();
  const auto better = [&](int32_t i, int32_t j) { return w[i] > w[j] || (w[i] == w[j] && i < j); };
  int most = std::min(call.keep[b], pages);
  a.order.resize(pages);
  for (int i = 0; i < pages; ++i) a.order[i] = i;
  if (call.top_p <= 0) {
    std::nth_element(a.order.begin(), a.order.begin() + most, a.order.end(), better);
    return most;
  }
  std::partial_sort(a.order.begin(), a.order.begin() + most, a.order.end(), better);
  float sum = 0;
  for (int i = 0; i < most; ++i)
    if ((sum += w[a.order[i]]) >= call.top_p) return i + 1;
  return most;
}

template <class F>
static void select_for(const KvfSelect& call, int b, int head, Promises& a) {
  const int32_t* table = call.table + b * call.table_stride;
  const int always = call.always[b], pages = std::max(call.last[b] - always, 0);
  int32_t* out = call.chosen + ((int64_t)b * call.num_kv_heads + head) * call.room;
  take_queries(call, b, head, a);
  a.room = round_up(pages, 16);
  for (Aligned<float>* each : {&a.scores, &a.more}) each->resize((size_t)a.rows * a.room);
  const float unit = call.scale, wide = call.kind == KVF_SPREAD ? unit * call.spreads : unit;
  a.first.assign(a.room, unit);
  a.second.assign(a.room, wide);
  const int64_t bytes = call.summary.row_stride;
  for (int i = 0; i < pages; ++i) {
    const int64_t page = table[always + i];
    const uint8_t* centre = page_of(call.summary, page, head);
    if (i + AHEAD < pages) {  // pages lie anywhere: nobody else knows which one is next
      const uint8_t* later = page_of(call.summary, table[always + i + AHEAD], head);
      for (int64_t at = 0; at < 2 * bytes; at += 64) prefetch(later + at);
    }
    if (F::group != NO_SCALES) {
      const uint16_t* scales = scales_of(call.summary, page, head);
      a.first[i] *= from_bf16(scales[0]);
      a.second[i] *= from_bf16(scales[1]);
    }
    for_rows<4>(a.rows, [&](auto n, int row) {
      multiply_page<F, decltype(n)::value>(call.head_dim, call.kind == KVF_SPREAD, centre,
                                           centre + bytes, row, a, i);
    });
  }
  weigh_pages(call, pages, a);
  if (call.weights)
    std::copy(a.weights.begin(), a.weights.begin() + pages,
              call.weights + ((int64_t)b * call.num_kv_heads + head) * call.weights_room);
  const int count = best_pages(call, b, pages, a);
  std::sort(a.order.begin(), a.order.begin() + count);
  for (int i = 0; i < always; ++i) out[i] = table[i];
  for (int i = 0; i < count; ++i) out[always + i] = table[always + a.order[i]];
  call.count[(int64_t)b * call.num_kv_heads + head] = always + count;
}

struct SelectPlan {
  const KvfSelect* call;
  std::atomic<int32_t> next{0};
};

static void select_thread(void* data) {
  SelectPlan& plan = *(SelectPlan*)data;
  const KvfSelect& call = *plan.call;
  static thread_local Promises promises;
  for (int32_t i; (i = plan.next.fetch_add(1)) < call.batch * call.num_kv_heads;) {
    const int b = i / call.num_kv_heads, head = i % call.num_kv_heads;
    if (call.summary.format == Int8::code) select_for<Int8>(call, b, head, promises);
    else select_for<Bf16>(call, b, head, promises);
  }
}

static void select(const KvfSelect& call, KvfParallel parallel) {
  SelectPlan plan;
  plan.call = &call;
  const int threads = std::min(call.threads, call.batch * call.num_kv_heads);
  if (threads <= 1) select_thread(&plan);
  else parallel(select_thread, &plan, (unsigned)threads, 0);
}

}  // namespace
