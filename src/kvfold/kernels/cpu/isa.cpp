// Compiled once per instruction set, with KVF_NAMESPACE and KVF_TABLE naming the copy.
#include "append.h"
#include "attend.h"
#include "read.h"
#include "table.h"

extern const IsaTable KVF_TABLE;
const IsaTable KVF_TABLE = {KVF_NAMESPACE::attend, KVF_NAMESPACE::append_all,
                            KVF_NAMESPACE::read_lines};
