// CPU entry of fastdistil::cosine_rows. Schema, equation and the fp32 reference: kernels/cosine.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "lanes.h"

namespace fastdistil {
namespace {

constexpr float kEps = 1e-12f;  // of torch.nn.functional.cosine_embedding_loss: decides what zero vectors give

// 1 - cos(s, t), and `scale` times its gradient for s. The second pass finds both rows in L1.
template <typename T>
float row_cosine(const T* s, const T* t, T* ds, int64_t width, float scale) {
  Pair dot{Lanes(0.0f), Lanes(0.0f)}, ss = dot, tt = dot;
  for (int64_t d = 0; d < width; d += kStep) {
    const bool whole = d + kStep <= width;
    const Pair x = whole ? load_pair(s + d) : load_pair(s + d, width - d, 0.0f);
    const Pair y = whole ? load_pair(t + d) : load_pair(t + d, width - d, 0.0f);
    dot = {at::vec::fmadd(x.lo, y.lo, dot.lo), at::vec::fmadd(x.hi, y.hi, dot.hi)};
    ss = {at::vec::fmadd(x.lo, x.lo, ss.lo), at::vec::fmadd(x.hi, x.hi, ss.hi)};
    tt = {at::vec::fmadd(y.lo, y.lo, tt.lo), at::vec::fmadd(y.hi, y.hi, tt.hi)};
  }
  const float s_norm2 = sum(ss.lo + ss.hi) + kEps, t_norm2 = sum(tt.lo + tt.hi) + kEps;
  const float inverse = 1.0f / (std::sqrt(s_norm2) * std::sqrt(t_norm2));
  const float cosine = sum(dot.lo + dot.hi) * inverse;
  const Lanes along_s(cosine / s_norm2 * scale), along_t(-inverse * scale);
  for (int64_t d = 0; d < width; d += kStep) {
    const bool whole = d + kStep <= width;
    const Pair x = whole ? load_pair(s + d) : load_pair(s + d, width - d, 0.0f);
    const Pair y = whole ? load_pair(t + d) : load_pair(t + d, width - d, 0.0f);
    const Pair dx = {
        at::vec::fmadd(x.lo, along_s, y.lo * along_t), at::vec::fmadd(x.hi, along_s, y.hi * along_t)};
    whole ? store_pair(ds + d, dx) : store_pair(ds + d, dx, width - d);
  }
  return 1.0f - cosine;
}

std::tuple<at::Tensor, at::Tensor> cosine_rows(
    const at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& num_rows,
    const std::optional<at::Tensor>& scale_tensor) {
  TORCH_CHECK(student.is_contiguous() && teacher.is_contiguous(), "cosine_rows wants contiguous tensors");
  const int64_t N = student.size(0), width = student.size(1);
  const int64_t last_row = num_rows.has_value() ? num_rows->item().toLong() : N;
  const float scale = scale_tensor.has_value() ? scale_tensor->item().toFloat() : 1.0f;
  auto rows = at::empty({N}, student.options().dtype(at::kFloat));
  auto dstudent = at::empty_like(student);
  float* out = rows.data_ptr<float>();
  FASTDISTIL_DISPATCH(student.scalar_type(), "cosine_rows", [&] {
    const scalar_t* s = student.data_ptr<scalar_t>();
    const scalar_t* t = teacher.data_ptr<scalar_t>();
    scalar_t* ds = dstudent.data_ptr<scalar_t>();
    at::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t at = n * width;
        if (n < last_row) {
          out[n] = row_cosine(s + at, t + at, ds + at, width, scale);
        } else {
          out[n] = 0.0f;
          std::memset(ds + at, 0, width * sizeof(scalar_t));
        }
      }
    });
  });
  return {rows, dstudent};
}

}  // namespace
}  // namespace fastdistil

TORCH_LIBRARY_IMPL(fastdistil, CPU, m) { m.impl("cosine_rows", &fastdistil::cosine_rows); }
