// What every kernel needs on top of an instruction set's vector types. Included after isa/<name>.hpp and, like it,
// compiled once per instruction set inside its namespace: nothing here may be shared between object files, or the
// linker could pick a copy that the machine cannot run.
#ifndef HOMKV_VECTOR_HPP
#define HOMKV_VECTOR_HPP
#include <stdint.h>

// Loops over registers: accumulators stay in them only if every index is a constant.
#define UNROLL _Pragma("GCC unroll 16")

namespace homkv {
namespace HOMKV_ISA {

template <class V>
inline V load(const void* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class V>
inline void store(void* p, V x) {
  __builtin_memcpy(p, &x, sizeof x);
}
inline vf splat(float x) { return vf{} + x; }
inline vi splat_int(int32_t x) { return vi{} + x; }
inline int32_t load_dword(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return x;
}
inline int min_int(int a, int b) { return a < b ? a : b; }
inline float max_float(float a, float b) { return a > b ? a : b; }

inline bool any(vi mask) {
  int32_t part[VL], found = 0;
  store(part, mask);
  for (int i = 0; i < VL; i++) found |= part[i];
  return found != 0;
}

// Lane i of the result is the sum over the lanes of x[i], for VL vectors. Destroys x.
inline vf sum_each(vf* x) {
  UNROLL for (int n = VL / 2; n; n /= 2)
    UNROLL for (int i = 0; i < n; i++) {
      vf low, high;
      interleave(x[i], x[i + n], low, high);
      x[i] = low + high;
    }
  return x[0];
}

// 2^x for x <= 0; results below 2^-126 become 2^-126. Relative error below 2e-7 (minimax polynomial of degree 5).
inline vf exp2_nonpositive(vf x) {
  x = max(x, splat(-126.f));
  vf n = round(x), f = x - n;
  vf p = fma(f, splat(0.00132647273f), splat(0.00967151299f));
  p = fma(p, f, splat(0.0555073358f));
  p = fma(p, f, splat(0.240222424f));
  p = fma(p, f, splat(0.693147004f));
  p = fma(p, f, splat(1.f));
  return ldexp(p, n);
}

// Unsigned E5M3 bytes: 2^(e-24) (1 + m/8).
inline vf load_scales(const uint8_t* p) { return (vf)((load_u8(p) << 20) + (103 << 23)); }

// Elements of the model's dtype as float32 (values of homkv_dtype in abi.h).
template <int DTYPE>
inline vf load_as_float(const void* base, int64_t index) {
  const char* p = (const char*)base + index * (DTYPE == HOMKV_F32 ? 4 : 2);
  if (DTYPE == HOMKV_F32) return load<vf>(p);
  if (DTYPE == HOMKV_F16) return load_f16(p);
  return (vf)(load_u16(p) << 16);
}

}  // namespace HOMKV_ISA
}  // namespace homkv
#endif
