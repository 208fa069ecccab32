// What a copy of the kernels does a call with: copies with the same recipe are the same code for it.
#pragma once
#include "prefill.h"

namespace KVF_NAMESPACE {

// Which kernels of its own a format has for a part, by the bits of its numbers; 0: those for floats.
static int32_t own_kernels(const KvfPart& part, int queries) {
  const int32_t keys = with_format(part.k.format, [&](auto f) -> int32_t {
    using F = decltype(f);
    return F::key_math(queries).score == score_floats<F> ? 0 : F::bits;
  });
  const int32_t values = with_format(part.v.format, [&](auto f) -> int32_t {
    using F = decltype(f);
    return F::value_math(queries).add == add_floats<F> ? 0 : F::bits;
  });
  return keys | values << 8;
}

constexpr int32_t AMX = 1 << 24;

static int32_t recipe(const KvfAttend& call) {
  int32_t own = 0;
  if (is_latent(call))
    own = with_words(call.parts[0].k.format, call.q.format,
                     [](auto, auto w) { return w.numbers == 2 ? 16 : 0; });
  else if (call.tokens <= KVF_MAX_TOKENS) own = own_kernels(call.parts[0], call.q.format);
#if defined(__AVX512BF16__)
  else own = call.q.format == KVF_BF16 ? 16 : 0;
#endif
#if defined(KVF_AMX)
  const int rows = call.num_heads / call.num_kv_heads * call.tokens;
  if ((own & 16 || own >> 8 & 16) && (rows >= LEAST_AMX_ROWS || is_latent(call))) own |= AMX;
#endif
  return own | WIDTH << 16;
}

static int64_t block_bytes_of(const KvfSide& side, bool key) {
  return with_format(side.format, [&](auto f) {
    using F = decltype(f);
    return key ? block_bytes<F, true>(side.dim) : block_bytes<F, false>(side.dim);
  });
}

}  // namespace
