// What each instruction set's copy of the kernels offers.
#pragma once
#include "api.h"

struct IsaTable {
  void (*attend)(const KvfAttend&, KvfParallel);
  void (*append)(const KvfAppend&, KvfParallel);
};
