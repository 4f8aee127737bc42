// A tile of query rows as the page kernels read them: slot order, rotated, int8 per class; and what is left after.
#ifndef HOMKV_QUERY_HPP
#define HOMKV_QUERY_HPP

namespace homkv {
namespace HOMKV_ISA {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Orthonormal Walsh-Hadamard transform of one block of n, the sums in the order of docs/format.md (h = 1, 2, 4 ...).
// Every pass reads neighbours and writes halves: it vectorises at every size, and log2(n) passes restore the order.
inline void hadamard(float* x, int n) {
  float other[HOMKV_MAX_HEAD_DIM], *from = x, *to = other;
  for (int size = 1; size < n; size *= 2) {
    for (int i = 0; i < n / 2; i++) {
      to[i] = from[2 * i] + from[2 * i + 1];
      to[i + n / 2] = from[2 * i] - from[2 * i + 1];
    }
    float* swap = from;
    from = to;
    to = swap;
  }
  const float scale = (float)(1 / __builtin_sqrt((double)n));
  for (int i = 0; i < n; i++) x[i] = from[i] * scale;
}

inline void rotate_class(float* x, const homkv_class& cls) {
  const int block = cls.width & -cls.width;
  for (int c = 0; c < cls.width; c += block) hadamard(x + c, block);
}

// As integers, since the compiler may not reorder a maximum of floats.
inline float largest_magnitude(const float* x, int n) {
  int32_t largest = 0;
  for (int i = 0; i < n; i++) {
    const int32_t bits = load_dword(x + i) & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  float result;
  __builtin_memcpy(&result, &largest, 4);
  return result;
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
      const float largest = largest_magnitude(x + cls.start, cls.width), inverse = largest > 0 ? 127 / largest : 0;
      int8_t code[HOMKV_MAX_HEAD_DIM];
      int32_t total = 0;
      for (int i = 0; i < cls.width; i++) {
        const int32_t rounded = (int32_t)__builtin_rintf(x[cls.start + i] * inverse);
        code[i] = (int8_t)rounded;
        total += rounded;
      }
      for (int i = 0; i < cls.width; i += 4) dwords[(cls.start + i) / 4 * n + r] = load_dword(code + i);
      scale[c][chunk + r] = largest / 127 * scale_of_scores;
      sum[c][chunk + r] = (float)total;
    }
  }
};

// Running softmax of a tile of rows: the output so far is sum 2^(s - m) v, the denominator the sum over l's lanes.
struct Running {
  float m[TILE_ROWS];
  vf l[TILE_ROWS];
  float* o;
  int rows, width;  // o [rows, width]

  Running(const Partial& out, int num_rows, int row_floats) : o(out.o), rows(num_rows), width(row_floats) {
    for (int i = 0; i < rows * width; i++) o[i] = 0;
    for (int r = 0; r < rows; r++) m[r] = -__builtin_inff(), l[r] = vf{};
  }

  void finish(const Partial& out) const {
    for (int r = 0; r < rows; r++) out.m[r] = m[r], out.l[r] = sum_lanes(l[r]);
  }

  // Raises the row's maximum to that of top and shrinks what was summed so far.
  void raise(int row, vf top) {
    const float after = max_lanes(top);
    if (!(after > m[row])) return;
    const float keep = exp2_nonpositive(splat(m[row] - after))[0];
    m[row] = after;
    l[row] = l[row] * keep;
    for (int i = 0; i < width; i += VL) store(o + row * width + i, load<vf>(o + row * width + i) * keep);
  }
};

// Turns scores s of 64 keys into weights 2^(s - m) and takes them into the running sums. The maximum seldom grows after
// the first keys, so the steady state compares with it and needs no reduction across lanes.
template <int R>
inline void softmax_tile(float (*s)[64], Running& state, int row) {
  vf top[R];
  bool grown = false;
  UNROLL for (int r = 0; r < R; r++) {
    top[r] = load<vf>(s[r]);
    UNROLL for (int t = VL; t < 64; t += VL) top[r] = max(top[r], load<vf>(s[r] + t));
    grown |= any_greater(top[r], splat(state.m[row + r]));
  }
  if (__builtin_expect(grown, 0))
    for (int r = 0; r < R; r++) state.raise(row + r, top[r]);
  UNROLL for (int r = 0; r < R; r++) {
    vf sum = {};
    UNROLL for (int t = 0; t < 64; t += VL) {
      const vf p = exp2_nonpositive(load<vf>(s[r] + t) - state.m[row + r]);
      store(s[r] + t, p);
      sum += p;
    }
    state.l[row + r] += sum;
  }
}

}  // namespace HOMKV_ISA
}  // namespace homkv
#endif
