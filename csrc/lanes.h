// Vectors of fp32 lanes for the row kernels: one build of this code is for AVX-512, one for AVX2 (setup.py).
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#if !defined(CPU_CAPABILITY_AVX512) && !defined(CPU_CAPABILITY_AVX2)
#error "build with -DCPU_CAPABILITY_AVX512 or -DCPU_CAPABILITY_AVX2, as setup.py does"
#endif

// Runs the lambda with scalar_t = float, BFloat16 or Half.
#define FASTDISTIL_DISPATCH(TYPE, NAME, ...)                   \
  AT_DISPATCH_SWITCH(TYPE, NAME,                               \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) \
                         AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES(__VA_ARGS__))

namespace fastdistil {

using Lanes = at::vec::Vectorized<float>;
// A step is two vectors: what one vector of bf16 or fp16 widens to, and enough to hide the latency of a chain of FMAs.
constexpr int64_t kStep = 2 * Lanes::size();

struct Pair {
  Lanes lo, hi;
};

// at::vec::maximum costs three instructions to keep NaNs. This one is b where a or b is NaN: a NaN in b stays, one in a
// is lost; a NaN logit surfaces through exp2 anyway.
inline Lanes lanes_max(Lanes a, Lanes b) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_max_ps(a, b);
#else
  return _mm256_max_ps(a, b);
#endif
}

// 2^y within 2 ulp for y in [-126, 1], and 0 from -150 (AVX2: -127) down to -inf. Between these it is something below
// 2^-125, which no sum of a softmax feels. NaN stays NaN. For -inf the polynomial is NaN; scalef by 2^-inf makes it 0.
// y = n + f with |f| <= 1/2; the polynomial is the minimax fit of 2^f with p(0) = 1, of relative error 2e-9.
inline Lanes exp2(Lanes y) {
#ifdef CPU_CAPABILITY_AVX512
  const Lanes n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  y = lanes_max(Lanes(-127.0f), y);  // at which the addition to the exponent gives 0 exactly
  const Lanes n = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  const Lanes f = y - n;
  Lanes poly(1.535336188915222e-4f);
  poly = at::vec::fmadd(poly, f, Lanes(1.339887442236606e-3f));
  poly = at::vec::fmadd(poly, f, Lanes(9.618437357820152e-3f));
  poly = at::vec::fmadd(poly, f, Lanes(5.550332471099889e-2f));
  poly = at::vec::fmadd(poly, f, Lanes(2.402264791362659e-1f));
  poly = at::vec::fmadd(poly, f, Lanes(6.931472028550838e-1f));
  poly = at::vec::fmadd(poly, f, Lanes(1.0f));
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_scalef_ps(poly, n);
#else
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(poly), exponent));
#endif
}

inline float sum(Lanes x) {
  return at::vec::vec_reduce_all<float>([](Lanes a, Lanes b) { return a + b; }, x);
}

inline float lanes_max(Lanes x) {
  return at::vec::vec_reduce_all<float>([](Lanes a, Lanes b) { return lanes_max(a, b); }, x);
}

template <typename T>
inline Pair load_pair(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return {Lanes::loadu(p), Lanes::loadu(p + Lanes::size())};
  } else {
    const auto [lo, hi] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p));
    return {lo, hi};
  }
}

// Starts to fetch the step at p into L2; never faults.
template <typename T>
inline void prefetch(const T* p) {
  for (size_t byte = 0; byte < kStep * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
  }
}

template <typename T>
inline void store_pair(T* p, Pair x) {
  if constexpr (std::is_same_v<T, float>) {
    x.lo.store(p);
    x.hi.store(p + Lanes::size());
  } else {
    at::vec::convert_from_float<T>(x.lo, x.hi).store(p);
  }
}

// The last `count` < kStep elements of a row, with `fill` in the lanes behind them.
template <typename T>
inline Pair load_pair(const T* p, int64_t count, float fill) {
  float buffer[kStep];
  for (int64_t i = 0; i < kStep; ++i) buffer[i] = i < count ? static_cast<float>(p[i]) : fill;
  return load_pair(buffer);
}

template <typename T>
inline void store_pair(T* p, Pair x, int64_t count) {
  float buffer[kStep];
  store_pair(buffer, x);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(buffer[i]);
}

}  // namespace fastdistil
