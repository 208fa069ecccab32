// What each instruction set's copy of the kernels offers.
#pragma once
#include "kernel.h"

struct IsaTable {
  int32_t (*recipe)(const KvfAttend&);               // see recipe.h
  int64_t (*block_bytes)(const KvfSide&, bool key);  // of 16 tokens
  const char* (*formats)();
  void (*attend)(const KvfAttend&, KvfParallel);
  void (*append)(const KvfAppend&, KvfParallel);
  void (*read_back)(const KvfReadBack&, KvfParallel);
  void (*move)(const KvfMove&, KvfParallel);
  void (*select)(const KvfSelect&, KvfParallel);
  uint64_t (*read_lines)(const uint8_t* data, int64_t lines);
};
