// The CPU kernels as Python functions on addresses and sizes; ckd/backends/cpu.py is their only
// caller and has checked everything. 0 stands for a null pointer. The GIL is released.

#include "bindings.h"

#include <pybind11/stl.h>

#include "memory.h"
#include "tiers.h"

namespace py = pybind11;

namespace ckd::cpu {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Tuples, as ckd/_C.pyi has them.
using StudentArguments = std::tuple<Address, std::int64_t, std::int64_t>;
using BankArguments = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t>;
using InputArguments =
    std::tuple<std::string, StudentArguments, BankArguments, Address, Address, float, bool, int>;
using ShiftArguments = std::tuple<Address, Address, std::int64_t>;
using TargetArguments = std::tuple<Address, ShiftArguments, std::int64_t, float, int>;
using CacheArguments = std::tuple<Address, std::int64_t>;

const Kernels* kernels(const InputArguments& arguments) {
  return tier(std::get<0>(arguments)).kernels;
}

Inputs inputs(const InputArguments& arguments) {
  const auto& [name, student, bank, weight, bias, logit_scale, half, threads] = arguments;
  Inputs in;
  in.student = at<const float>(std::get<0>(student));
  in.batch = std::get<1>(student);
  in.student_dim = std::get<2>(student);
  in.bank = at<const void>(std::get<0>(bank));
  in.element = static_cast<Element>(std::get<1>(bank));
  in.bank_rows = std::get<2>(bank);
  in.teacher_dim = std::get<3>(bank);
  in.bank_stride = std::get<4>(bank);
  in.weight = at<const float>(weight);
  in.bias = at<const float>(bias);
  in.logit_scale = logit_scale;
  in.half = half;
  in.threads = threads > 0 ? threads : 1;
  return in;
}

template <class Op>
void set_targets(Op& op, const TargetArguments& arguments) {
  const auto& [target, shift, ignore_index, label_smoothing, reduction] = arguments;
  op.target = at<const std::int64_t>(target);
  op.shift.rows = at<const std::int64_t>(std::get<0>(shift));
  op.shift.values = at<const float>(std::get<1>(shift));
  op.shift.count = std::get<2>(shift);
  op.ignore_index = ignore_index;
  op.label_smoothing = label_smoothing;
  op.reduction = static_cast<Reduction>(reduction);
}

std::int64_t first_bad_target(const ContrastiveCeForward& op) {
  for (std::int64_t i = 0; i < op.in.batch; ++i) {
    const std::int64_t k = op.target[i];
    if ((k < 0 || k >= op.in.bank_rows) && k != op.ignore_index) return i;
  }
  return -1;
}

std::int64_t contrastive_ce_forward(const InputArguments& in, const TargetArguments& targets,
                                    CacheArguments cache, Address loss, Address kept, Address lse,
                                    Address p_other, Address residual, Address attention) {
  ContrastiveCeForward op;
  op.in = inputs(in);
  set_targets(op, targets);
  op.cache = {at<void>(std::get<0>(cache)), std::get<1>(cache), false};
  op.loss = at<float>(loss);
  op.kept = at<float>(kept);
  op.lse = at<float>(lse);
  op.p_other = at<float>(p_other);
  op.residual = at<float>(residual);
  op.attention = at<float>(attention);
  const Kernels* tier = kernels(in);
  py::gil_scoped_release release;
  const std::int64_t bad = first_bad_target(op);
  if (bad < 0) tier->contrastive_ce_forward(op);
  return bad;
}

void contrastive_ce_backward(const InputArguments& in, const TargetArguments& targets,
                             CacheArguments cache, Address d_loss, Address kept, Address d_lse,
                             Address lse, Address p_other, Address residual, Address attention,
                             Address d_student, Address d_weight, Address d_bias,
                             Address d_logit_scale) {
  ContrastiveCeBackward op;
  op.in = inputs(in);
  set_targets(op, targets);
  op.cache = {at<void>(std::get<0>(cache)), std::get<1>(cache), true};
  op.d_loss = at<const float>(d_loss);
  op.kept = at<const float>(kept);
  op.d_lse = at<const float>(d_lse);
  op.lse = at<const float>(lse);
  op.p_other = at<const float>(p_other);
  op.residual = at<const float>(residual);
  op.attention = at<const float>(attention);
  op.d_student = at<float>(d_student);
  op.d_weight = at<float>(d_weight);
  op.d_bias = at<float>(d_bias);
  op.d_logit_scale = at<float>(d_logit_scale);
  const Kernels* tier = kernels(in);
  py::gil_scoped_release release;
  tier->contrastive_ce_backward(op);
}

void similarity_forward(const InputArguments& in, Address logits) {
  const SimilarityForward op{inputs(in), at<float>(logits)};
  const Kernels* tier = kernels(in);
  py::gil_scoped_release release;
  tier->similarity_forward(op);
}

void similarity_backward(const InputArguments& in, Address d_logits, Address d_student,
                         Address d_weight, Address d_bias, Address d_logit_scale) {
  const SimilarityBackward op{inputs(in),           at<const float>(d_logits),
                              at<float>(d_student), at<float>(d_weight),
                              at<float>(d_bias),    at<float>(d_logit_scale)};
  const Kernels* tier = kernels(in);
  py::gil_scoped_release release;
  tier->similarity_backward(op);
}

double gemm_peak(const std::string& name, bool half, int threads, double seconds) {
  const Kernels* kernels = tier(name).kernels;
  py::gil_scoped_release release;
  return kernels->gemm_peak(half, threads, seconds);
}

// Memory of the kernels that outlives a call, as a Python buffer.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : bytes_(bytes), memory_(take_memory(bytes)) {}
  ~Workspace() { give_memory(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  py::buffer_info buffer() const {
    return {static_cast<std::uint8_t*>(memory_.data), static_cast<py::ssize_t>(bytes_)};
  }

 private:
  std::size_t bytes_;
  Memory memory_;
};

std::vector<std::pair<std::string, bool>> list_tiers() {
  std::vector<std::pair<std::string, bool>> found;
  for (const Tier& tier : tiers()) found.emplace_back(tier.name, tier.kernels->half);
  return found;
}

}  // namespace

void bind(py::module_& m) {
  m.def("cpu_tiers", &list_tiers,
        "The instruction sets that run here, best first: (name, has bfloat16 arithmetic).");
  m.def("cpu_gemm_peak", &gemm_peak,
        "GFLOP/s of the tier's matrix product on operands in the cache: (tier, half, threads, s).");
  py::class_<Workspace>(m, "CpuWorkspace", py::buffer_protocol(), "Bytes, not initialised.")
      .def(py::init<std::size_t>())
      .def_buffer(&Workspace::buffer);
  const py::kw_only named;
  using arg = py::arg;
  m.def("cpu_contrastive_ce_forward", &contrastive_ce_forward, named, arg("inputs"), arg("targets"),
        arg("cache"), arg("loss"), arg("kept"), arg("lse"), arg("p_other"), arg("residual"),
        arg("attention"),
        "The row of the first target that is no row of the bank, and then nothing is computed; "
        "or -1.");
  m.def("cpu_contrastive_ce_backward", &contrastive_ce_backward, named, arg("inputs"),
        arg("targets"), arg("cache"), arg("d_loss"), arg("kept"), arg("d_lse"), arg("lse"),
        arg("p_other"), arg("residual"), arg("attention"), arg("d_student"), arg("d_weight"),
        arg("d_bias"), arg("d_logit_scale"));
  m.def("cpu_similarity_forward", &similarity_forward, named, arg("inputs"), arg("logits"));
  m.def("cpu_similarity_backward", &similarity_backward, named, arg("inputs"), arg("d_logits"),
        arg("d_student"), arg("d_weight"), arg("d_bias"), arg("d_logit_scale"));
}

}  // namespace ckd::cpu
