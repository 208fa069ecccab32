// The cache formats, and the one place that finds a format by its code.
//
// A format is a struct with
//   name, code            as kvfold/ops/formats declares them
//   bits, step, group     of a number; that lie together (layout.h); that share a scale
//   key_flip              bits that are flipped in bytes of packed keys
//   load<KEY>             a step of a packed block as floats, without scales
//   encode                a row of floats as an unpacked row and its scales, bit for bit as there
//   key_math, value_math  its kernels for queries of a dtype: InFloats, or its own
#pragma once
#include "formats/bf16.h"
#include "formats/fp16.h"
#include "formats/fp32.h"
#include "formats/fp8.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "formats/nl4.h"

#define KVF_FORMATS(DO) DO(Fp32) DO(Fp16) DO(Bf16) DO(Fp8) DO(Int8) DO(Int4) DO(Nl4)

namespace KVF_NAMESPACE {

#define KVF_CHECK(F) \
  static_assert(!GROUPED<F> || (F::group >= LEAST_GROUP && KVF_MAX_DIM % F::group == 0), #F);
KVF_FORMATS(KVF_CHECK)
#undef KVF_CHECK

// f(format) of the format with this code.
template <class Function>
static INLINE auto with_format(int code, Function f) {
  switch (code) {
#define KVF_CASE(F) \
  case F::code: return f(F());
    KVF_FORMATS(KVF_CASE)
#undef KVF_CASE
  }
  __builtin_unreachable();
}

}  // namespace
