// The C ABI between binding.py and the kernels. binding.py mirrors every struct field by field: raise HOMKV_CPU_ABI
// with any change. All pointers are valid for the call only. The caller has checked shapes; index ranges are checked here.
#ifndef HOMKV_CPU_ABI_H
#define HOMKV_CPU_ABI_H
#include <stdint.h>

#define HOMKV_CPU_ABI 1
#define HOMKV_MAX_CLASSES 4
#define HOMKV_MAX_HEAD_DIM 256
#define HOMKV_PAGE_TOKENS 64

#ifdef __cplusplus
extern "C" {
#endif

enum { HOMKV_F32 = 0, HOMKV_F16 = 1, HOMKV_BF16 = 2 };

enum {
  HOMKV_OK = 0,
  HOMKV_NO_ISA = 1,            // the asked instruction set is not compiled in or not on this machine
  HOMKV_NO_MEMORY = 2,         // scratch could not be allocated
  HOMKV_KEYS_NOT_FINITE = 3,   // encode: a NaN or infinity
  HOMKV_VALUES_NOT_FINITE = 4,
  HOMKV_MEAN_RANGE = 5,        // encode: a key mean beyond fp16
  HOMKV_SCALE_RANGE = 6,       // encode: a scale above 240
  HOMKV_INDEX_RANGE = 7,       // a count or an index outside its array; nothing was written
};

typedef struct {
  int32_t start, width, bits, codes_offset, scales_offset;
} homkv_class;

typedef struct {
  int32_t head_dim, page_bytes, centre_offset, num_k, num_v;
  homkv_class k[HOMKV_MAX_CLASSES], v[HOMKV_MAX_CLASSES];
  int32_t order[HOMKV_MAX_HEAD_DIM];  // slot -> channel of K
} homkv_layout;

typedef struct {
  const homkv_layout* layout;
  const float* q;             // [batch, heads, rows, head_dim], natural channel order
  const uint8_t* pool;        // [num_blocks, heads, page_bytes]
  const int32_t* page_table;  // [batch, max_pages]
  const int32_t* num_pages;   // [batch]
  const void* exact_k;        // [slots, heads, exact_tokens, head_dim] of exact_dtype
  const void* exact_v;
  const int32_t* exact_len;   // [batch]
  const int32_t* slots;       // [batch]
  float* o;                   // [batch, heads, rows, head_dim]
  float* lse;                 // [batch, heads, rows], natural logarithm
  float softmax_scale;
  int32_t num_blocks, num_slots;  // of pool and exact_k
  int32_t batch, heads, rows, max_pages, exact_tokens, exact_dtype;
  int32_t pages_per_split;    // part of the result's rounding; never derived from the thread count
  int32_t threads, isa;       // isa: index into homkv_isa_name(), -1 for the best
} homkv_attend_args;

typedef struct {
  const homkv_layout* layout;
  const void* k;              // [heads, num_pages * 64, head_dim] of dtype, last dimension contiguous
  const void* v;
  int64_t k_head_stride, k_token_stride, v_head_stride, v_token_stride;  // elements
  uint8_t* pages;             // [*, heads, page_bytes]
  const int32_t* block_ids;   // [num_pages] first index into pages; null: 0, 1, 2 ...
  int32_t num_blocks;         // of pages
  int32_t heads, num_pages, dtype;
  int32_t threads, isa;
} homkv_encode_args;

#pragma GCC visibility push(default)
int homkv_abi(void);                  // HOMKV_CPU_ABI the library was built with
const char* homkv_isa_name(int isa);  // usable instruction sets, best first; null past the end
int homkv_attend(const homkv_attend_args* args);
int homkv_encode(const homkv_encode_args* args);
#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
#endif
