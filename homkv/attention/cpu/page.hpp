// The inner kernels: one page of 64 tokens against a chunk of query rows.
#ifndef HOMKV_PAGE_HPP
#define HOMKV_PAGE_HPP

namespace homkv {
namespace HOMKV_ISA {

// Bytes from a page to the one whose cache lines to fetch meanwhile: every load of a page asks for the same line of that
// page. Asked for all at once, they would queue up behind the machine's few miss buffers and stall the loop.
using Ahead = intptr_t;
inline void fetch(const uint8_t* here, Ahead ahead) { __builtin_prefetch((const void*)((intptr_t)here + ahead), 0, 2); }

template <int R, int N>
inline void zero(vi (&x)[R][N]) {
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) x[r][n] = vi{};
}

// Moves sums that are about to overflow into 32-bit accumulators.
template <class Codes, int R, int N>
inline void flush(vi (&part)[R][N], vi (&acc)[R][N]) {
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) {
      acc[r][n] += Codes::widen(part[r][n]);
      part[r][n] = vi{};
    }
}

// acc[r][block * planes + plane] = q[r] . code for four vectors of tokens.
template <int B, int R>
inline void accumulate_scores(const uint8_t* codes, Ahead ahead, int groups, const int32_t* q, vi (&acc)[R][4]) {
  using Codes = KeyCodes<B>;
  constexpr int planes = Codes::planes, lanes = 8 * B, blocks = 4 / planes;
  vi part[R][4];
  zero(part);
  if (Codes::steps) zero(acc);
  for (int j = 0; j < groups; j++) {
    vi k[4];
    UNROLL for (int b = 0; b < blocks; b++) {
      const uint8_t* from = codes + (j * lanes + b * VL) * 4;
      if (b * VL % 16 == 0) fetch(from, ahead);
      const vi x = Codes::open(load<vi>(from));
      UNROLL for (int i = 0; i < planes; i++) k[b * planes + i] = Codes::plane(x, i);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const vi qr = splat_int(q[j * R + r]);
      UNROLL for (int n = 0; n < 4; n++) part[r][n] = Codes::dot(part[r][n], k[n], qr);
    }
    if (Codes::steps && (j + 1 == groups || (j + 1) % (Codes::steps ? Codes::steps : 1) == 0)) flush<Codes>(part, acc);
  }
  UNROLL for (int r = 0; r < R; r++) {
    if (!Codes::steps)
      UNROLL for (int n = 0; n < 4; n++) acc[r][n] = part[r][n];
    UNROLL for (int b = 0; b < blocks; b++) Codes::settle(acc[r] + b * planes);
  }
}

// s[r][t] += k_scale[t] * q_scale[r] * (q_int[r] . lane[t]), from start[r] on where given. Tokens lie in lanes, four
// accumulators per row.
// codes [width / 4][8 B lanes][4 slots]; q [width / 4][R] dwords of four int8.
template <int B, int R>
void score_class(const uint8_t* codes, const uint8_t* scales, Ahead ahead, int groups, const int32_t* q,
                 const float* q_scale, const float* q_sum, const float* start, float (*s)[64]) {
  using Codes = KeyCodes<B>;
  constexpr int planes = Codes::planes, lanes = 8 * B, blocks = 4 / planes;
  for (int l = 0; l < lanes; l += blocks * VL) {
    vi acc[R][4];
    accumulate_scores<B, R>(codes + l * 4, ahead, groups, q, acc);
    fetch(scales, ahead);
    vf scale[4];
    UNROLL for (int n = 0; n < 4; n++) scale[n] = load_scales(scales + n % planes * lanes + l + n / planes * VL);
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int n = 0; n < 4; n++) {
        float* to = s[r] + n % planes * lanes + l + n / planes * VL;
        const vf dot = fma(to_float(acc[r][n]), splat(Codes::gain(n % planes)), splat(-Codes::offset * q_sum[r]));
        store(to, fma(dot, scale[n] * q_scale[r], start ? splat(start[r]) : load<vf>(to)));
      }
    }
  }
}

// o[r][c] += weight[r] * sum over tokens of p[r][t] * lane[t][c] for N vectors of channels, channels in lanes.
// codes [8 B / 4][width slots][4 lanes], from the first of these channels on. Reads up to VL channels past the class:
// the V scales and the centre follow it in the page.
template <int B, int R, int N>
void weigh_block(const uint8_t* codes, Ahead ahead, int width, const uint8_t (*p)[64], const float* weight,
                 const int32_t* p_sum, float* o, int o_stride) {
  using Codes = ValueCodes<B>;
  constexpr int planes = Codes::planes, groups = 2 * B, step = Codes::steps ? Codes::steps / planes : groups;
  vi part[R][N], acc[R][N];
  zero(part);
  zero(acc);
  for (int g = 0; g < groups; g++) {
    vi x[N];
    UNROLL for (int n = 0; n < N; n++) {
      const uint8_t* from = codes + (g * width + n * VL) * 4;
      if (n * VL % 16 == 0) fetch(from, ahead);
      x[n] = load<vi>(from);
    }
    UNROLL for (int i = 0; i < planes; i++) {
      vi v[N];
      UNROLL for (int n = 0; n < N; n++) v[n] = Codes::plane(x[n], i);
      UNROLL for (int r = 0; r < R; r++) {
        const vi pr = splat_int(load_dword(p[r] + i * 8 * B + g * 4));
        UNROLL for (int n = 0; n < N; n++) part[r][n] = Codes::dot(part[r][n], pr, v[n]);
      }
    }
    if (Codes::steps && (g + 1) % step == 0) flush<Codes>(part, acc);
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) {
      float* to = o + r * o_stride + n * VL;
      const vi sum = Codes::steps ? acc[r][n] : part[r][n];
      const vf dot = to_float(sum * Codes::gain - Codes::offset * p_sum[r]);
      store(to, fma(dot, splat(weight[r]), load<vf>(to)));
    }
}

