// Quantize and pack pages (docs/format.md, "Encoding, exactly"). VL rows are fitted at once, one row per lane: the
// tokens of a page for K; the same token of VL pages for V, whose error runs from token to token.
// Compiled once per instruction set, without contraction of a * b + c.
#include "abi.h"
#include HOMKV_ISA_HEADER
#include "vector.hpp"
#include "kernels.hpp"
#include "fit.hpp"

namespace homkv {
namespace HOMKV_ISA {

constexpr int TOKENS = HOMKV_PAGE_TOKENS, MAX_DIM = HOMKV_MAX_HEAD_DIM;

inline void transpose(vf* x) {
  vf other[VL];
  for (int size = 1; size < VL; size *= 2) {
    for (int i = 0; i < VL / 2; i++) interleave(x[i], x[i + VL / 2], other[2 * i], other[2 * i + 1]);
    for (int i = 0; i < VL; i++) x[i] = other[i];
  }
}

// Element indices of the first key and value of one page, and where its bytes go.
struct Source {
  int64_t k, v;
  uint8_t* page;
};

inline Source source(const homkv_encode_args& a, int flat) {
  const int page = flat / a.heads, head = flat % a.heads;
  const int64_t block = a.block_ids ? a.block_ids[page] : page;
  return {head * a.k_head_stride + (int64_t)page * TOKENS * a.k_token_stride,
          head * a.v_head_stride + (int64_t)page * TOKENS * a.v_token_stride,
          a.pages + (block * a.heads + head) * a.layout->page_bytes};
}

// --- keys ------------------------------------------------------------------------------------------------------------

// Writes the page's centre and its float32 value per channel. Returns a status.
template <int DTYPE>
int centre_page(const homkv_encode_args& a, const Source& at, float* centre) {
  const homkv_layout& layout = *a.layout;
  uint16_t halves[MAX_DIM];
  vi not_finite = {};
  for (int c = 0; c < layout.head_dim; c += VL) {
    const vf sum = tree_sum<vf>(TOKENS, [&](int t) {
      const vf x = load_as_float<DTYPE>(a.k, at.k + t * a.k_token_stride + c);
      not_finite |= ((vi)x & 0x7FFFFFFF) >= 0x7F800000;
      return x;
    });
    store_f16(halves + c, sum * (1 / 64.f));
    store(centre + c, load_f16(halves + c));
  }
  if (any(not_finite)) return HOMKV_KEYS_NOT_FINITE;
  for (int s = 0; s < layout.head_dim; s++) {
    const uint16_t half = halves[layout.order[s]];
    if ((half & 0x7C00) == 0x7C00) return HOMKV_MEAN_RANGE;
    __builtin_memcpy(at.page + layout.centre_offset + 2 * s, &half, 2);
  }
  return HOMKV_OK;
}

// One class of VL tokens from `token` on: x holds the class's slots, rotated.
template <int B>
void encode_key_class(const homkv_class& cls, const vf* x, int token, uint8_t* page, vi& bad) {
  const vi byte = fit_scales<B>(x, cls.width, bad);
  store_u8(page + cls.scales_offset + token, byte);
  const vf inverse = 1.f / scale_value(byte);
  const int plane = token / (8 * B), lane = token % (8 * B);
  for (int c = 0; c < cls.width; c += 4) {
    vi dwords = {};
    for (int j = 0; j < 4; j++) dwords |= code_bits<B>(code<B>(x[c + j], inverse), plane) << (8 * j);
    uint8_t* to = page + cls.codes_offset + (c * 2 * B + lane) * 4;
    store(to, plane ? dwords | load<vi>(to) : dwords);
  }
}

template <int DTYPE>
int encode_keys(const homkv_encode_args& a, const Source& at) {
  const homkv_layout& layout = *a.layout;
  float centre[MAX_DIM];
  const int status = centre_page<DTYPE>(a, at, centre);
  if (status != HOMKV_OK) return status;
  int slot_of[MAX_DIM];
  for (int s = 0; s < layout.head_dim; s++) slot_of[layout.order[s]] = s;
  vi bad = {};
  for (int t = 0; t < TOKENS; t += VL) {
    vf x[MAX_DIM];
    for (int c = 0; c < layout.head_dim; c += VL) {
      vf block[VL];
      for (int r = 0; r < VL; r++)
        block[r] = load_as_float<DTYPE>(a.k, at.k + (t + r) * a.k_token_stride + c) - load<vf>(centre + c);
      transpose(block);
      for (int r = 0; r < VL; r++) x[slot_of[c + r]] = block[r];
    }
    for (int c = 0; c < layout.num_k; c++) {
      const homkv_class& cls = layout.k[c];
      hadamard_rows(x + cls.start, cls.width, cls.width & -cls.width);
      auto encode = cls.bits == 2 ? encode_key_class<2> : cls.bits == 4 ? encode_key_class<4> : encode_key_class<8>;
      encode(cls, x + cls.start, t, at.page, bad);
    }
  }
  return any(bad) ? HOMKV_SCALE_RANGE : HOMKV_OK;
}

// --- values ----------------------------------------------------------------------------------------------------------

// What VL pages' values become before their bytes are dealt out to the pages.
struct ValueStage {
  vi codes[MAX_DIM * TOKENS / 4];                         // per class [8 B / 4][width] dwords of four lanes
  uint8_t scales[HOMKV_MAX_CLASSES][TOKENS][VL];
  vf error[MAX_DIM];                                      // of the token before
};

template <int B>
void encode_value_class(const homkv_class& cls, vf* x, vf* error, int token, vi* codes, uint8_t* scales, vi& bad) {
  for (int c = 0; c < cls.width; c++) x[c] = x[c] + error[c] * 0.25f;
  const vi byte = fit_scales<B>(x, cls.width, bad);
  store_u8(scales, byte);
  const vf scale = scale_value(byte), inverse = 1.f / scale;
  const int plane = token / (8 * B), lane = token % (8 * B);
  vi* to = codes + lane / 4 * cls.width;
  const bool fresh = plane == 0 && lane % 4 == 0;
  for (int c = 0; c < cls.width; c++) {
    const vf value = code<B>(x[c], inverse);
    const vi bits = code_bits<B>(value, plane) << (8 * (lane % 4));
    to[c] = fresh ? bits : to[c] | bits;
    error[c] = x[c] - scale * value;
  }
}

// Token t of VL pages: x[channel], one page per lane.
template <int DTYPE>
void load_values(const homkv_encode_args& a, const Source* at, int t, vf* x, vi& not_finite) {
  for (int c = 0; c < a.layout->head_dim; c += VL) {
    for (int r = 0; r < VL; r++) {
      x[c + r] = load_as_float<DTYPE>(a.v, at[r].v + t * a.v_token_stride + c);
      not_finite |= ((vi)x[c + r] & 0x7FFFFFFF) >= 0x7F800000;
    }
    transpose(x + c);
  }
}

void deal_out(const homkv_layout& layout, const ValueStage& stage, int lane, uint8_t* page) {
  const vi* codes = stage.codes;
  for (int c = 0; c < layout.num_v; c++) {
    const homkv_class& cls = layout.v[c];
    const int dwords = cls.width * cls.bits * 2;
    for (int i = 0; i < dwords; i++) {
      const int32_t dword = codes[i][lane];
      __builtin_memcpy(page + cls.codes_offset + 4 * i, &dword, 4);
    }
    for (int t = 0; t < TOKENS; t++) page[cls.scales_offset + t] = stage.scales[c][t][lane];
    codes += dwords;
  }
}

template <int DTYPE>
int encode_values(const homkv_encode_args& a, const Source* at, int pages) {
  const homkv_layout& layout = *a.layout;
  static thread_local ValueStage stage;  // too large for a thread's stack
  for (vf& e : stage.error) e = vf{};
  vi not_finite = {}, bad = {};
  for (int t = 0; t < TOKENS; t++) {
    vf x[MAX_DIM];
    load_values<DTYPE>(a, at, t, x, not_finite);
    vi* codes = stage.codes;
    for (int c = 0; c < layout.num_v; c++) {
      const homkv_class& cls = layout.v[c];
      hadamard_rows(x + cls.start, cls.width, cls.width & -cls.width);
      auto encode = cls.bits == 2 ? encode_value_class<2> : cls.bits == 4 ? encode_value_class<4> : encode_value_class<8>;
      encode(cls, x + cls.start, stage.error + cls.start, t, codes, stage.scales[c][t], bad);
      codes += cls.width * cls.bits * 2;
    }
  }
  if (any(not_finite)) return HOMKV_VALUES_NOT_FINITE;
  if (any(bad)) return HOMKV_SCALE_RANGE;
  for (int i = 0; i < pages; i++) deal_out(layout, stage, i, at[i].page);
  return HOMKV_OK;
}

// --- pages -----------------------------------------------------------------------------------------------------------

template <int DTYPE>
int encode_typed(const EncodeTask& task) {
  const homkv_encode_args& a = *task.args;
  const homkv_layout& layout = *a.layout;
  const int used = layout.centre_offset + 2 * layout.head_dim;
  for (int first = task.first; first < task.last; first += VL) {
    const int pages = min_int(task.last - first, VL);
    Source at[VL];
    for (int i = 0; i < VL; i++) at[i] = source(a, first + min_int(i, pages - 1));  // idle lanes repeat the last page
    for (int i = 0; i < pages; i++) {
      const int status = encode_keys<DTYPE>(a, at[i]);
      if (status != HOMKV_OK) return status;
      for (int j = used; j < layout.page_bytes; j++) at[i].page[j] = 0;
    }
    const int status = encode_values<DTYPE>(a, at, pages);
    if (status != HOMKV_OK) return status;
  }
  return HOMKV_OK;
}

int encode_pages(const EncodeTask& task) {
  if (task.args->dtype == HOMKV_F32) return encode_typed<HOMKV_F32>(task);
  if (task.args->dtype == HOMKV_F16) return encode_typed<HOMKV_F16>(task);
  return encode_typed<HOMKV_BF16>(task);
}

void attend_pages(const AttendTask& task);
void attend_exact(const AttendTask& task);
void merge(const MergeTask& task);

extern const Kernels kernels;
const Kernels kernels = {HOMKV_ISA_NAME, attend_pages, attend_exact, merge, encode_pages, VL};

}  // namespace HOMKV_ISA
}  // namespace homkv
