// ARM with the dot-product extension: SDOT and UDOT add groups of four byte products to 4 int32.
#include <arm_neon.h>

namespace homkv {
namespace HOMKV_ISA {

constexpr int VL = 4;
constexpr int MAX_ROWS = 4;
constexpr int V_BLOCKS = 4;
constexpr int REGISTER_POINTS = 16;  // of a Hadamard transform held in registers
constexpr bool VALUE_OFFSETS = true;  // some ValueCodes have an offset, which takes the sum of the weights

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

inline vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline vf max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
inline vf min(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
inline vf floor(vf x) { return (vf)vrndmq_f32((float32x4_t)x); }
inline vf round(vf x) { return (vf)vrndnq_f32((float32x4_t)x); }
inline vf sqrt(vf x) { return (vf)vsqrtq_f32((float32x4_t)x); }
inline bool any_greater(vf a, vf b) { return vmaxvq_u32(vcgtq_f32((float32x4_t)a, (float32x4_t)b)) != 0; }
inline vi round_int(vf x) { return (vi)vcvtnq_s32_f32((float32x4_t)x); }
inline vf to_float(vi x) { return (vf)vcvtq_f32_s32((int32x4_t)x); }
inline vf ldexp(vf x, vf n) { return (vf)((vi)x + (round_int(n) << 23)); }
inline vf load_f16(const void* p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p))); }
inline vi load_u16(const void* p) { return (vi)vmovl_u16(vld1_u16((const uint16_t*)p)); }
inline vi load_u8(const void* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return (vi)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}
inline void store_u8(void* p, vi x) {
  uint16x4_t half = vmovn_u32((uint32x4_t)x);
  uint64_t bytes = vget_lane_u64(vreinterpret_u64_u8(vmovn_u16(vcombine_u16(half, half))), 0);
  __builtin_memcpy(p, &bytes, 4);
}
inline void store_u8x64(void* p, const vi* x) {  // 64 / VL vectors of 0..255
  for (int i = 0; i < 64 / VL; i++) store_u8((uint8_t*)p + i * VL, x[i]);
}
inline void store_f16(void* p, vf x) { vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x))); }inline float sum_lanes(vf x) { return vaddvq_f32((float32x4_t)x); }
inline float max_lanes(vf x) { return vmaxvq_f32((float32x4_t)x); }

// a0 b0 a1 b1 ... : one step of a transposition.
inline void interleave(vf a, vf b, vf& low, vf& high) {
  low = (vf)vzip1q_f32((float32x4_t)a, (float32x4_t)b);
  high = (vf)vzip2q_f32((float32x4_t)a, (float32x4_t)b);
}

// SDOT multiplies signed by signed: keys as they are. UDOT multiplies unsigned by unsigned: values plus 128.
template <int B>
inline vi lane_value(vi x, int i) {
  if (B == 8) return x;
  const int mask = B == 2 ? (int)0xC0C0C0C0 : (int)0xF0F0F0F0, half = B == 2 ? 0x20202020 : 0x08080808;
  return ((x << (B * i)) & mask) | half;
}

template <int B>
struct KeyCodes {
  static constexpr int planes = 8 / B, steps = 0, offset = 0;
  static constexpr float gain(int) { return 1; }
  static vi open(vi x) { return x; }
  static vi plane(vi x, int i) { return lane_value<B>(x, i); }
  static vi dot(vi acc, vi k, vi q) { return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)k, (int8x16_t)q); }
  static vi widen(vi acc) { return acc; }
  static void settle(vi*) {}
};

template <int B>
struct ValueCodes {
  static constexpr int planes = 8 / B, steps = 0, offset = 128, gain = 1;
  static vi plane(vi x, int i) { return lane_value<B>(x, i) ^ (int)0x80808080; }
  static vi dot(vi acc, vi p, vi v) { return (vi)vdotq_u32((uint32x4_t)acc, (uint8x16_t)p, (uint8x16_t)v); }
  static vi widen(vi acc) { return acc; }
};

}  // namespace HOMKV_ISA
}  // namespace homkv
