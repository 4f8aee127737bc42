// Decode attention on packed pages: integer scores, online softmax, integer weighted sum (docs/format.md, "Computing
// with a page"). Compiled once per instruction set; HOMKV_ISA names the namespace, HOMKV_ISA_HEADER the vector types.
#include "abi.h"
#include HOMKV_ISA_HEADER
#include "vector.hpp"
#include "kernels.hpp"
#include "query.hpp"
#include "page.hpp"

namespace homkv {
namespace HOMKV_ISA {

// --- pages -----------------------------------------------------------------------------------------------------------

inline const uint8_t* page_at(const homkv_attend_args& a, int batch, int head, int page) {
  int64_t block = a.page_table[(int64_t)batch * a.max_pages + page];
  return a.pool + (block * a.heads + head) * a.layout->page_bytes;
}

constexpr int FETCH_DISTANCE = 2;  // pages: one is too late where memory is slow, three are no better

// The page to fetch while page p is computed. At the end of a head, the first ones of the next: most likely the next task.
inline const uint8_t* page_ahead(const AttendTask& task, int p) {
  const int later = p + FETCH_DISTANCE;
  if (later < task.last) return page_at(*task.args, task.batch, task.head, later);
  const int next_head = task.head + 1 < task.args->heads ? task.head + 1 : task.head;
  return page_at(*task.args, task.batch, next_head, min_int(task.first + later - task.last, task.last - 1));
}

void attend_pages(const AttendTask& task) {
  const homkv_attend_args& a = *task.args;
  const homkv_layout& layout = *a.layout;
  Running state(task.out, task.rows, padded_offset(layout, layout.num_v));
  if (task.first < task.last) {
    const int64_t row = ((int64_t)task.batch * a.heads + task.head) * a.rows + task.row0;
    QueryTile query;
    query.prepare(layout, a.q + row * layout.head_dim, task.rows, a.softmax_scale);
    for (int p = task.first; p < task.last; p++) {
      const uint8_t* page = page_at(a, task.batch, task.head, p);
      attend_page(layout, page, (intptr_t)page_ahead(task, p) - (intptr_t)page, query, state);
    }
  }
  state.finish(task.out);
}

// --- exact tokens: sinks and window ------------------------------------------------------------------------------------

// Scores of R rows against `tokens` keys of the model's dtype, in float32; VL / R tokens at a time.
template <int DTYPE, int R>
void exact_scores(const void* k, int64_t at, int tokens, int dim, const float* q, float (*s)[64]) {
  constexpr int step = VL / R;
  for (int t = 0; t < 64; t += step) {
    vf acc[VL];
    UNROLL for (int i = 0; i < VL; i++) acc[i] = vf{};
    for (int c = 0; t < tokens && c < dim; c += VL) {
      UNROLL for (int i = 0; i < step; i++) {
        const vf x = load_as_float<DTYPE>(k, at + (int64_t)min_int(t + i, tokens - 1) * dim + c);
        UNROLL for (int r = 0; r < R; r++)
          acc[r * step + i] = fma(x, load<vf>(q + r * HOMKV_MAX_HEAD_DIM + c), acc[r * step + i]);
      }
    }
    float sums[VL];
    store(sums, sum_each(acc));
    for (int r = 0; r < R; r++)
      for (int i = 0; i < step; i++) s[r][t + i] = t + i < tokens ? sums[r * step + i] : -__builtin_inff();
  }
}

// o[r] += sum of p[r][t] v[t] for N vectors of channels from c on.
template <int DTYPE, int R, int N>
inline void exact_block(const void* v, int64_t at, int tokens, int dim, const float (*p)[64], float* o) {
  vf acc[R][N];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) acc[r][n] = load<vf>(o + r * dim + n * VL);
  for (int t = 0; t < tokens; t++) {
    vf x[N];
    UNROLL for (int n = 0; n < N; n++) x[n] = load_as_float<DTYPE>(v, at + (int64_t)t * dim + n * VL);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int n = 0; n < N; n++) acc[r][n] = fma(x[n], splat(p[r][t]), acc[r][n]);
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) store(o + r * dim + n * VL, acc[r][n]);
}

