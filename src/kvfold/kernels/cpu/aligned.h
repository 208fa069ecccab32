// Vectors of numbers that registers are loaded from.
#pragma once
#include <cstddef>
#include <new>
#include <vector>

#include "simd.h"

namespace KVF_NAMESPACE {

// Memory that begins where a register's worth of numbers does: others would cross cache lines.
template <class T>
struct Lines {
  typedef T value_type;
  Lines() = default;
  template <class U>
  Lines(const Lines<U>&) {}
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};

template <class T>
using Aligned = std::vector<T, Lines<T>>;

}  // namespace
