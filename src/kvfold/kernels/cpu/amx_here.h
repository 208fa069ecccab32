// Whether this process may use AMX's tiles: the processor has them, and the system lets it.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static bool may_use_amx() {
#if defined(KVF_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16 = 1u << 22, tiles = 1u << 24;
  if ((d & (bf16 | tiles)) != (bf16 | tiles)) return false;
  // Linux saves tiles only for processes that ask: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif
