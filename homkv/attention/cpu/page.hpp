// The inner kernels: one page of 64 tokens against a chunk of query rows.
#ifndef HOMKV_PAGE_HPP
#define HOMKV_PAGE_HPP

namespace homkv {
namespace HOMKV_ISA {

// s[r][t] += k_scale[t] * q_scale[r] * (q_int[r] . lane[t]). Tokens lie in lanes, four accumulators per row.
// codes [width / 4][8 B lanes][4 slots]; q [width / 4][R] dwords of four int8.
template <int B, int R>
void score_class(const uint8_t* codes, const uint8_t* scales, int groups, const int32_t* q, const float* q_scale,
                 const float* q_sum, float (*s)[64]) {
  using Codes = KeyCodes<B>;
  constexpr int planes = Codes::planes, lanes = 8 * B, blocks = 4 / planes, step = Codes::steps ? Codes::steps : 1 << 20;
  for (int l = 0; l < lanes; l += blocks * VL) {
    vi acc[R][4] = {};
    for (int j0 = 0; j0 < groups; j0 += step) {
      vi part[R][4] = {};
      const int stop = min_int(groups, j0 + step);
      for (int j = j0; j < stop; j++) {
        vi k[4];
        for (int b = 0; b < blocks; b++) {
          const vi x = Codes::open(load<vi>(codes + (j * lanes + l + b * VL) * 4));
          for (int i = 0; i < planes; i++) k[b * planes + i] = Codes::plane(x, i);
        }
        for (int r = 0; r < R; r++) {
          const vi qr = splat_int(q[j * R + r]);
          for (int i = 0; i < 4; i++) part[r][i] = Codes::dot(part[r][i], k[i], qr);
        }
      }
      for (int r = 0; r < R; r++)
        for (int i = 0; i < 4; i++) acc[r][i] += Codes::widen(part[r][i]);
    }
    for (int r = 0; r < R; r++)
      for (int b = 0; b < blocks; b++) {
        Codes::settle(acc[r] + b * planes);
        for (int i = 0; i < planes; i++) {
          const int t = i * lanes + l + b * VL;
          vf dot = fma(to_float(acc[r][b * planes + i]), splat(Codes::gain(i)), splat(-Codes::offset * q_sum[r]));
          vf scale = load_scales(scales + t) * q_scale[r];
          store(s[r] + t, fma(dot, scale, load<vf>(s[r] + t)));
        }
      }
  }
}

// o[r][c] += weight[r] * sum over tokens of p[r][t] * lane[t][c] for N vectors of channels, channels in lanes.
// codes [8 B / 4][width slots][4 lanes], from the first of these channels on. Reads up to VL channels past the class:
// the V scales and the centre follow it in the page.
template <int B, int R, int N>
void weigh_block(const uint8_t* codes, int width, const uint8_t (*p)[64], const float* weight, const int32_t* p_sum,
                 float* o, int o_stride) {
  using Codes = ValueCodes<B>;
  constexpr int planes = Codes::planes, groups = 2 * B, step = Codes::steps ? Codes::steps / planes : groups;
  vi acc[R][N] = {};
  for (int g0 = 0; g0 < groups; g0 += step) {
    vi part[R][N] = {};
    for (int g = g0; g < g0 + step; g++) {
      vi x[N];
      for (int n = 0; n < N; n++) x[n] = load<vi>(codes + (g * width + n * VL) * 4);
      for (int i = 0; i < planes; i++) {
        vi v[N];
        for (int n = 0; n < N; n++) v[n] = Codes::plane(x[n], i);
        for (int r = 0; r < R; r++) {
          const vi pr = splat_int(load_dword(p[r] + i * 8 * B + g * 4));
          for (int n = 0; n < N; n++) part[r][n] = Codes::dot(part[r][n], pr, v[n]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) acc[r][n] += Codes::widen(part[r][n]);
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      float* to = o + r * o_stride + n * VL;
      const vf sum = to_float(acc[r][n] * Codes::gain - Codes::offset * p_sum[r]);
      store(to, fma(sum, splat(weight[r]), load<vf>(to)));
    }
}

template <int B, int R>
void weigh_class(const homkv_class& cls, const uint8_t* page, const uint8_t (*p)[64], const float* weight,
                 const int32_t* p_sum, float* o, int o_stride) {
  const uint8_t* codes = page + cls.codes_offset;
  int c = 0;
  for (; c + (V_BLOCKS - 1) * VL < cls.width; c += V_BLOCKS * VL)
    weigh_block<B, R, V_BLOCKS>(codes + c * 4, cls.width, p, weight, p_sum, o + c, o_stride);
  for (; c + VL < cls.width; c += 2 * VL)
    weigh_block<B, R, 2>(codes + c * 4, cls.width, p, weight, p_sum, o + c, o_stride);
  for (; c < cls.width; c += VL)
    weigh_block<B, R, 1>(codes + c * 4, cls.width, p, weight, p_sum, o + c, o_stride);
}

// Softmax weights times the class's V scales, to uint8 by their own maximum.
template <int R>
void round_weights(const float (*s)[64], const uint8_t* scales, const float* tile_weight, uint8_t (*p)[64],
                   float* weight, int32_t* p_sum) {
  for (int r = 0; r < R; r++) {
    vf w[64 / VL], top = {};
    for (int i = 0; i < 64 / VL; i++) {
      w[i] = load<vf>(s[r] + i * VL) * load_scales(scales + i * VL);
      top = max(top, w[i]);
    }
    const float largest = max_lanes(top), inverse = 255 / largest;  // the page's best token has weight 1: never 0
    vi sum = {};
    for (int i = 0; i < 64 / VL; i++) {
      const vi code = round_int(w[i] * inverse);
      store_u8(p[r] + i * VL, code);
      sum += code;
    }
    weight[r] = tile_weight[r] * (largest * (1 / 255.f));
    p_sum[r] = (int32_t)sum_lanes(to_float(sum));  // at most 64 * 255: exact
  }
}

// s[r][t] = q[r] . centre for every token: the part of the score that all tokens of the page share.
template <int R>
void score_centre(const uint8_t* centre, int dim, const float (*slots)[HOMKV_MAX_HEAD_DIM], float (*s)[64]) {
  vf acc[R] = {};
  for (int i = 0; i < dim; i += VL) {
    const vf x = load_f16(centre + 2 * i);
    for (int r = 0; r < R; r++) acc[r] = fma(x, load<vf>(slots[r] + i), acc[r]);
  }
  for (int r = 0; r < R; r++) {
    const vf all = splat(sum_lanes(acc[r]));
    for (int t = 0; t < 64; t += VL) store(s[r] + t, all);
  }
}

template <int R>
void attend_chunk(const homkv_layout& layout, const uint8_t* page, const QueryTile& query, int row, int o_stride,
                  const Partial& out) {
  alignas(64) float s[R][64];
  score_centre<R>(page + layout.centre_offset, layout.head_dim, query.slots + row, s);
  const int32_t* codes = query.codes + row * (layout.head_dim / 4);
  for (int c = 0; c < layout.num_k; c++) {
    const homkv_class& cls = layout.k[c];
    auto score = cls.bits == 2 ? score_class<2, R> : cls.bits == 4 ? score_class<4, R> : score_class<8, R>;
    score(page + cls.codes_offset, page + cls.scales_offset, cls.width / 4, codes + cls.start / 4 * R,
          query.scale[c] + row, query.sum[c] + row, s);
  }
  float tile_weight[R], weight[R];
  int32_t p_sum[R];
  softmax_tile<R>(s, out, row, o_stride, tile_weight);
  alignas(64) uint8_t p[R][64];
  float* o = out.o + row * o_stride;
  for (int c = 0; c < layout.num_v; c++) {
    const homkv_class& cls = layout.v[c];
    round_weights<R>(s, page + cls.scales_offset, tile_weight, p, weight, p_sum);
    auto weigh = cls.bits == 2 ? weigh_class<2, R> : cls.bits == 4 ? weigh_class<4, R> : weigh_class<8, R>;
    weigh(cls, page, p, weight, p_sum, o + padded_offset(layout, c), o_stride);
  }
}

inline void attend_page(const homkv_layout& layout, const uint8_t* page, const QueryTile& query, int rows, int o_stride,
                        const Partial& out) {
  for (int row = 0; row < rows;) {
    const int n = chunk_rows(rows - row);
    if (n == 1) attend_chunk<1>(layout, page, query, row, o_stride, out);
    else if (n == 2) attend_chunk<2>(layout, page, query, row, o_stride, out);
    else if (n == 3) attend_chunk<MAX_ROWS < 3 ? MAX_ROWS : 3>(layout, page, query, row, o_stride, out);
    else attend_chunk<MAX_ROWS>(layout, page, query, row, o_stride, out);
    row += n;
  }
}

}  // namespace HOMKV_ISA
}  // namespace homkv
#endif
