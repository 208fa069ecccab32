// Sixteen floats, in as many of the machine's registers as that takes. Compiled once per
// instruction set; the namespace keeps the copies apart.
#pragma once
#include <cstdint>
#include <cstring>
#include <cmath>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace KVF_NAMESPACE {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = 16 / WIDTH;
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
typedef int8_t SignedBytes __attribute__((vector_size(WIDTH)));

struct F16x {  // 16 floats
  Floats v[PARTS];
};

#define EACH for (int i = 0; i < PARTS; ++i)

static INLINE F16x splat(float x) {
  F16x r;
  EACH r.v[i] = x - Floats{};
  return r;
}
static INLINE F16x load(const float* p) {
  F16x r;
  EACH memcpy(&r.v[i], p + i * WIDTH, sizeof(Floats));
  return r;
}
static INLINE void store(float* p, F16x a) { EACH memcpy(p + i * WIDTH, &a.v[i], sizeof(Floats)); }
static INLINE F16x operator+(F16x a, F16x b) {
  EACH a.v[i] += b.v[i];
  return a;
}
static INLINE F16x operator-(F16x a, F16x b) {
  EACH a.v[i] -= b.v[i];
  return a;
}
static INLINE F16x operator*(F16x a, F16x b) {
  EACH a.v[i] *= b.v[i];
  return a;
}
static INLINE F16x fma(F16x a, F16x b, F16x c) {
  EACH c.v[i] += a.v[i] * b.v[i];
  return c;
}
static INLINE Floats larger(Floats a, Floats b) {  // b where either is NaN
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
static INLINE F16x max(F16x a, F16x b) {
  EACH a.v[i] = larger(a.v[i], b.v[i]);
  return a;
}

// Whole numbers of one byte.
static INLINE Ints load_signed(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  SignedBytes b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, Ints);
#endif
}

static INLINE F16x load_bf16(const uint16_t* p) {
  F16x r;
  EACH {
    Halves h;
    memcpy(&h, p + i * WIDTH, sizeof h);
    r.v[i] = (Floats)(__builtin_convertvector(h, Ints) << 16);
  }
  return r;
}

// Four floats (or words), the same in each quad of a register.
constexpr int QUADS = WIDTH / 4;
static INLINE Floats load_quads(const void* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps((const float*)p));
#elif defined(__AVX2__)
  return (Floats)_mm256_broadcast_ps((const __m128*)p);
#else
  Floats r;
  memcpy(&r, p, sizeof r);
  return r;
#endif
}

// A quad's four sums: of the numbers of that quad in x[0], in x[1], x[2] and x[3].
static INLINE Floats sum_quads(const Floats x[4]) {
#if defined(__AVX512F__)
  const auto halved = [&](int i) {
    const __m512 a = (__m512)x[i], b = (__m512)x[i + 1];
    return (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d a = halved(0), b = halved(2);
  return (Floats)_mm512_unpacklo_pd(a, b) + (Floats)_mm512_unpackhi_pd(a, b);
#elif defined(__AVX2__)
  const auto halved = [&](int i) {
    const __m256 a = (__m256)x[i], b = (__m256)x[i + 1];
    return (__m256d)_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  };
  const __m256d a = halved(0), b = halved(2);
  return (Floats)_mm256_unpacklo_pd(a, b) + (Floats)_mm256_unpackhi_pd(a, b);
#else
  Floats r;
  for (int i = 0; i < 4; ++i) r[i] = (x[i][0] + x[i][2]) + (x[i][1] + x[i][3]);
  return r;
#endif
}

static INLINE float reduce_add(F16x a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)a.v[0]);
#else
  float t[16];
  store(t, a);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) t[i] += t[i + w];
  return t[0];
#endif
}

static INLINE float reduce_max(F16x a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)a.v[0]);
#else
  float t[16];
  store(t, a);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) t[i] = t[i] > t[i + w] ? t[i] : t[i + w];
  return t[0];
#endif
}

