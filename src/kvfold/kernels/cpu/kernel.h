// The C interface between Python (ctypes) and the kernels. header.py reads constants and structs
// here: numbers of fixed size, pointers, structs, arrays of a stated length.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// The limits of every kernel; Python reads them here.
enum KvfLimit : int32_t {
  KVF_MAX_DIM = 1024,   // numbers of a head
  KVF_MAX_PARTS = 4,    // stores that one call reads
  KVF_MAX_TOKENS = 16,  // queries per sequence that the kernels are meant for
  KVF_BLOCK = 16        // tokens of a packed block
};

// The numbers of tensors; formats of the same have the same codes (see formats.h).
enum KvfDtype : int32_t { KVF_F32, KVF_F16, KVF_BF16 };

// One side (keys or values) of a store. Strides are in bytes.
//
// packed = 1: blocks of 16 tokens in the order the kernels read them (see layout.h).
// packed = 0: one row per token, row_stride apart.
struct KvfSide {
  int32_t format;  // its code; all are listed in formats.h
  int32_t packed;
  int32_t dim;       // head size
  int32_t rotation;  // size of the Hadamard blocks the rows were rotated by; 0 for none
  uint8_t* data;
  int64_t page_stride, head_stride, row_stride;
  uint16_t* scales;  // bfloat16, [page][head][block][group][16] or, unpacked, [..][token][group]
  int64_t scale_page_stride, scale_head_stride;
};

// A store of keys and values: tokens begin[b] <= position < end[b] of each sequence b, at
// page table[b][position / page_size], slot position % page_size. Entries < 0 hold nothing.
// Each KV head may have its own; strides in numbers, 0 for those that all heads share.
struct KvfPart {
  KvfSide k, v;
  const int32_t* table;
  int64_t table_stride, table_head_stride;
  int32_t page_size;
  const int32_t* begin;  // null: 0
  const int32_t* end;
  int32_t range_stride, range_head_stride;  // of begin and end
};

struct KvfTensor {  // [B, H, T, dim], the last dimension contiguous; strides in elements
  void* data;
  int32_t format;  // a KvfDtype
  int64_t batch_stride, head_stride, token_stride;
};

struct KvfAttend {
  int32_t batch, num_heads, num_kv_heads, tokens, head_dim, v_head_dim;
  KvfTensor q, out;
  float* lse;                  // [B, Hq, T] contiguous, or null
  const int32_t* start;        // [B]: first visible position, or null
  const int32_t* length;       // [B]: the last query's position + 1
  float scale, softcap;        // softcap 0: none
  int32_t left, right, sinks;  // keys seen before and after a query's own; -1: no limit
  const float* sink_logits;    // [Hq] joins the softmax's denominator, or null
  const float* alibi_slopes;   // [Hq] ALiBi, or null
  const float* mask;           // additive, or null; strides in elements, keys contiguous
  int64_t mask_batch_stride, mask_head_stride, mask_token_stride;
  int32_t num_parts;
  KvfPart parts[KVF_MAX_PARTS];
  int32_t threads;
  int32_t chunk;  // keys per unit of work; 0 chooses
};

// Write tokens at positions first[b] … first[b] + tokens - 1 of each sequence.
struct KvfAppend {
  int32_t batch, num_kv_heads, tokens;
  KvfTensor k, v;
  const int32_t* first;
  KvfPart part;  // begin and end are not read
  int32_t threads;
};

// Read positions below `keys` of each sequence back as numbers: those that the part holds.
struct KvfReadBack {
  int32_t batch, num_kv_heads, keys;
  KvfTensor k, v;  // [B, Hkv, keys, dim]; other rows are left as they are
  KvfPart part;
  int32_t threads;
};

// Move tokens of sequences of one KV head: the one at from[offset[b] + i] to the i-th position of
// what the part holds of sequence b, which is never an earlier one.
struct KvfMove {
  int32_t batch;
  const int32_t* from;
  const int64_t* offset;  // [B + 1]
  KvfPart part;
  int32_t threads;
};

// How the scores of a page's keys are estimated (select.h).
enum KvfSummary : int32_t { KVF_SPREAD = 0, KVF_BOX = 1 };

// Choose pages of each sequence and KV head: always[b] from its beginning, and of those up to
// last[b] the keep[b] that promise most, or fewer that promise top_p of the weight.
struct KvfSelect {
  int32_t batch, num_heads, num_kv_heads, tokens, head_dim;
  KvfTensor q;
  KvfSide summary;  // two unpacked rows a page, bf16 or int8
  const int32_t* table;
  int64_t table_stride;
  const int32_t* always;
  const int32_t* last;
  const int32_t* keep;
  float scale, softcap, top_p, spreads;  // softcap, top_p 0: none
  int32_t kind;                          // a KvfSummary
  int32_t* chosen;                       // [B, Hkv, room]: pages by position
  int32_t* count;                        // [B, Hkv]
  int64_t room;
  float* weights;  // [B, Hkv, weights_room] of the pages from always[b] on, or null
  int64_t weights_room;
  int32_t threads;
};

// Run body(data) on `threads` threads, as OpenMP's GOMP_parallel does.
typedef void (*KvfParallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// How long a copy of the kernels takes for a call like this, in place of measuring it.
typedef double (*KvfTimer)(const char* isa, const KvfAttend* call);

// The instruction set in use: the one that was set, else the first of kvf_isas, in whose place
// attention takes the one that was fastest in a trial (choice.h).
const char* kvf_isa();
int32_t kvf_set_isa(const char* name);  // 0 when this machine has it; "auto": none is set
void kvf_set_timer(KvfTimer timer);     // null: trials; forgets what was chosen
// What was chosen, a line each: formats of keys, values and queries, head sizes, rows, far, name
// (trial.h: CallKind). Returns the bytes of it all, of which up to `room` are written.
int64_t kvf_choices(char* out, int64_t room);
const char* kvf_isas();                  // all that this machine has, best first, space-separated
const char* kvf_formats();               // names of the formats by code, space-separated
void kvf_set_parallel(KvfParallel run);  // null: the library's own threads
int32_t kvf_attend(const KvfAttend* call);
int32_t kvf_append(const KvfAppend* call);
int32_t kvf_read_back(const KvfReadBack* call);
int32_t kvf_move(const KvfMove* call);
int32_t kvf_select(const KvfSelect* call);
double kvf_read(const uint8_t* data, int64_t bytes, int32_t threads);  // sums; for bandwidth
int64_t kvf_sizeof(int32_t what);  // struct sizes, to check the Python mirror
}
#pragma GCC visibility pop

constexpr int64_t OWN_CACHE = 1 << 20;  // bytes that lie near a core, as most now have them

// How a part is read: the pages of a sequence as a KV head has them, and which positions it holds.
static inline const int32_t* pages_of(const KvfPart& part, int b, int head) {
  return part.table + b * part.table_stride + head * part.table_head_stride;
}
static inline int32_t begin_of(const KvfPart& part, int b, int head) {
  return part.begin ? part.begin[b * part.range_stride + head * part.range_head_stride] : 0;
}
static inline int32_t end_of(const KvfPart& part, int b, int head) {
  return part.end[b * part.range_stride + head * part.range_head_stride];
}
// Whether a part's values are the first numbers of its keys' rows.
static inline bool values_within(const KvfPart& part) {
  const KvfSide &k = part.k, &v = part.v;
  return k.data == v.data && k.format == v.format && v.dim <= k.dim && !k.packed && !v.packed &&
         k.page_stride == v.page_stride && k.head_stride == v.head_stride &&
         k.row_stride == v.row_stride && k.scales == v.scales;
}
