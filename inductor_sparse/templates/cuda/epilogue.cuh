// What printed epilogues call: loads, stores, conversions, and arithmetic that C++ has
// no function for.  No header is included: the text goes through NVRTC, behind a kernel
// of its own.  The other branch of each #ifdef lets a host compiler run the same code.
#ifndef __CUDACC__
#include <cmath>
#include <cstring>
#define __device__
#define __forceinline__ inline
#define __restrict__
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#endif

namespace epilogue {

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };
struct e4m3 { unsigned char bits; };

template <typename T> struct Two { T left, right; };
template <typename T> struct alignas(2 * sizeof(T)) Adjacent { T left, right; };

#ifdef __CUDACC__

__device__ __forceinline__ float from_bits(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float decode(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float decode(e4m3 x) {
  unsigned halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((unsigned short)x.bits));
  return decode(float16{(unsigned short)halves});
}
__device__ __forceinline__ void encode(bfloat16& to, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
__device__ __forceinline__ void encode(float16& to, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
__device__ __forceinline__ void encode(e4m3& to, float x) {
  unsigned short bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(0.0f), "f"(x));
  to.bits = (unsigned char)bits;
}
__device__ __forceinline__ float maximum(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}
__device__ __forceinline__ float minimum(float x, float y) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(x), "f"(y));
  return smaller;
}
__device__ __forceinline__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }

#else

inline float from_bits(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// Of a float with MANTISSA bits below an exponent with BIAS: its size from the bits, and
// back, rounded to nearest even.
template <int MANTISSA, int BIAS> inline float unpack(unsigned bits) {
  const int exponent = bits >> MANTISSA, mantissa = bits & ((1 << MANTISSA) - 1);
  return exponent == 0 ? std::ldexp((float)mantissa, 1 - BIAS - MANTISSA)
                       : std::ldexp((float)((1 << MANTISSA) + mantissa), exponent - BIAS - MANTISSA);
}
template <int MANTISSA, int BIAS> inline unsigned pack(float size) {
  if (size < std::ldexp(1.0f, 1 - BIAS))
    return (unsigned)std::nearbyint(std::ldexp(size, BIAS - 1 + MANTISSA));
  int exponent;
  const float fraction = std::frexp(size, &exponent);
  return (unsigned)std::nearbyint(std::ldexp(fraction, MANTISSA + 1)) +
         ((unsigned)(exponent + BIAS - 2) << MANTISSA);
}
inline float decode(float16 x) {
  const unsigned bits = x.bits & 0x7FFF;
  const float size = bits > 0x7C00 ? NAN : bits == 0x7C00 ? INFINITY : unpack<10, 15>(bits);
  return x.bits & 0x8000 ? -size : size;
}
inline float decode(e4m3 x) {
  const unsigned bits = x.bits & 127;
  const float size = bits == 127 ? NAN : unpack<3, 7>(bits);
  return x.bits & 128 ? -size : size;
}
inline void encode(bfloat16& to, float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  to.bits = x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline void encode(float16& to, float x) {
  const float size = std::fabs(x);
  const unsigned bits = x != x ? 0x7FFF : size >= 65520.0f ? 0x7C00 : pack<10, 15>(size);
  to.bits = bits | (std::signbit(x) ? 0x8000u : 0u);
}
inline void encode(e4m3& to, float x) {
  const float size = std::fabs(x);
  const unsigned bits = x != x ? 127 : size > 448.0f ? 126 : pack<3, 7>(size);
  to.bits = bits | (std::signbit(x) ? 128u : 0u);
}
inline float maximum(float x, float y) { return x != x ? x : y != y ? y : x > y ? x : y; }
inline float minimum(float x, float y) { return x != x ? x : y != y ? y : x < y ? x : y; }
inline float rounded_product(float x, float y) { return x * y; }

#endif

__device__ __forceinline__ float decode(bfloat16 x) { return from_bits((unsigned)x.bits << 16); }
template <typename T> __device__ __forceinline__ T decode(T x) { return x; }
template <typename T, typename V> __device__ __forceinline__ void encode(T& to, V x) { to = (T)x; }

// The value that remains of x in a buffer of type T.
template <typename T> __device__ __forceinline__ float rounded(float x) {
  T stored;
  encode(stored, x);
  return decode(stored);
}

template <typename T>
__device__ __forceinline__ T maximum(T x, T y) { return x > y ? x : y; }
template <typename T>
__device__ __forceinline__ T minimum(T x, T y) { return x < y ? x : y; }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Outside the output element 0 is loaded instead: a branch would keep each load from
// starting before the one ahead of it is back.
template <typename T>
__device__ __forceinline__ auto load(const T* p, long long at, bool ok) -> decltype(decode(*p)) {
  return decode(p[ok ? at : 0]);
}
template <typename T>
__device__ __forceinline__ auto load2(const T* p, long long at, bool ok)
    -> Two<decltype(decode(*p))> {
  const Adjacent<T> both = *reinterpret_cast<const Adjacent<T>*>(p + (ok ? at : 0));
  return {decode(both.left), decode(both.right)};
}
template <typename T, typename V>
__device__ __forceinline__ void store(T* p, long long at, V value, bool ok) {
  if (ok) encode(p[at], value);
}
template <typename T, typename V>
__device__ __forceinline__ void store2(T* p, long long at, V left, V right, bool ok) {
  Adjacent<T> both;
  encode(both.left, left);
  encode(both.right, right);
  if (ok) *reinterpret_cast<Adjacent<T>*>(p + at) = both;
}

}  // namespace epilogue