template <int DTYPE, int R>
void exact_rows(const AttendTask& task, const float* q, int row, Running& state) {
  const homkv_attend_args& a = *task.args;
  const int dim = a.layout->head_dim;
  const int64_t base = ((int64_t)a.slots[task.batch] * a.heads + task.head) * a.exact_tokens * dim;
  alignas(64) float s[R][64];
  for (int t = task.first; t < task.last; t += 64) {
    const int tokens = min_int(task.last - t, 64);
    const int64_t at = base + (int64_t)t * dim;
    exact_scores<DTYPE, R>(a.exact_k, at, tokens, dim, q + row * HOMKV_MAX_HEAD_DIM, s);
    softmax_tile<R>(s, state, row);
    float* o = state.o + row * dim;
    int c = 0;
    for (; c + 2 * VL <= dim; c += 2 * VL) exact_block<DTYPE, R, 2>(a.exact_v, at + c, tokens, dim, s, o + c);
    for (; c < dim; c += VL) exact_block<DTYPE, R, 1>(a.exact_v, at + c, tokens, dim, s, o + c);
  }
}

template <int DTYPE>
void exact_tile(const AttendTask& task, const float* q, Running& state) {
  for (int row = 0; row < task.rows;) {
    const int left = task.rows - row;
    if (left >= 4) exact_rows<DTYPE, 4>(task, q, row, state), row += 4;
    else if (left >= 2) exact_rows<DTYPE, 2>(task, q, row, state), row += 2;
    else exact_rows<DTYPE, 1>(task, q, row, state), row += 1;
  }
}

void attend_exact(const AttendTask& task) {
  const homkv_attend_args& a = *task.args;
  const int dim = a.layout->head_dim;
  Running state(task.out, task.rows, dim);
  float q[TILE_ROWS * HOMKV_MAX_HEAD_DIM];
  const float* from = a.q + (((int64_t)task.batch * a.heads + task.head) * a.rows + task.row0) * dim;
  for (int r = 0; r < task.rows; r++)
    for (int c = 0; c < dim; c++) q[r * HOMKV_MAX_HEAD_DIM + c] = from[r * dim + c] * (a.softmax_scale * LOG2_E);
  if (a.exact_dtype == HOMKV_F32) exact_tile<HOMKV_F32>(task, q, state);
  else if (a.exact_dtype == HOMKV_F16) exact_tile<HOMKV_F16>(task, q, state);
  else exact_tile<HOMKV_BF16>(task, q, state);
  state.finish(task.out);
}

// --- merge ------------------------------------------------------------------------------------------------------------

inline void add_scaled(float* to, const float* from, float factor, int n) {
  for (int i = 0; i < n; i++) to[i] += factor * from[i];
}

// o = (rotated back sum of the page partials + exact partial) / l, in a fixed order.
void merge_row(const MergeTask& task, int row) {
  const homkv_layout& layout = *task.args->layout;
  const int dim = layout.head_dim, width = padded_offset(layout, layout.num_v), exact = task.num_parts - 1;
  float top = -__builtin_inff();
  for (int i = 0; i < task.num_parts; i++) top = max_float(top, task.parts[i].m[row]);
  float rotated[MAX_O] = {}, sum = 0;
  for (int i = 0; i < exact; i++) {
    if (task.parts[i].l[row] == 0) continue;
    const float factor = __builtin_exp2f(task.parts[i].m[row] - top);
    sum += factor * task.parts[i].l[row];
    add_scaled(rotated, task.parts[i].o + row * width, factor, width);
  }
  float o[HOMKV_MAX_HEAD_DIM] = {};
  for (int c = 0; c < layout.num_v; c++) {
    float* x = rotated + padded_offset(layout, c);
    rotate_class(x, layout.v[c]);
    for (int i = 0; i < layout.v[c].width; i++) o[layout.v[c].start + i] = x[i];
  }
  if (task.parts[exact].l[row] != 0) {
    const float factor = __builtin_exp2f(task.parts[exact].m[row] - top);
    sum += factor * task.parts[exact].l[row];
    add_scaled(o, task.parts[exact].o + row * dim, factor, dim);
  }
  const float inverse = sum > 0 ? 1 / sum : 0;
  for (int i = 0; i < dim; i++) task.o[row * dim + i] = o[i] * inverse;
  task.lse[row] = sum > 0 ? (top + __builtin_log2f(sum)) * LN_2 : -__builtin_inff();
}

void merge(const MergeTask& task) {
  for (int row = 0; row < task.args->rows; row++) merge_row(task, row);
}

}  // namespace HOMKV_ISA
}  // namespace homkv
