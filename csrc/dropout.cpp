// CPU entry of fastdistil::dropout_into. Schema, keys and their reasons: kernels/dropout.py. Same masks, bit for bit.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>
#include <vector>

#include "lanes.h"

namespace fastdistil {
namespace {

constexpr int64_t kRowSide = 0, kColumnSide = 1;
using Words = at::vec::Vectorized<int64_t>;
constexpr int64_t kKeys = 2 * Words::size();  // drawn at once: two chains of multiplications hide each other's latency
constexpr int64_t kGrain = 1 << 15;  // elements a task: less is not worth waking a thread

// multiply: the low half of each 64-bit lane times m, all 64 bits of it.
#ifdef CPU_CAPABILITY_AVX512
inline Words multiply(Words x, uint32_t m) { return _mm512_mul_epu32(x, _mm512_set1_epi64(m)); }
inline Words high_half(Words x) { return _mm512_srli_epi64(x, 32); }
#else
inline Words multiply(Words x, uint32_t m) { return _mm256_mul_epu32(x, _mm256_set1_epi64x(m)); }
inline Words high_half(Words x) { return _mm256_srli_epi64(x, 32); }
#endif

// Word 0 of Philox4x32-10 of the counters (first + i, head, stream, side), made odd; count is rounded up to whole
// kKeys.
void draw_keys(uint32_t* out, int64_t count, int64_t seed, int64_t first, int64_t head, int64_t stream, int64_t side) {
  for (int64_t begin = 0; begin < count; begin += kKeys) {
    Words c0[2], c1[2], c2[2], c3[2];  // one word of a counter in each low half; the high halves are left-overs
    for (int v = 0; v < 2; ++v) {
      c0[v] = Words::arange<int64_t>(first + begin + v * Words::size(), 1);
      c1[v] = Words(head), c2[v] = Words(stream), c3[v] = Words(side);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      for (int v = 0; v < 2; ++v) {
        const Words a = multiply(c0[v], 0xD2511F53u), b = multiply(c2[v], 0xCD9E8D57u);
        c0[v] = high_half(b) ^ c1[v] ^ Words(k0), c1[v] = b;
        c2[v] = high_half(a) ^ c3[v] ^ Words(k1), c3[v] = a;
      }
    }
    int64_t keys[kKeys];
    for (int v = 0; v < 2; ++v) c0[v].store(keys + v * Words::size());
    for (int64_t i = 0; i < kKeys; ++i) out[begin + i] = static_cast<uint32_t>(keys[i]) | 1;
  }
}

// x * scale in the lanes whose products of keys reach the threshold, 0 in the others, whatever x is there.
inline Lanes drop(Lanes x, uint32_t row_key, const uint32_t* column_key, uint32_t threshold, Lanes scale) {
#ifdef CPU_CAPABILITY_AVX512
  const __m512i k = _mm512_mullo_epi32(_mm512_set1_epi32(row_key), _mm512_loadu_si512(column_key));
  return _mm512_maskz_mul_ps(_mm512_cmpge_epu32_mask(k, _mm512_set1_epi32(threshold)), x, scale);
#else
  const __m256i column = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column_key));
  const __m256i k = _mm256_mullo_epi32(_mm256_set1_epi32(row_key), column);
  // AVX2 compares only signed integers: k >= threshold is max(k, threshold) == k.
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(k, _mm256_set1_epi32(threshold)), k);
  return _mm256_and_ps(_mm256_castsi256_ps(kept), x * scale);
#endif
}

template <typename T>
void drop_row(
    const T* x, T* out, int64_t width, uint32_t row_key, const uint32_t* column_key, uint32_t threshold, Lanes scale) {
  for (int64_t c = 0; c < width; c += kStep) {
    const bool whole = c + kStep <= width;
    Pair v = whole ? load_pair(x + c) : load_pair(x + c, width - c, 0.0f);
    v.lo = drop(v.lo, row_key, column_key + c, threshold, scale);
    v.hi = drop(v.hi, row_key, column_key + c + Lanes::size(), threshold, scale);
    whole ? store_pair(out + c, v) : store_pair(out + c, v, width - c);
  }
}

void dropout_into(
    const at::Tensor& x, const at::Tensor& out, const at::Tensor& seed_tensor, int64_t stream, int64_t first,
    double dropout_p) {
  TORCH_CHECK(
      x.dim() == 4 && x.is_contiguous() && out.is_contiguous() && out.sizes() == x.sizes(),
      "dropout_into wants two contiguous (B, H, R, C) tensors of one shape");
  const int64_t B = x.size(0), H = x.size(1), R = x.size(2), C = x.size(3);
  if (x.numel() == 0) return;
  const int64_t seed = seed_tensor.item().toLong();
  // nearbyint ties to even, as Python's round does.
  const uint32_t threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 0x1p32), 0x1p32 - 1));
  const Lanes scale(static_cast<float>(1 / (1 - dropout_p)));
  FASTDISTIL_DISPATCH(x.scalar_type(), "dropout_into", [&] {
    const scalar_t* from = x.data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, B * H * R, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
      // Rounded up: the lanes behind the last column read keys, too, and do not use them.
      std::vector<uint32_t> column_keys((C + kStep - 1) / kStep * kStep);
      uint32_t row_keys[kKeys];
      for (int64_t n = begin; n < end;) {  // n counts rows over all of (B, H, R); a turn stays within one (b, h)
        const int64_t matrix = n / R, b = matrix / H, head = matrix % H, row = n % R;
        const int64_t last = std::min(end, n - row + R);
        draw_keys(column_keys.data(), C, seed, first + b * C, head, stream, kColumnSide);
        for (; n < last; n += kKeys) {
          const int64_t rows = std::min(kKeys, last - n);
          draw_keys(row_keys, rows, seed, first + b * R + n % R, head, stream, kRowSide);
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = (n + i) * C;
            drop_row(from + at, to + at, C, row_keys[i], column_keys.data(), threshold, scale);
          }
        }
        n = last;
      }
    });
  });
}

}  // namespace
}  // namespace fastdistil

TORCH_LIBRARY_IMPL(fastdistil, CPU, m) { m.impl("dropout_into", &fastdistil::dropout_into); }
