// Rows to codes and scales, VL rows at a time with one row per lane: the arithmetic of docs/format.md in its order, so
// every instruction set gives the same bytes. Compiled without contraction of a * b + c.
#ifndef HOMKV_FIT_HPP
#define HOMKV_FIT_HPP

namespace homkv {
namespace HOMKV_ISA {

constexpr float SMALLEST_SCALE = 0x1p-24f;
constexpr int32_t SCALE_BIAS = 103 << 3;

inline vf at_least(vf x, float bound) { return x < bound ? splat(bound) : x; }  // keeps a NaN, as torch does

inline int power_of_two(int n) {
  int size = 1;
  while (size < n) size *= 2;
  return size;
}

// Sum over size elements get(i), a power of two from 8 on, in the order "x[i] + x[i + n/2]". Eight elements of a
// residue class modulo size / 8 fold in registers; T is a vector or a struct of vectors with operator+.
template <class T, class F>
inline T tree_sum(int size, F get) {
  T part[HOMKV_MAX_HEAD_DIM / 8];
  const int n = size / 8;
  for (int i = 0; i < n; i++)
    part[i] = ((get(i) + get(i + 4 * n)) + (get(i + 2 * n) + get(i + 6 * n))) +
              ((get(i + n) + get(i + 5 * n)) + (get(i + 3 * n) + get(i + 7 * n)));
  for (int half = n / 2; half; half /= 2)
    for (int i = 0; i < half; i++) part[i] = part[i] + part[i + half];
  return part[0];
}

// log2(N) of a transform's passes at once, in registers: distances h, 2h .. N h / 2, then a factor.
template <int N>
inline void hadamard_passes(vf* x, int width, int h, float factor) {
  for (int i = 0; i < width; i += N * h)
    for (int j = i; j < i + h; j++) {
      vf v[N];
      UNROLL for (int n = 0; n < N; n++) v[n] = load<vf>(x + j + n * h);
      UNROLL for (int d = 1; d < N; d *= 2)
        UNROLL for (int n = 0; n < N; n++)
          if (!(n & d)) {
            const vf a = v[n], b = v[n + d];
            v[n] = a + b;
            v[n + d] = a - b;
          }
      UNROLL for (int n = 0; n < N; n++) store(x + j + n * h, v[n] * factor);
    }
}

// Orthonormal Walsh-Hadamard transform of blocks of n along the array. A factor of 1 changes nothing.
inline void hadamard_rows(vf* x, int width, int n) {
  const float scale = (float)(1 / __builtin_sqrt((double)n));
  for (int h = 1; h < n;) {
    const int left = n / h, points = left < REGISTER_POINTS ? left : REGISTER_POINTS;
    const float factor = points == left ? scale : 1.f;
    if (points == 16) hadamard_passes<16>(x, width, h, factor);
    else if (points == 8) hadamard_passes<8>(x, width, h, factor);
    else if (points == 4) hadamard_passes<4>(x, width, h, factor);
    else hadamard_passes<2>(x, width, h, factor);
    h *= points;
  }
}

// Lane values of y / s, given 1/s.
template <int B>
inline vf code(vf y, vf inverse) {
  const vf u = y * inverse;
  if (B == 8) return min(max(round(u), splat(-127)), splat(127));
  constexpr float step = B == 2 ? 64 : 16, half = B == 2 ? 2 : 8;
  const vf c = min(max(floor(u * (1 / step)), splat(-half)), splat(half - 1));
  return fma(c, splat(step), splat(step / 2));  // exact, fused or not
}

struct Moments {
  vf lane_y, lane_lane;
  Moments operator+(const Moments& other) const { return {lane_y + other.lane_y, lane_lane + other.lane_lane}; }
};

// Least-squares scale for the codes that scale s gives.
template <int B>
inline vf refit(const vf* y, int width, vf s) {
  const vf inverse = 1.f / s;
  const Moments sum = tree_sum<Moments>(power_of_two(width), [&](int i) {
    if (i >= width) return Moments{vf{}, vf{}};
    const vf lane = code<B>(y[i], inverse);
    return Moments{lane * y[i], lane * lane};
  });
  return at_least(sum.lane_y / sum.lane_lane, SMALLEST_SCALE);
}

// Scale bytes of rows y[0 .. width - 1]; bad gets a bit set in the lanes whose scale passes 240 or is not a number.
template <int B>
inline vi fit_scales(const vf* y, int width, vi& bad) {
  vf s;
  if (B == 8) {
    vi largest = {};  // magnitudes as integers keep their order, and a NaN is the largest of all
    for (int i = 0; i < width; i++) {
      const vi magnitude = (vi)y[i] & 0x7FFFFFFF;
      largest = magnitude > largest ? magnitude : largest;
    }
    s = at_least((vf)largest * (1 / 127.f), SMALLEST_SCALE);
  } else {
    const vf square = tree_sum<vf>(power_of_two(width), [&](int i) { return i < width ? y[i] * y[i] : vf{}; });
    s = sqrt(square * (1 / (float)width)) * (B == 2 ? (float)(0.9957 / 64) : (float)(0.3352 / 16));
    s = at_least(s, SMALLEST_SCALE);
    s = refit<B>(y, width, s);
    s = refit<B>(y, width, s);
  }
  constexpr int32_t round_up = B == 8 ? (1 << 20) - 1 : 1 << 19;
  const vi bits = (vi)s;
  bad |= (bits < 0) | (bits >= (int32_t)((256u + SCALE_BIAS) << 20) - round_up);
  return ((bits + round_up) >> 20) - SCALE_BIAS;
}

inline vf scale_value(vi byte) { return (vf)((byte << 20) + (SCALE_BIAS << 20)); }

// The code's bits where plane `plane` of its byte keeps them.
template <int B>
inline vi code_bits(vf lane, int plane) {
  constexpr int32_t mask = B == 2 ? 0xC0 : B == 4 ? 0xF0 : 0xFF;
  return (round_int(lane) & mask) >> (B * plane);
}

}  // namespace HOMKV_ISA
}  // namespace homkv
#endif
