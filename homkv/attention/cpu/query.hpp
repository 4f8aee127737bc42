// A tile of query rows as the page kernels read them: slot order, rotated, int8 per class; and what is left after.
#ifndef HOMKV_QUERY_HPP
#define HOMKV_QUERY_HPP

namespace homkv {
namespace HOMKV_ISA {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Orthonormal Walsh-Hadamard transform of one block of n. Every pass reads halves and writes neighbours, which vectorises
// at every size and is the natural order again after log2(n) passes.
inline void hadamard(float* x, int n) {
  float other[HOMKV_MAX_HEAD_DIM], *from = x, *to = other;
  for (int size = 1; size < n; size *= 2) {
    for (int i = 0; i < n / 2; i++) {
      to[2 * i] = from[i] + from[i + n / 2];
      to[2 * i + 1] = from[i] - from[i + n / 2];
    }
    float* swap = from;
    from = to;
    to = swap;
  }
  const float scale = 1 / __builtin_sqrtf((float)n);
  for (int i = 0; i < n; i++) x[i] = from[i] * scale;
}

inline void rotate_class(float* x, const homkv_class& cls) {
  const int block = cls.width & -cls.width;
  for (int c = 0; c < cls.width; c += block) hadamard(x + c, block);
}

// Rows are taken in chunks of at most MAX_ROWS, as even as possible (5 rows are 3 and 2, not 4 and 1).
inline int chunk_rows(int left) {
  const int chunks = (left + MAX_ROWS - 1) / MAX_ROWS;
  return (left + chunks - 1) / chunks;
}

struct QueryTile {
  alignas(64) int32_t codes[TILE_ROWS * HOMKV_MAX_HEAD_DIM / 4];  // per chunk [slot / 4][row of the chunk] dwords
  float slots[TILE_ROWS][HOMKV_MAX_HEAD_DIM];                     // unrounded, times softmax scale and log2(e)
  float scale[HOMKV_MAX_CLASSES][TILE_ROWS];                      // of the codes, times softmax scale and log2(e)
  float sum[HOMKV_MAX_CLASSES][TILE_ROWS];                        // of the codes

  void prepare(const homkv_layout& layout, const float* q, int rows, float softmax_scale) {
    for (int row = 0; row < rows;) {
      const int n = chunk_rows(rows - row);
      for (int r = 0; r < n; r++)
        prepare_row(layout, q + (row + r) * layout.head_dim, softmax_scale * LOG2_E, row, n, r);
      row += n;
    }
  }

 private:
  void prepare_row(const homkv_layout& layout, const float* q, float scale_of_scores, int chunk, int n, int r) {
    float x[HOMKV_MAX_HEAD_DIM];
    for (int i = 0; i < layout.head_dim; i++) {
      x[i] = q[layout.order[i]];
      slots[chunk + r][i] = x[i] * scale_of_scores;
    }
    int32_t* dwords = codes + chunk * (layout.head_dim / 4);
    for (int c = 0; c < layout.num_k; c++) {
      const homkv_class& cls = layout.k[c];
      rotate_class(x + cls.start, cls);
      float largest = 0;
      for (int i = cls.start; i < cls.start + cls.width; i++) largest = max_float(largest, __builtin_fabsf(x[i]));
      const float inverse = largest > 0 ? 127 / largest : 0;
      float total = 0;
      for (int i = cls.start; i < cls.start + cls.width; i += 4) {
        int8_t four[4];
        for (int j = 0; j < 4; j++) {
          const float code = __builtin_rintf(x[i + j] * inverse);
          four[j] = (int8_t)code;
          total += code;
        }
        dwords[i / 4 * n + r] = load_dword(four);
      }
      scale[c][chunk + r] = largest / 127 * scale_of_scores;
      sum[c][chunk + r] = total;
    }
  }
};

// Before the first keys: m = -inf, whose weight 2^-126 meets an output of 0, so no kernel treats them apart.
inline void reset(const Partial& out, int rows, int width) {
  for (int i = 0; i < rows * width; i++) out.o[i] = 0;
  for (int r = 0; r < rows; r++) out.m[r] = -__builtin_inff(), out.l[r] = 0;
}

// Turns scores s of 64 keys into weights 2^(s - their maximum) and takes them into the running maximum and sum.
// weight[r] is what this tile's weighted sum must be multiplied with; the output so far is rescaled where the maximum grew.
template <int R>
void softmax_tile(float (*s)[64], const Partial& out, int row, int width, float* weight) {
  alignas(64) float old_gap[VL] = {}, new_gap[VL] = {};
  static_assert(R <= VL, "one vector holds the chunk's corrections");
  float total[R];
  for (int r = 0; r < R; r++) {
    vf top = load<vf>(s[r]);
    for (int t = VL; t < 64; t += VL) top = max(top, load<vf>(s[r] + t));
    const float largest = max_lanes(top), before = out.m[row + r], after = max_float(before, largest);
    vf sum = {};
    for (int t = 0; t < 64; t += VL) {
      vf p = exp2_nonpositive(load<vf>(s[r] + t) - largest);
      store(s[r] + t, p);
      sum += p;
    }
    total[r] = sum_lanes(sum);
    old_gap[r] = before - after;
    new_gap[r] = largest - after;
    out.m[row + r] = after;
  }
  const vf keep = exp2_nonpositive(load<vf>(old_gap)), take = exp2_nonpositive(load<vf>(new_gap));
  for (int r = 0; r < R; r++) {
    out.l[row + r] = out.l[row + r] * keep[r] + total[r] * take[r];
    weight[r] = take[r];
    if (old_gap[r] < 0)
      for (int i = 0; i < width; i += VL) {
        float* o = out.o + (row + r) * width + i;
        store(o, load<vf>(o) * keep[r]);
      }
  }
}

}  // namespace HOMKV_ISA
}  // namespace homkv
#endif
