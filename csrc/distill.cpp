// CPU entry of fastdistil::distill_rows. Schema, equations and the fp32 reference: kernels/distill.py.
//
// One thread per row, two passes over it. The first reads student and teacher from memory and leaves the two maxima and
// normalisers, rescaled once a block (an online softmax); the second finds the row in L2 and gives loss and gradient.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "lanes.h"

namespace fastdistil {
namespace {

constexpr int64_t kBlock = 1024;  // columns: the block's maximum is taken from memory, its exponentials from L1
// Where a search for the largest logit begins. Finite, so that the difference of a logit of -inf and it is not NaN.
constexpr float kNoLogit = -1e30f;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Scales {
  float temperature, kd, mlm;
};

struct RowLoss {
  float kd, mlm, agree;
};

// What the first pass leaves to the second: the exponentials of both rows, each relative to the maximum known when its
// block was read. Both rows and this stay in L2 (4 * V * 4 bytes).
struct Scratch {
  std::vector<float> s_powers, t_powers, s_max, t_max;

  explicit Scratch(int64_t num_columns)
      : s_powers(num_columns + kStep), t_powers(num_columns + kStep),
        s_max(num_columns / kBlock + 1), t_max(num_columns / kBlock + 1) {}
};

template <bool whole, typename T>
inline Pair load_columns(const T* row, int64_t column, int64_t num_columns) {
  if constexpr (whole) return load_pair(row + column);
  return load_pair(row + column, num_columns - column, -INFINITY);
}

// step(v, whole) for v = begin, begin + kStep, ...; `whole` is false_type for a last step that is cut short.
template <typename Step>
inline void for_each_step(int64_t begin, int64_t end, const Step& step) {
  int64_t v = begin;
  for (; v + kStep <= end; v += kStep) step(v, std::true_type{});
  if (v < end) step(v, std::false_type{});
}

// An online softmax: max_v z and sum_v 2^((z - max) * c) of the columns seen so far.
struct Normaliser {
  float max = -INFINITY;
  double total = 0.0;  // over hundreds of blocks; within one, lanes of fp32 are as good

