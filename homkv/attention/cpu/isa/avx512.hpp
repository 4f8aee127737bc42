// AVX-512 with VNNI: VPDPBUSD multiplies 64 unsigned by 64 signed bytes and adds groups of four to 16 int32.
#include <immintrin.h>

namespace homkv {
namespace HOMKV_ISA {

constexpr int VL = 16;       // float32 lanes
constexpr int MAX_ROWS = 4;  // query rows a kernel holds in registers
constexpr int V_BLOCKS = 4;  // vectors of channels that share one broadcast of weights
constexpr int REGISTER_POINTS = 16;  // of a Hadamard transform held in registers
constexpr bool VALUE_OFFSETS = false;  // some ValueCodes have an offset, which takes the sum of the weights

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
inline vf floor(vf x) { return (vf)_mm512_floor_ps((__m512)x); }
inline vf round(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf sqrt(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
inline bool any_greater(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0; }
inline vi round_int(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }
inline vf to_float(vi x) { return (vf)_mm512_cvtepi32_ps((__m512i)x); }
inline vf ldexp(vf x, vf n) { return (vf)_mm512_scalef_ps((__m512)x, (__m512)n); }
inline vf load_f16(const void* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline vi load_u8(const void* p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline vi load_u16(const void* p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_u8(void* p, vi x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x)); }
inline void store_u8x64(void* p, const vi* x) {  // 64 / VL vectors of 0..255
  const __m512i dwords = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i low = _mm512_packus_epi32((__m512i)x[0], (__m512i)x[1]), high = _mm512_packus_epi32((__m512i)x[2], (__m512i)x[3]);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(dwords, _mm512_packus_epi16(low, high)));
}
inline void store_f16(void* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}inline float sum_lanes(vf x) { return _mm512_reduce_add_ps((__m512)x); }
inline float max_lanes(vf x) { return _mm512_reduce_max_ps((__m512)x); }

// a0 b0 a1 b1 ... : one step of a transposition.
inline void interleave(vf a, vf b, vf& low, vf& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = (vf)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
  high = (vf)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), (__m512)b);
}

// Keys are the unsigned operand. A plane stays where it lies in the byte: masking alone gives code * 2^(8 - b - b*plane),
// and the power of two is taken back on the accumulator. The uppermost plane needs no mask either: the accumulator of
// whole bytes minus those of the lower planes.
template <int B>
struct KeyCodes {
  static constexpr int planes = 8 / B, steps = 0;
  static constexpr int offset = B == 2 ? 96 : B == 4 ? 120 : 128;  // lane = unsigned code * 2^(B * plane) - offset
  static constexpr float gain(int plane) { return (float)(1 << (B * plane)); }
  static vi open(vi x) { return x ^ (B == 2 ? (int)0xAAAAAAAA : B == 4 ? (int)0x88888888 : (int)0x80808080); }
  static vi plane(vi x, int i) { return i == 0 ? x : x & (int)(0x01010101u * ((0xFF00u >> B & 0xFF) >> (B * i))); }
  static vi dot(vi acc, vi k, vi q) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)k, (__m512i)q); }
  static vi widen(vi acc) { return acc; }
  static void settle(vi* acc) {
    for (int i = 1; i < planes; i++) acc[0] -= acc[i];
  }
};

// Values are the signed operand, weights the unsigned one: all planes add up in one accumulator, so each is shifted
// to the top and becomes its lane value.
template <int B>
struct ValueCodes {
  static constexpr int planes = 8 / B, steps = 0, offset = 0, gain = 1;
  static vi plane(vi x, int i) {
    if (B == 8) return x;
    const int mask = B == 2 ? (int)0xC0C0C0C0 : (int)0xF0F0F0F0, half = B == 2 ? 0x20202020 : 0x08080808;
    return ((x << (B * i)) & mask) | half;
  }
  static vi dot(vi acc, vi p, vi v) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)p, (__m512i)v); }
  static vi widen(vi acc) { return acc; }
};

}  // namespace HOMKV_ISA
}  // namespace homkv
