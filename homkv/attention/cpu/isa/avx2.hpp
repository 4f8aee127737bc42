// AVX2 with FMA and F16C: VPMADDUBSW adds pairs of unsigned times signed bytes in int16, which saturates. So codes are
// kept small (0..3, 0..15) and the 16-bit sums are widened every `steps` additions, before the worst case can overflow.
#include <immintrin.h>

namespace homkv {
namespace HOMKV_ISA {

constexpr int VL = 8;
constexpr int MAX_ROWS = 3;
constexpr int V_BLOCKS = 4;
constexpr int REGISTER_POINTS = 8;  // of a Hadamard transform held in registers
constexpr bool VALUE_OFFSETS = true;  // some ValueCodes have an offset, which takes the sum of the weights

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

inline vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
inline vf floor(vf x) { return (vf)_mm256_floor_ps((__m256)x); }
inline vf round(vf x) { return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf sqrt(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
inline bool any_greater(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0; }
inline vi round_int(vf x) { return (vi)_mm256_cvtps_epi32((__m256)x); }
inline vf to_float(vi x) { return (vf)_mm256_cvtepi32_ps((__m256i)x); }
inline vf ldexp(vf x, vf n) { return (vf)((vi)x + (round_int(n) << 23)); }
inline vf load_f16(const void* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline vi load_u8(const void* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline vi load_u16(const void* p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline void store_u8(void* p, vi x) {
  __m128i lo = _mm256_castsi256_si128((__m256i)x), hi = _mm256_extracti128_si256((__m256i)x, 1);
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(_mm_packus_epi32(lo, hi), lo));
}
inline void store_u8x64(void* p, const vi* x) {  // 64 / VL vectors of 0..255
  const __m256i dwords = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int i = 0; i < 2; i++, x += 4) {
    __m256i low = _mm256_packus_epi32((__m256i)x[0], (__m256i)x[1]), high = _mm256_packus_epi32((__m256i)x[2], (__m256i)x[3]);
    _mm256_storeu_si256((__m256i*)p + i, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), dwords));
  }
}
inline void store_f16(void* p, vf x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
inline float sum_lanes(vf x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(vf x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// a0 b0 a1 b1 ... : one step of a transposition.
inline void interleave(vf a, vf b, vf& low, vf& high) {
  __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (vf)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (vf)_mm256_permute2f128_ps(even, odd, 0x31);
}

inline vi maddubs(vi u, vi s) { return (vi)_mm256_maddubs_epi16((__m256i)u, (__m256i)s); }
inline vi madd16(vi a, vi b) { return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline vi add16(vi a, vi b) { return (vi)_mm256_add_epi16((__m256i)a, (__m256i)b); }
inline vi sum_pairs(vi x) { return (vi)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1)); }

// Small unsigned code of a plane: two's complement with the top bit flipped.
template <int B>
inline vi small_code(vi x, int i) {
  return (x >> (8 - B - B * i)) & (B == 2 ? 0x03030303 : 0x0F0F0F0F);
}
template <int B>
inline vi flip_top_bits(vi x) {
  return x ^ (B == 2 ? (int)0xAAAAAAAA : (int)0x88888888);
}

template <int B>
struct KeyCodes {
  static constexpr int planes = 8 / B;
  static constexpr int steps = B == 2 ? 32 : 8;  // 2 * 3 * 127 * 32 and 2 * 15 * 127 * 8 stay below 2^15
  static constexpr int offset = B == 2 ? 96 : 120;
  static constexpr float gain(int) { return B == 2 ? 64 : 16; }
  static vi open(vi x) { return flip_top_bits<B>(x); }
  static vi plane(vi x, int i) { return small_code<B>(x, i); }
  static vi dot(vi acc, vi k, vi q) { return add16(acc, maddubs(k, q)); }
  static vi widen(vi acc) { return sum_pairs(acc); }
  static void settle(vi*) {}
};

template <>
struct KeyCodes<8> {
  static constexpr int planes = 1, steps = 0, offset = 0;
  static constexpr float gain(int) { return 1; }
  static vi open(vi x) { return x; }
  static vi plane(vi x, int) { return x; }
  static vi dot(vi acc, vi k, vi q) {  // |k| and q * sign(k): two products of at most 127 * 127 fit in int16
    return acc + sum_pairs(maddubs((vi)_mm256_abs_epi8((__m256i)k), (vi)_mm256_sign_epi8((__m256i)q, (__m256i)k)));
  }
  static vi widen(vi acc) { return acc; }
  static void settle(vi*) {}
};

template <int B>
struct ValueCodes {
  static constexpr int planes = 8 / B;
  static constexpr int steps = B == 2 ? 16 : 4;  // 2 * 255 * 3 * 16 and 2 * 255 * 15 * 4 stay below 2^15
  static constexpr int offset = B == 2 ? 96 : 120, gain = B == 2 ? 64 : 16;
  static vi plane(vi x, int i) { return small_code<B>(flip_top_bits<B>(x), i); }
  static vi dot(vi acc, vi p, vi v) { return add16(acc, maddubs(p, v)); }
  static vi widen(vi acc) { return sum_pairs(acc); }
};

template <>
struct ValueCodes<8> {
  static constexpr int planes = 1, steps = 0, offset = 0, gain = 1;
  static vi plane(vi x, int) { return x; }
  static vi dot(vi acc, vi p, vi v) {  // weights to 255 would saturate: even and odd bytes as int16
    const vi low = vi{} + 0x00FF00FF;
    vi even = (vi)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)v, 8), 8), odd = (vi)_mm256_srai_epi16((__m256i)v, 8);
    return acc + madd16(even, p & low) + madd16(odd, (vi)_mm256_srli_epi16((__m256i)p, 8));
  }
  static vi widen(vi acc) { return acc; }
};

}  // namespace HOMKV_ISA
}  // namespace homkv
