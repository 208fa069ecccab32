// Compiled once per instruction set, with KVF_NAMESPACE and KVF_TABLE naming the copy.
#include <map>
#include <string>

#include "append.h"
#include "move.h"
#include "prefill.h"
#include "read.h"
#include "read_back.h"
#include "recipe.h"
#include "select.h"
#include "table.h"

namespace KVF_NAMESPACE {
static const char* formats() {
  static const std::string names = [] {
    std::map<int, std::string> by_code;
#define KVF_NAME(F) by_code[F::code] = F::name;
    KVF_FORMATS(KVF_NAME)
#undef KVF_NAME
    std::string all;
    for (const auto& [code, name] : by_code) all += (all.empty() ? "" : " ") + name;
    return all;
  }();
  return names.c_str();
}
}  // namespace

extern const IsaTable KVF_TABLE;
const IsaTable KVF_TABLE = {
    KVF_NAMESPACE::recipe,     KVF_NAMESPACE::block_bytes_of, KVF_NAMESPACE::formats,
    KVF_NAMESPACE::attend_any, KVF_NAMESPACE::append_all,     KVF_NAMESPACE::read_back,
    KVF_NAMESPACE::move,       KVF_NAMESPACE::select,         KVF_NAMESPACE::read_lines};
