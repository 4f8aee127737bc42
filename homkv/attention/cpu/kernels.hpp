// Between api.cpp, compiled for the baseline machine, and the objects compiled once per instruction set.
#ifndef HOMKV_KERNELS_HPP
#define HOMKV_KERNELS_HPP
#include "abi.h"

namespace homkv {

constexpr int TILE_ROWS = 32;                  // query rows of one task: their int8 codes and outputs stay in L1/L2
constexpr int O_PAD = 16;                      // V classes start at multiples of the widest vector in the output scratch
constexpr int MAX_O = HOMKV_MAX_HEAD_DIM + HOMKV_MAX_CLASSES * O_PAD;

// Unnormalised attention over some of the keys: o = sum 2^(s - m) v, l = sum 2^(s - m), scores s in units of log 2.
struct Partial {
  float* o;  // [rows, width]
  float* m;  // [rows]
  float* l;  // [rows]
};

// One kv head of one sequence, a tile of its query rows and a range of keys.
struct AttendTask {
  const homkv_attend_args* args;
  int batch, head, row0, rows;
  int first, last;  // pages, or exact tokens
  Partial out;      // in the padded, rotated space of the V classes for pages; [rows, head_dim] for exact tokens
};

// All partials of one kv head of one sequence, the exact one last.
struct MergeTask {
  const homkv_attend_args* args;
  const Partial* parts;
  int num_parts;
  float* o;    // [rows, head_dim]
  float* lse;  // [rows]
};

// Pages [first, last) of the flat (page, head) sequence, head fastest.
struct EncodeTask {
  const homkv_encode_args* args;
  int first, last;
};

struct Kernels {
  const char* name;
  void (*attend_pages)(const AttendTask&);
  void (*attend_exact)(const AttendTask&);
  void (*merge)(const MergeTask&);
  int (*encode_pages)(const EncodeTask&);
  int encode_lanes;  // pages that one encode task should hold at least
};

// Offset of V class i in a padded output row; of the end of all classes for i = num_v.
inline int padded_offset(const homkv_layout& layout, int i) {
  int at = 0;
  for (int c = 0; c < i; c++) at += (layout.v[c].width + O_PAD - 1) / O_PAD * O_PAD;
  return at;
}

}  // namespace homkv
#endif