#if defined(__AVX512F__)
// What is left of each of four, op joining two: shuffles are shared.
template <class Op>
static INLINE void reduce_four(const F16x* a, float* out, Op op) {
  const auto halved = [&](int i) {
    const __m512 x = (__m512)a[i].v[0], y = (__m512)a[i + 1].v[0];
    return (__m512d)op(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  };
  const __m512d x = halved(0), y = halved(2);
  __m512 four = op((__m512)_mm512_unpacklo_pd(x, y), (__m512)_mm512_unpackhi_pd(x, y));
  four = op(four, _mm512_shuffle_f32x4(four, four, 0x4e));
  four = op(four, _mm512_shuffle_f32x4(four, four, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(four));
}
#endif

// out[i] = the largest number of a[i], or their sum.
template <int N>
static INLINE void reduce_max(const F16x* a, float* out) {
#if defined(__AVX512F__)
  if constexpr (N == 4)
    return reduce_four(a, out, [](__m512 x, __m512 y) { return _mm512_max_ps(x, y); });
#endif
  for (int i = 0; i < N; ++i) out[i] = reduce_max(a[i]);
}
template <int N>
static INLINE void reduce_add(const F16x* a, float* out) {
#if defined(__AVX512F__)
  if constexpr (N == 4)
    return reduce_four(a, out, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
#endif
  for (int i = 0; i < N; ++i) out[i] = reduce_add(a[i]);
}

// 2^f - 1 for |f| <= 1/2, by the polynomial of degree 5 whose largest relative error is least (1.1e-7)
// among those that are right at 0.
static INLINE Floats exp2_less_one(Floats f) {
  Floats p = 1.32647273e-3f - Floats{};
  p = p * f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  return p * f;
}
static INLINE Floats exp2_fraction(Floats f) { return exp2_less_one(f) + 1.0f; }

// 2^x for x <= 0 (relative error 3e-7). Masked scores (-inf) give exactly 0, NaN stays NaN. Results
// below 2^-126 are 0, or, with AVX-512, what denormal numbers keep of them.
static INLINE F16x exp2_nonpositive(F16x x) {
  F16x r;
  EACH {
#if defined(__AVX512DQ__)
    const __m512 f = _mm512_reduce_ps((__m512)x.v[i], 0);  // x - round(x), 0 where x is infinite
    const __m512 n = _mm512_sub_ps((__m512)x.v[i], f);
    r.v[i] = (Floats)_mm512_scalef_ps((__m512)exp2_fraction((Floats)f), n);
#else
    const Floats t = larger(-127.f - Floats{}, x.v[i]);
    const Floats magic = 12582912.f - Floats{};  // 1.5 * 2^23: adding it rounds to an integer
    const Floats n = (t + magic) - magic;
    r.v[i] = (Floats)((Ints)exp2_fraction(t - n) + (__builtin_convertvector(n, Ints) << 23));
#endif
  }
  return r;
}

// tanh(x) = (1 - e) / (1 + e) with e = exp(-2 |x|), and the sign of x (relative error 1e-6).
static INLINE F16x tanh(F16x x) {
  F16x y, r;
  EACH {
    const Floats size = (Floats)((Ints)x.v[i] & 0x7fffffff);
    y.v[i] = size * -2.88539008f;  // in base 2
  }
  const F16x e = exp2_nonpositive(y);
  EACH {
    // Where e is near 1, 1 - e has lost digits: there it is summed by itself.
    const Floats lost = y.v[i] > -0.5f ? -exp2_less_one(y.v[i]) : 1 - e.v[i];
    r.v[i] = (Floats)((Ints)(lost / (2 - lost)) | ((Ints)x.v[i] & (int32_t)0x80000000));
  }
  return r;
}

static INLINE float from_bf16(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static INLINE uint16_t to_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static INLINE float from_f16(uint16_t h) {
  _Float16 x;
  memcpy(&x, &h, 2);
  return (float)x;
}
static INLINE uint16_t to_f16(float f) {
  _Float16 x = (_Float16)f;
  uint16_t h;
  memcpy(&h, &x, 2);
  return h;
}

#if defined(__AVX2__)
static INLINE F16x from_f16(__m256i halves) {
  F16x r;
#if defined(__AVX512F__)
  r.v[0] = (Floats)_mm512_cvtph_ps(halves);
#else
  r.v[0] = (Floats)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  r.v[1] = (Floats)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#endif
  return r;
}
#endif

static INLINE F16x load_f16(const uint16_t* p) {
#if defined(__AVX2__)
  return from_f16(_mm256_loadu_si256((const __m256i*)p));
#else
  float t[16];
  for (int i = 0; i < 16; ++i) t[i] = from_f16(p[i]);
  return load(t);
#endif
}

#undef EACH
}  // namespace
