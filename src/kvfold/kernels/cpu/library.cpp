// The library's entry points: choose an instruction set, run on threads.
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "table.h"

struct Isa {
  const char* name;
  const IsaTable* table;
  bool (*here)();
};

#if defined(__x86_64__)
extern const IsaTable kvf_avx512_bf16, kvf_avx512_vnni, kvf_avx512, kvf_avx2, kvf_baseline;

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
static bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Intel's cores (Sapphire Rapids was measured) multiply bfloat16 pairs at a quarter of the rate of
// floats, so there the copy without those instructions is the faster one.
static bool slow_bf16() { return __builtin_cpu_is("intel"); }

static const Isa ISAS[] = {
    {"avx512_bf16", &kvf_avx512_bf16, [] { return has_bf16() && !slow_bf16(); }},
    {"avx512_vnni", &kvf_avx512_vnni, has_vnni},
    {"avx512_bf16", &kvf_avx512_bf16, [] { return has_bf16() && slow_bf16(); }},
    {"avx512", &kvf_avx512, has_avx512},
    {"avx2", &kvf_avx2, has_avx2},
    {"baseline", &kvf_baseline, [] { return true; }},
};
#else
extern const IsaTable kvf_baseline;
static const Isa ISAS[] = {{"baseline", &kvf_baseline, [] { return true; }}};
#endif

static const Isa* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Isa& isa : ISAS)
    if (isa.here()) return &isa;
  return nullptr;
}

static const Isa* current = best();

// Used where the process has no OpenMP runtime to share: threads for this call only.
static void run_on_own_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

static KvfParallel parallel = run_on_own_threads;

struct Reading {
  const uint8_t* data;
  int64_t bytes;
  int32_t threads;
  int32_t next;
  uint64_t sum;
};

static void read_thread(void* data) {
  Reading& r = *(Reading*)data;
  const int32_t i = __atomic_fetch_add(&r.next, 1, __ATOMIC_RELAXED);
  const int64_t lines = r.bytes / 64, first = lines * i / r.threads,
                last = lines * (i + 1) / r.threads;
  const uint64_t total = current->table->read_lines(r.data + first * 64, last - first);
  __atomic_fetch_add(&r.sum, total, __ATOMIC_RELAXED);
}

extern "C" {

const char* kvf_isa() { return current->name; }

int32_t kvf_set_isa(const char* name) {
  for (const Isa& isa : ISAS)
    if (!strcmp(isa.name, name) && isa.here()) {
      current = &isa;
      return 0;
    }
  return 1;
}

const char* kvf_isas() {
  static const std::string names = [] {
    std::string all;
    for (const Isa& isa : ISAS)
      if (isa.here()) all += (all.empty() ? "" : " ") + std::string(isa.name);
    return all;
  }();
  return names.c_str();
}

const char* kvf_formats() { return current->table->formats(); }

void kvf_set_parallel(KvfParallel run) { parallel = run ? run : run_on_own_threads; }

int32_t kvf_attend(const KvfAttend* call) {
  current->table->attend(*call, parallel);
  return 0;
}

int32_t kvf_append(const KvfAppend* call) {
  current->table->append(*call, parallel);
  return 0;
}

int32_t kvf_read_back(const KvfReadBack* call) {
  current->table->read_back(*call, parallel);
  return 0;
}

double kvf_read(const uint8_t* data, int64_t bytes, int32_t threads) {
  Reading r{data, bytes, threads, 0, 0};
  parallel(read_thread, &r, (unsigned)threads, 0);
  return (double)r.sum;
}

int64_t kvf_sizeof(int32_t what) {
  switch (what) {
    case 0: return sizeof(KvfSide);
    case 1: return sizeof(KvfPart);
    case 2: return sizeof(KvfTensor);
    case 3: return sizeof(KvfAttend);
    case 4: return sizeof(KvfAppend);
    default: return sizeof(KvfReadBack);
  }
}
}
