// Which copy of the kernels takes a call: of all that this machine can run, the one that was fastest
// for calls of its kind in a trial before the first of them. It stays so while the process lives.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "trial.h"

struct Isa {
  const char* name;
  const IsaTable* table;
  bool (*here)();
};

// So much slower than the best: a copy is not worth a third round; is not preferred to an earlier
// one, as noise is of that size.
constexpr double HOPELESS = 1.5, ALIKE = 1.05;
constexpr int NEAR_ROUNDS = 5, FAR_ROUNDS = 4;

// The kinds that were met so far, each with its copy. Nothing is ever taken out, and what two threads
// find at once, or a forked process goes on with, is what the first of them wrote.
class Choices {
 public:
  // The chosen one's index, or -1.
  int find(uint64_t key) const {
    for (int i = 0; i < PROBES; ++i) {
      const uint64_t entry = slot(key, i).load(std::memory_order_acquire);
      if (entry >> INDEX_BITS == key) return (int)(entry & ((1 << INDEX_BITS) - 1));
      if (!entry) break;
    }
    return -1;
  }

  // What is chosen from now on: `index`, unless another thread was faster or no place is left.
  int keep(uint64_t key, int index) {
    for (int i = 0; i < PROBES; ++i) {
      uint64_t nothing = 0;
      if (slot(key, i).compare_exchange_strong(nothing, key << INDEX_BITS | (uint64_t)index))
        return index;
      if (nothing >> INDEX_BITS == key) return (int)(nothing & ((1 << INDEX_BITS) - 1));
    }
    return 0;
  }

  bool full(uint64_t key) const {
    for (int i = 0; i < PROBES; ++i)
      if (!slot(key, i).load(std::memory_order_relaxed)) return false;
    return true;
  }

  // f(kind, index)
  template <class Function>
  void for_all(Function f) const {
    for (const auto& each : slots)
      if (const uint64_t entry = each.load(std::memory_order_acquire))
        f(CallKind::of_key(entry >> INDEX_BITS), (int)(entry & ((1 << INDEX_BITS) - 1)));
  }

  void forget() {
    for (auto& each : slots) each.store(0);
  }

 private:
  static constexpr int SLOTS = 1024, PROBES = 16, INDEX_BITS = 4;
  mutable std::atomic<uint64_t> slots[SLOTS] = {};

  std::atomic<uint64_t>& slot(uint64_t key, int i) const {
    return slots[((key * 0x9e3779b97f4a7c15u >> 32) + (uint64_t)i) % SLOTS];
  }
};

// The first candidate that is as fast as any, by seconds(index, round).
template <class Seconds>
static int fastest(const std::vector<int>& candidates, int rounds, Seconds seconds) {
  std::vector<double> least(candidates.size(), INFINITY);
  double best = INFINITY;
  for (int round = 0; round < rounds; ++round)
    for (size_t i = 0; i < candidates.size(); ++i) {
      if (round > 1 && least[i] > HOPELESS * best) continue;
      least[i] = std::min(least[i], seconds(candidates[i]));
      best = std::min(best, least[i]);
    }
  for (size_t i = 0; i < candidates.size(); ++i)
    if (least[i] <= ALIKE * best) return candidates[i];
  return candidates[0];
}

// Of copies that this machine can run, best first as far as can be known without trying, those to be
// tried for a call: of those that are the same code for it, the first.
static std::vector<int> candidates_for(const KvfAttend& call, const std::vector<Isa>& isas) {
  std::vector<int> found;
  std::vector<int32_t> recipes;
  for (size_t i = 0; i < isas.size(); ++i) {
    const int32_t recipe = isas[i].table->recipe(call);
    const bool last_resort = i && i + 1 == isas.size();
    if (last_resort || std::find(recipes.begin(), recipes.end(), recipe) != recipes.end()) continue;
    recipes.push_back(recipe);
    found.push_back((int)i);
  }
  return found;
}

static int choose(const KvfAttend& call, const CallKind& kind, const std::vector<Isa>& isas,
                  KvfParallel parallel, KvfTimer timer) {
  const std::vector<int> candidates = candidates_for(call, isas);
  if (candidates.size() < 2) return candidates[0];
  Trial trial(call, kind, *isas[0].table, parallel);
  if (!timer) trial.seconds(*isas[0].table);  // threads wake up, and memory comes near
  return fastest(candidates, kind.far ? FAR_ROUNDS : NEAR_ROUNDS, [&](int i) {
    return timer ? timer(isas[i].name, &trial.asked()) : trial.seconds(*isas[i].table);
  });
}
