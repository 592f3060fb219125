// The CUDA kernels as Python functions on addresses and sizes; ckd/backends/cuda.py is their only
// caller and has checked everything. 0 stands for a null pointer. Kernels are only started here: a
// call returns a cudaError, 0 for none, and its results are there when the stream has got to them.

#include "bindings.h"

#include <pybind11/stl.h>

#include <tuple>

#include "contrastive_ce.h"
#include "similarity.h"

namespace py = pybind11;

namespace ckd::cuda {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Tuples, as ckd/_C.pyi has them.
using RowsArguments = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t>;
using InputArguments = std::tuple<RowsArguments, RowsArguments, std::tuple<Address, std::int64_t>,
                                  Address, Address, bool>;
// (target, ignore_index, label_smoothing, shift_rows, shift, shift_count).
using TargetArguments = std::tuple<Address, std::int64_t, float, Address, Address, int>;
using OrderArguments = std::tuple<Address, Address>;
using StridedArguments = std::tuple<Address, std::int64_t>;
// (processors, most rows of a chunk, workspace, stream).
using LaunchArguments = std::tuple<int, std::int64_t, Address, Address>;

Rows rows(const RowsArguments& arguments) {
  const auto& [data, element, count, width, stride] = arguments;
  return {at<const void>(data), static_cast<Element>(element), count, width, stride};
}

Inputs inputs(const InputArguments& arguments) {
  const auto& [student, bank, weight, bias, logit_scale, exact] = arguments;
  return {rows(student),
          rows(bank),
          at<const void>(std::get<0>(weight)),
          std::get<1>(weight),
          at<const float>(bias),
          at<const float>(logit_scale),
          exact};
}

Targets targets(const TargetArguments& arguments) {
  const auto& [target, ignore_index, label_smoothing, shift_rows, shift, shift_count] = arguments;
  return {at<const std::int64_t>(target),     ignore_index,           label_smoothing,
          at<const std::int64_t>(shift_rows), at<const float>(shift), shift_count};
}

// Calls f with the op's record; with no workspace it is asked how much it needs.
template <class Op, class Count, class Run>
std::int64_t count_or_run(const Op& op, const LaunchArguments& launch, const Count& count,
                          const Run& run) {
  const auto& [processors, chunk_rows, workspace, stream] = launch;
  if (workspace == 0) return count(op, processors, chunk_rows);
  py::gil_scoped_release release;
  return run(op, processors, chunk_rows, at<void>(workspace), at<CUstream_st>(stream));
}

std::int64_t forward(const InputArguments& in, const TargetArguments& target, Address cache,
                     Address reference, Address nll, Address loss, Address kept, Address lse,
                     Address p_other, Address residual, Address attention,
                     const LaunchArguments& launch) {
  ContrastiveCeForward op;
  op.in = inputs(in);
  op.targets = targets(target);
  op.cache = at<void>(cache);
  op.reference = at<float>(reference);
  op.nll = at<float>(nll);
  op.loss = at<float>(loss);
  op.kept = at<float>(kept);
  op.lse = at<float>(lse);
  op.p_other = at<float>(p_other);
  op.residual = at<float>(residual);
  op.attention = at<float>(attention);
  return count_or_run(
      op, launch, [](auto... a) { return forward_workspace(a...); }, contrastive_ce_forward);
}

std::int64_t backward(const InputArguments& in, const TargetArguments& target,
                      const OrderArguments& shift_order, Address cache, Address reference,
                      StridedArguments d_nll, Address kept, StridedArguments d_lse, Address lse,
                      Address p_other, Address residual, Address attention, Address d_student,
                      Address along, Address d_weight, Address d_bias, int weight_parts,
                      const LaunchArguments& launch) {
  ContrastiveCeBackward op;
  op.in = inputs(in);
  op.targets = targets(target);
  op.shift_order = {at<const int>(std::get<0>(shift_order)),
                    at<const std::int64_t>(std::get<1>(shift_order))};
  op.cache = at<void>(cache);
  op.reference = at<const float>(reference);
  op.d_nll = at<const float>(std::get<0>(d_nll));
  op.d_nll_stride = std::get<1>(d_nll);
  op.kept = at<const float>(kept);
  op.d_lse = at<const float>(std::get<0>(d_lse));
  op.d_lse_stride = std::get<1>(d_lse);
  op.lse = at<const float>(lse);
  op.p_other = at<const float>(p_other);
  op.residual = at<const float>(residual);
  op.attention = at<const float>(attention);
  op.d_student = at<void>(d_student);
  op.along = at<float>(along);
  op.d_weight = at<float>(d_weight);
  op.d_bias = at<float>(d_bias);
  op.weight_parts = weight_parts;
  return count_or_run(
      op, launch, [](auto... a) { return backward_workspace(a...); }, contrastive_ce_backward);
}

std::int64_t table_forward(const InputArguments& in, Address logits,
                           const LaunchArguments& launch) {
  const SimilarityForward op = {inputs(in), at<float>(logits)};
  return count_or_run(
      op, launch, [](auto... a) { return forward_workspace(a...); }, similarity_forward);
}

std::int64_t table_backward(const InputArguments& in, Address d_logits, Address largest_of_student,
                            Address largest_of_row, Address slope, int slope_parts,
                            Address d_weight, Address d_bias, int weight_parts,
                            const LaunchArguments& launch) {
  const SimilarityBackward op = {inputs(in),
                                 at<const float>(d_logits),
                                 at<const float>(largest_of_student),
                                 at<const float>(largest_of_row),
                                 at<float>(slope),
                                 slope_parts,
                                 at<float>(d_weight),
                                 at<float>(d_bias),
                                 weight_parts};
  return count_or_run(
      op, launch, [](auto... a) { return backward_workspace(a...); }, similarity_backward);
}

}  // namespace

void bind(py::module_& m) {
  const py::kw_only named;
  using arg = py::arg;
  const StridedArguments zeros = {0, 0};
  const TargetArguments no_targets = {0, 0, 0, 0, 0, 0};
  const OrderArguments no_order = {0, 0};
  m.def("cuda_contrastive_ce_forward", &forward, named, arg("inputs"), arg("targets"), arg("cache"),
        arg("reference"), arg("nll"), arg("loss"), arg("kept"), arg("lse"), arg("p_other"),
        arg("residual"), arg("attention"), arg("launch"));
  m.def("cuda_contrastive_ce_backward", &backward, named, arg("inputs"),
        arg("targets") = no_targets, arg("shift_order") = no_order, arg("cache") = 0,
        arg("reference") = 0, arg("d_nll") = zeros, arg("kept") = 0, arg("d_lse") = zeros,
        arg("lse") = 0, arg("p_other") = 0, arg("residual") = 0, arg("attention") = 0,
        arg("d_student") = 0, arg("along") = 0, arg("d_weight") = 0, arg("d_bias") = 0,
        arg("weight_parts") = 1, arg("launch"));
  m.def("cuda_similarity_forward", &table_forward, named, arg("inputs"), arg("logits"),
        arg("launch"));
  m.def("cuda_similarity_backward", &table_backward, named, arg("inputs"), arg("d_logits"),
        arg("largest_of_student"), arg("largest_of_row"), arg("slope"), arg("slope_parts"),
        arg("d_weight"), arg("d_bias"), arg("weight_parts"), arg("launch"));
  m.def("cuda_error", &error_text, "What a cudaError means.");
  m.def("cuda_error_is_of_earlier_work", &is_of_earlier_work,
        "Whether a cudaError comes from work that was started before.");
}

}  // namespace ckd::cuda
