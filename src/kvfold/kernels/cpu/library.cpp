// The library's entry points: choose an instruction set, run on threads.
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "amx_here.h"
#include "choice.h"

// KVF_HAVE_ and a name: the copies that were compiled (build.py).
#if defined(__x86_64__)
extern const IsaTable kvf_avx512_bf16, kvf_avx512_amx, kvf_avx512_vnni, kvf_avx512, kvf_avx2;

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
static bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool has_amx() { return has_bf16() && may_use_amx(); }
#endif
extern const IsaTable kvf_baseline;

// Best first, but where a trial says otherwise.
static const Isa ISAS[] = {
#if defined(KVF_HAVE_avx512_bf16)
    {"avx512_bf16", &kvf_avx512_bf16, has_bf16},
#endif
#if defined(KVF_HAVE_avx512_amx)
    {"avx512_amx", &kvf_avx512_amx, has_amx},
#endif
#if defined(KVF_HAVE_avx512_vnni)
    {"avx512_vnni", &kvf_avx512_vnni, has_vnni},
#endif
#if defined(KVF_HAVE_avx512)
    {"avx512", &kvf_avx512, has_avx512},
#endif
#if defined(KVF_HAVE_avx2)
    {"avx2", &kvf_avx2, has_avx2},
#endif
    {"baseline", &kvf_baseline, [] { return true; }},
};

static std::vector<Isa> those_here() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  std::vector<Isa> found;
  for (const Isa& isa : ISAS)
    if (isa.here()) found.push_back(isa);
  return found;
}

static const std::vector<Isa> isas = those_here();
static std::atomic<const Isa*> asked{nullptr};
static std::atomic<KvfTimer> timer{nullptr};
static Choices choices;

static const Isa& current() {
  const Isa* isa = asked;
  return isa ? *isa : isas[0];
}

// Used where the process has no OpenMP runtime to share: threads for this call only.
static void run_on_own_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

static KvfParallel parallel = run_on_own_threads;

// The copy that takes a call.
static const IsaTable& table_for(const KvfAttend& call) {
  const Isa* isa = asked;
  if (isa) return *isa->table;
  const IsaTable& first = *isas[0].table;
  if (!call.num_parts || !call.batch || !call.num_kv_heads || isas.size() == 1) return first;
  const CallKind kind = kind_of(call, first);
  const uint64_t key = kind.key();
  int index = choices.find(key);
  if (index < 0 && choices.full(key)) return first;
  if (index < 0) index = choices.keep(key, choose(call, kind, isas, parallel, timer));
  return *isas[(size_t)index].table;
}

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
  const uint64_t total = current().table->read_lines(r.data + first * 64, last - first);
  __atomic_fetch_add(&r.sum, total, __ATOMIC_RELAXED);
}

extern "C" {

const char* kvf_isa() { return current().name; }

int32_t kvf_set_isa(const char* name) {
  const Isa* found = nullptr;
  for (const Isa& isa : isas)
    if (!strcmp(isa.name, name)) found = &isa;
  if (!found && strcmp("auto", name)) return 1;
  asked = found;
  return 0;
}

const char* kvf_isas() {
  static const std::string names = [] {
    std::string all;
    for (const Isa& isa : isas) all += (all.empty() ? "" : " ") + std::string(isa.name);
    return all;
  }();
  return names.c_str();
}

const char* kvf_formats() { return current().table->formats(); }

void kvf_set_timer(KvfTimer with) {
  timer = with;
  choices.forget();
}

int64_t kvf_choices(char* out, int64_t room) {
  std::string all;
  choices.for_all([&](const CallKind& kind, int index) {
    for (const int32_t number :
         {kind.k_format, kind.v_format, kind.q_format, kind.dim, kind.v_dim, kind.rows, kind.far})
      all += std::to_string(number) + " ";
    all += std::string(isas[(size_t)index].name) + "\n";
  });
  memcpy(out, all.data(), std::min((size_t)room, all.size()));
  return (int64_t)all.size();
}

void kvf_set_parallel(KvfParallel run) { parallel = run ? run : run_on_own_threads; }

int32_t kvf_attend(const KvfAttend* call) {
  table_for(*call).attend(*call, parallel);
  return 0;
}

int32_t kvf_append(const KvfAppend* call) {
  current().table->append(*call, parallel);
  return 0;
}

int32_t kvf_read_back(const KvfReadBack* call) {
  current().table->read_back(*call, parallel);
  return 0;
}

int32_t kvf_move(const KvfMove* call) {
  current().table->move(*call, parallel);
  return 0;
}

int32_t kvf_select(const KvfSelect* call) {
  current().table->select(*call, parallel);
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
    case 5: return sizeof(KvfReadBack);
    case 6: return sizeof(KvfSelect);
    default: return sizeof(KvfMove);
  }
}
}