  // Takes in the block row[begin:end] and leaves its exponentials, relative to the maximum so far, in powers[begin:end]
  // (rounded up to whole steps). Returns that maximum.
  template <typename T>
  float include(const T* row, int64_t begin, int64_t end, float c, float* powers) {
    Pair best{Lanes(kNoLogit), Lanes(kNoLogit)};
    for_each_step(begin, end, [&](int64_t v, auto whole) {
      const Pair z = load_columns<whole.value>(row, v, end);
      best = {lanes_max(best.lo, z.lo), lanes_max(best.hi, z.hi)};
    });
    if (const float block_max = lanes_max(lanes_max(best.lo, best.hi)); block_max > max) {
      total *= std::exp2((max - block_max) * c);
      max = block_max;
    }
    Pair block{Lanes(0.0f), Lanes(0.0f)};
    for_each_step(begin, end, [&](int64_t v, auto whole) {
      const Pair z = load_columns<whole.value>(row, v, end);
      const Pair power = {exp2((z.lo - Lanes(max)) * Lanes(c)), exp2((z.hi - Lanes(max)) * Lanes(c))};
      block = {block.lo + power.lo, block.hi + power.hi};
      if (powers) store_pair(powers + v, power);
      prefetch(row + v + kBlock);
    });
    total += sum(block.lo + block.hi);
    return max;
  }
};

// A labelled row has a third softmax, the student's at temperature 1. dstudent may be `student` itself, or null.
template <bool labelled, bool gradient, typename T>
RowLoss row_loss(
    const T* student, const T* teacher, T* dstudent, int64_t label, int64_t num_columns, Scales scales,
    Scratch& scratch) {
  const float c = kLog2e / scales.temperature;
  Normaliser s, t, s1;
  for (int64_t begin = 0, block = 0; begin < num_columns; begin += kBlock, ++block) {
    const int64_t end = std::min(begin + kBlock, num_columns);
    scratch.s_max[block] = s.include(student, begin, end, c, scratch.s_powers.data());
    scratch.t_max[block] = t.include(teacher, begin, end, c, scratch.t_powers.data());
    if constexpr (labelled) s1.include(student, begin, end, kLog2e, nullptr);
  }
  const double s_log2 = std::log2(s.total), t_log2 = std::log2(t.total), s1_log2 = labelled ? std::log2(s1.total) : 0.0;
  const float kd_slope = scales.kd * scales.temperature;
  const float label_logit = labelled ? static_cast<float>(student[label]) : 0.0f;
  const Lanes log_shift(static_cast<float>((s_log2 - t_log2) * kLn2)), q1_shift(static_cast<float>(-s1_log2));

  // NaN, which the maximum below drops, where a row holds one, or nothing but -inf.
  double kd = 0.0 * (s_log2 - t_log2);
  Lanes nearest(-INFINITY);
  for (int64_t begin = 0, block = 0; begin < num_columns; begin += kBlock, ++block) {
    const int64_t end = std::min(begin + kBlock, num_columns);
    const Lanes to_q(static_cast<float>(std::exp2((scratch.s_max[block] - s.max) * c) / s.total));
    const Lanes to_p(static_cast<float>(std::exp2((scratch.t_max[block] - t.max) * c) / t.total));
    Lanes block_kd(0.0f);
    const auto column = [&](Lanes z_s, Lanes z_t, Lanes q, Lanes p) {
      // A teacher's -inf is any number: p is 0. A student's -inf stays, and log_ratio is inf: right unless p is 0, and
      // then the product is NaN, of which the maximum makes 0.
      const Lanes below_s = z_s - Lanes(s.max), below_t = lanes_max(Lanes(kNoLogit), z_t - Lanes(t.max));
      nearest = lanes_max(nearest, below_s + below_t);  // 0 where one column is the maximum of both
      const Lanes log_ratio = at::vec::fmadd(below_t - below_s, Lanes(c * kLn2), log_shift);
      const Lanes difference = q - p;
      block_kd = block_kd + lanes_max(at::vec::fmadd(p, log_ratio, difference), Lanes(0.0f));
      if constexpr (!labelled) return difference * Lanes(kd_slope);
      const Lanes q1 = exp2(at::vec::fmadd(below_s, Lanes(kLog2e), q1_shift));
      return at::vec::fmadd(q1, Lanes(scales.mlm), difference * Lanes(kd_slope));
    };
    for_each_step(begin, end, [&](int64_t v, auto whole) {
      const Pair z_s = load_columns<whole.value>(student, v, end), z_t = load_columns<whole.value>(teacher, v, end);
      const Pair e_s = load_pair(scratch.s_powers.data() + v), e_t = load_pair(scratch.t_powers.data() + v);
      const Pair dz = {column(z_s.lo, z_t.lo, e_s.lo * to_q, e_t.lo * to_p),
                       column(z_s.hi, z_t.hi, e_s.hi * to_q, e_t.hi * to_p)};
      if constexpr (gradient) whole.value ? store_pair(dstudent + v, dz) : store_pair(dstudent + v, dz, end - v);
    });
    kd += sum(block_kd);
  }

  const float temperature2 = scales.temperature * scales.temperature;
  RowLoss loss{temperature2 * static_cast<float>(kd), 0.0f, lanes_max(nearest) == 0.0f ? 1.0f : 0.0f};
  if constexpr (labelled) {
    const double log2_q1 = (label_logit - s.max) * kLog2e - s1_log2;
    loss.mlm = static_cast<float>(-kLn2 * log2_q1);
    if constexpr (gradient) {
      // The one-hot term, before rounding to T: this column again, in scalars.
      const double log2_q = (label_logit - s.max) * c - s_log2;
      const double log2_p = (static_cast<float>(teacher[label]) - t.max) * c - t_log2;
      dstudent[label] = static_cast<T>(
          kd_slope * (std::exp2(log2_q) - std::exp2(log2_p)) + scales.mlm * std::expm1(kLn2 * log2_q1));
    }
  }
  return loss;
}

template <bool gradient, typename T>
RowLoss row_loss(
    const T* student, const T* teacher, T* dstudent, int64_t label, int64_t num_columns, Scales scales,
    Scratch& scratch) {
  const auto kernel = label >= 0 ? row_loss<true, gradient, T> : row_loss<false, gradient, T>;
  return kernel(student, teacher, dstudent, label, num_columns, scales, scratch);
}

at::Tensor distill_rows(
    const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& labels,
    const std::optional<at::Tensor>& num_rows, const std::optional<at::Tensor>& dstudent, int64_t first_row,
    double temperature, const at::Tensor& scales_tensor, int64_t vocab_size) {
  const int64_t N = student.size(0), width = student.size(1);
  TORCH_CHECK(width == 1 || (student.stride(1) == 1 && teacher.stride(1) == 1), "distill_rows wants contiguous rows");
  const int64_t last_row = num_rows.has_value() ? num_rows->item().toLong() - first_row : N;
  auto rows = at::empty({3, N}, student.options().dtype(at::kFloat));
  float* out = rows.data_ptr<float>();
  const int64_t* label = labels.data_ptr<int64_t>();
  TORCH_CHECK(scales_tensor.numel() == 2 && scales_tensor.is_contiguous(), "distill_rows wants two scales");
  const float* scale = scales_tensor.data_ptr<float>();
  const Scales scales{static_cast<float>(temperature), scale[0], scale[1]};
  FASTDISTIL_DISPATCH(student.scalar_type(), "distill_rows", [&] {
    const scalar_t* s = student.data_ptr<scalar_t>();
    const scalar_t* t = teacher.data_ptr<scalar_t>();
    scalar_t* ds = dstudent.has_value() ? dstudent->data_ptr<scalar_t>() : nullptr;
    const int64_t s_stride = student.stride(0), t_stride = teacher.stride(0);
    const int64_t ds_stride = ds ? dstudent->stride(0) : 0;
    const auto kernel = ds ? row_loss<true, scalar_t> : row_loss<false, scalar_t>;
    at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(vocab_size);
      for (int64_t n = begin; n < end; ++n) {
        scalar_t* ds_row = ds ? ds + n * ds_stride : nullptr;
        RowLoss loss{0.0f, 0.0f, 0.0f};
        int64_t num_written = 0;
        if (n < last_row) {
          TORCH_CHECK_INDEX(
              label[n] < vocab_size, "distill: label ", label[n], " is outside the vocabulary of ", vocab_size);
          loss = kernel(s + n * s_stride, t + n * t_stride, ds_row, label[n], vocab_size, scales, scratch);
          num_written = vocab_size;
        }
        if (ds) std::memset(ds_row + num_written, 0, (width - num_written) * sizeof(scalar_t));
        out[n] = loss.kd;
        out[N + n] = loss.mlm;
        out[2 * N + n] = loss.agree;
      }
    });
  });
  return rows;
}

}  // namespace
}  // namespace fastdistil

TORCH_LIBRARY_IMPL(fastdistil, CPU, m) { m.impl("distill_rows", &fastdistil::distill_rows); }