template <int B, int R>
void weigh_class(const homkv_class& cls, const uint8_t* page, Ahead ahead, const uint8_t (*p)[64], const float* weight,
                 const int32_t* p_sum, float* o, int o_stride) {
  const uint8_t* codes = page + cls.codes_offset;
  int c = 0;
  for (; c + (V_BLOCKS - 1) * VL < cls.width; c += V_BLOCKS * VL)
    weigh_block<B, R, V_BLOCKS>(codes + c * 4, ahead, cls.width, p, weight, p_sum, o + c, o_stride);
  for (; c + VL < cls.width; c += 2 * VL)
    weigh_block<B, R, 2>(codes + c * 4, ahead, cls.width, p, weight, p_sum, o + c, o_stride);
  for (; c < cls.width; c += VL)
    weigh_block<B, R, 1>(codes + c * 4, ahead, cls.width, p, weight, p_sum, o + c, o_stride);
}

constexpr float NEGLIGIBLE = 0x1p-100f;  // weights relative to the best token's so far, times a V scale

// Softmax weights times the class's V scales, to uint8 by their own maximum.
template <int R>
void round_weights(const float (*s)[64], const uint8_t* scales, Ahead ahead, uint8_t (*p)[64], float* weight,
                   int32_t* p_sum) {
  constexpr int n = 64 / VL;
  fetch(scales, ahead);
  vf scale[n];
  UNROLL for (int i = 0; i < n; i++) scale[i] = load_scales(scales + i * VL);
  UNROLL for (int r = 0; r < R; r++) {
    vf w[n], top = {};
    UNROLL for (int i = 0; i < n; i++) {
      w[i] = load<vf>(s[r] + i * VL) * scale[i];
      top = max(top, w[i]);
    }
    const float largest = max_lanes(top), inverse = largest > NEGLIGIBLE ? 255 / largest : 0;
    vi code[n], sum = {};
    UNROLL for (int i = 0; i < n; i++) {
      code[i] = round_int(w[i] * inverse);
      if (VALUE_OFFSETS) sum += code[i];
    }
    store_u8x64(p[r], code);
    weight[r] = largest * (1 / 255.f);
    p_sum[r] = VALUE_OFFSETS ? (int32_t)sum_lanes(to_float(sum)) : 0;  // at most 64 * 255: exact in float32
  }
}

// out[r] = q[r] . centre: the part of the score that all tokens of the page share.
template <int R>
void score_centre(const uint8_t* centre, Ahead ahead, int dim, const float (*slots)[HOMKV_MAX_HEAD_DIM], float* out) {
  vf acc[R];
  UNROLL for (int r = 0; r < R; r++) acc[r] = vf{};
  for (int i = 0; i < dim; i += VL) {
    if (i % 32 == 0) fetch(centre + 2 * i, ahead);
    const vf x = load_f16(centre + 2 * i);
    UNROLL for (int r = 0; r < R; r++) acc[r] = fma(x, load<vf>(slots[r] + i), acc[r]);
  }
  UNROLL for (int r = 0; r < R; r++) out[r] = sum_lanes(acc[r]);
}

template <int R>
void attend_chunk(const homkv_layout& layout, const uint8_t* page, Ahead ahead, const QueryTile& query, int row,
                  Running& state) {
  alignas(64) float s[R][64];
  float centre[R];
  score_centre<R>(page + layout.centre_offset, ahead, layout.head_dim, query.slots + row, centre);
  if (layout.num_k == 0)
    for (int r = 0; r < R; r++)
      for (int t = 0; t < 64; t++) s[r][t] = centre[r];
  const int32_t* codes = query.codes + row * (layout.head_dim / 4);
  for (int c = 0; c < layout.num_k; c++) {
    const homkv_class& cls = layout.k[c];
    auto score = cls.bits == 2 ? score_class<2, R> : cls.bits == 4 ? score_class<4, R> : score_class<8, R>;
    score(page + cls.codes_offset, page + cls.scales_offset, ahead, cls.width / 4, codes + cls.start / 4 * R,
          query.scale[c] + row, query.sum[c] + row, c == 0 ? centre : nullptr, s);
  }
  softmax_tile<R>(s, state, row);
  alignas(64) uint8_t p[R][64];
  float weight[R], *o = state.o + row * state.width;
  int32_t p_sum[R];
  for (int c = 0; c < layout.num_v; c++) {
    const homkv_class& cls = layout.v[c];
    round_weights<R>(s, page + cls.scales_offset, ahead, p, weight, p_sum);
    auto weigh = cls.bits == 2 ? weigh_class<2, R> : cls.bits == 4 ? weigh_class<4, R> : weigh_class<8, R>;
    weigh(cls, page, ahead, p, weight, p_sum, o + padded_offset(layout, c), state.width);
  }
}

inline void attend_page(const homkv_layout& layout, const uint8_t* page, Ahead ahead, const QueryTile& query,
                        Running& state) {
  for (int row = 0; row < state.rows; ahead = 0) {  // one chunk fetches ahead; a fetch of the own line costs little
    const int n = chunk_rows(state.rows - row);
    if (n == 1) attend_chunk<1>(layout, page, ahead, query, row, state);
    else if (n == 2) attend_chunk<2>(layout, page, ahead, query, row, state);
    else if (n == 3) attend_chunk<MAX_ROWS < 3 ? MAX_ROWS : 3>(layout, page, ahead, query, row, state);
    else attend_chunk<MAX_ROWS>(layout, page, ahead, query, row, state);
    row += n;
  }
}

}  // namespace HOMKV_ISA
}  // namespace homkv
#endif
