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

// (address, element, rows, width, stride).
using RowsArguments = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t>;
// (student, bank, (weight, stride), bias, logit_scale, exact).
using InputArguments = std::tuple<RowsArguments, RowsArguments, std::tuple<Address, std::int64_t>,
                                  Address, Address, bool>;
// (target, ignore_index, label_smoothing).
using TargetArguments = std::tuple<Address, std::int64_t, float>;
// (processors, most rows of a chunk).
using DeviceArguments = std::tuple<int, std::int64_t>;

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
  const auto& [target, ignore_index, label_smoothing] = arguments;
  return {at<const std::int64_t>(target), ignore_index, label_smoothing};
}

// Calls f with the op's record; with no workspace it is asked how much it needs.
template <class Op, class Count, class Run>
std::int64_t count_or_run(const Op& op, const DeviceArguments& device, Address workspace,
                          Address stream, const Count& count, const Run& run) {
  const auto& [processors, chunk_rows] = device;
  if (workspace == 0) return count(op, processors, chunk_rows);
  py::gil_scoped_release release;
  return run(op, processors, chunk_rows, at<void>(workspace), at<CUstream_st>(stream));
}

std::int64_t forward(const InputArguments& in, const TargetArguments& target, Address cache,
                     Address nll, Address loss, Address kept, Address lse, Address p_other,
                     Address residual, Address attention, const DeviceArguments& device,
                     Address workspace, Address stream) {
  ContrastiveCeForward op;
  op.in = inputs(in);
  op.targets = targets(target);
  op.cache = at<void>(cache);
  op.nll = at<float>(nll);
  op.loss = at<float>(loss);
  op.kept = at<float>(kept);
  op.lse = at<float>(lse);
  op.p_other = at<float>(p_other);
  op.residual = at<float>(residual);
  op.attention = at<float>(attention);
  return count_or_run(
      op, device, workspace, stream, [](auto... a) { return forward_workspace(a...); },
      contrastive_ce_forward);
}

std::int64_t backward(const InputArguments& in, const TargetArguments& target, Address cache,
                      std::tuple<Address, std::int64_t> d_nll, Address kept,
                      std::tuple<Address, std::int64_t> d_lse, Address lse, Address p_other,
                      Address residual, Address attention, Address d_student, Address along,
                      Address d_weight, Address d_bias, int weight_parts,
                      const DeviceArguments& device, Address workspace, Address stream) {
  ContrastiveCeBackward op;
  op.in = inputs(in);
  op.targets = targets(target);
  op.cache = at<void>(cache);
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
      op, device, workspace, stream, [](auto... a) { return backward_workspace(a...); },
      contrastive_ce_backward);
}

std::int64_t table_forward(const InputArguments& in, Address logits, const DeviceArguments& device,
                           Address workspace, Address stream) {
  const SimilarityForward op = {inputs(in), at<float>(logits)};
  return count_or_run(
      op, device, workspace, stream, [](auto... a) { return forward_workspace(a...); },
      similarity_forward);
}

// largest: (of each student, of each row of the bank).
std::int64_t table_backward(const InputArguments& in, Address d_logits,
                            std::tuple<Address, Address> largest, Address slope, int slope_parts,
                            Address d_weight, Address d_bias, int weight_parts,
                            const DeviceArguments& device, Address workspace, Address stream) {
  const SimilarityBackward op = {inputs(in),
                                 at<const float>(d_logits),
                                 at<const float>(std::get<0>(largest)),
                                 at<const float>(std::get<1>(largest)),
                                 at<float>(slope),
                                 slope_parts,
                                 at<float>(d_weight),
                                 at<float>(d_bias),
                                 weight_parts};
  return count_or_run(
      op, device, workspace, stream, [](auto... a) { return backward_workspace(a...); },
      similarity_backward);
}

}  // namespace

void bind(py::module_& m) {
  m.def("cuda_contrastive_ce_forward", &forward,
        "Starts the forward; with workspace 0 returns the bytes of workspace that it needs.");
  m.def("cuda_contrastive_ce_backward", &backward,
        "Starts the backward; with workspace 0 returns the bytes of workspace that it needs.");
  m.def("cuda_similarity_forward", &table_forward,
        "Starts the forward; with workspace 0 returns the bytes of workspace that it needs.");
  m.def("cuda_similarity_backward", &table_backward,
        "Starts the backward; with workspace 0 returns the bytes of workspace that it needs.");
  m.def("cuda_error", &error_text, "What a cudaError means.");
  m.def("cuda_error_is_of_earlier_work", &is_of_earlier_work,
        "Whether a cudaError comes from work that was started before.");
}

}  // namespace ckd::cuda
