// Any machine with a GCC-compatible compiler: vector extensions, no intrinsics. Correct first; the compiler's baseline
// instruction set decides the speed.
#include <cmath>

namespace homkv {
namespace HOMKV_ISA {

constexpr int VL = 4;
constexpr int MAX_ROWS = 2;
constexpr int V_BLOCKS = 2;
constexpr int REGISTER_POINTS = 8;  // of a Hadamard transform held in registers
constexpr bool VALUE_OFFSETS = false;  // some ValueCodes have an offset, which takes the sum of the weights

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

inline float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000 | fraction << 13);
  if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
  float x = (float)fraction * 0x1p-24f;
  return sign ? -x : x;
}
inline uint16_t float_to_half(float x) {  // to nearest, ties to even; beyond 65504 infinity
  uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (bits >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
  if (bits < 0x38800000)  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return (uint16_t)(sign | (float_to_bits(bits_to_float(bits) + 0.5f) - 0x3F000000));
  return (uint16_t)(sign | ((bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13));
}

template <class F>
inline vf each(vf x, F f) {
  for (int i = 0; i < VL; i++) x[i] = f(x[i]);
  return x;
}
inline vf fma(vf a, vf b, vf c) { return a * b + c; }  // rounded twice where the machine has none: attention only
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
inline vf floor(vf x) { return each(x, [](float v) { return __builtin_floorf(v); }); }
inline vf round(vf x) { return each(x, [](float v) { return __builtin_rintf(v); }); }
inline vf sqrt(vf x) { return each(x, [](float v) { return __builtin_sqrtf(v); }); }
inline bool any_greater(vf a, vf b) {
  const vi greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}
inline vi round_int(vf x) { return __builtin_convertvector(round(x), vi); }
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
inline vf ldexp(vf x, vf n) { return (vf)((vi)x + (round_int(n) << 23)); }
inline vf load_f16(const void* p) {
  vf x;
  for (int i = 0; i < VL; i++) {
    uint16_t h;
    __builtin_memcpy(&h, (const char*)p + 2 * i, 2);
    x[i] = half_to_float(h);
  }
  return x;
}
inline vi load_u8(const void* p) {
  vi x;
  for (int i = 0; i < VL; i++) x[i] = ((const uint8_t*)p)[i];
  return x;
}
inline vi load_u16(const void* p) {
  vi x;
  for (int i = 0; i < VL; i++) {
    uint16_t h;
    __builtin_memcpy(&h, (const char*)p + 2 * i, 2);
    x[i] = h;
  }
  return x;
}
inline void store_u8(void* p, vi x) {
  for (int i = 0; i < VL; i++) ((uint8_t*)p)[i] = (uint8_t)x[i];
}
inline void store_u8x64(void* p, const vi* x) {  // 64 / VL vectors of 0..255
  for (int i = 0; i < 64 / VL; i++) store_u8((uint8_t*)p + i * VL, x[i]);
}
inline void store_f16(void* p, vf x) {
  for (int i = 0; i < VL; i++) {
    uint16_t h = float_to_half(x[i]);
    __builtin_memcpy((char*)p + 2 * i, &h, 2);
  }
}inline float sum_lanes(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float max_lanes(vf x) {
  float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}

// a0 b0 a1 b1 ... : one step of a transposition.
inline void interleave(vf a, vf b, vf& low, vf& high) {
  low = vf{a[0], b[0], a[1], b[1]};
  high = vf{a[2], b[2], a[3], b[3]};
}

template <int B>
inline vi lane_value(vi x, int i) {
  if (B == 8) return x;
  const int mask = B == 2 ? (int)0xC0C0C0C0 : (int)0xF0F0F0F0, half = B == 2 ? 0x20202020 : 0x08080808;
  return ((x << (B * i)) & mask) | half;
}
inline vi signed_byte(vi x, int i) { return (x << (24 - 8 * i)) >> 24; }

template <int B>
struct KeyCodes {
  static constexpr int planes = 8 / B, steps = 0, offset = 0;
  static constexpr float gain(int) { return 1; }
  static vi open(vi x) { return x; }
  static vi plane(vi x, int i) { return lane_value<B>(x, i); }
  static vi dot(vi acc, vi k, vi q) {
    for (int i = 0; i < 4; i++) acc += signed_byte(k, i) * signed_byte(q, i);
    return acc;
  }
  static vi widen(vi acc) { return acc; }
  static void settle(vi*) {}
};

template <int B>
struct ValueCodes {
  static constexpr int planes = 8 / B, steps = 0, offset = 0, gain = 1;
  static vi plane(vi x, int i) { return lane_value<B>(x, i); }
  static vi dot(vi acc, vi p, vi v) {
    for (int i = 0; i < 4; i++) acc += (p >> (8 * i) & 255) * signed_byte(v, i);
    return acc;
  }
  static vi widen(vi acc) { return acc; }
};

}  // namespace HOMKV_ISA
}  // namespace homkv
