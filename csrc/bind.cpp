// The Python module mimfast._core: plain functions on addresses, sizes and a stream handle. The fronts in mimfast/ops
// check shapes, dtypes and devices. The tests build this file a second time with the kernels emulated, see emulate.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>

#include "mask_plan.h"
#include "noop.h"
#include "pixel_loss.h"

namespace py = pybind11;

namespace {

// MIMFAST_CUDA is defined when the CUDA kernels are compiled in, for real or emulated
#ifndef MIMFAST_CUDA_ARCHS
#define MIMFAST_CUDA_ARCHS ""  // "80 86 ..."
#endif
#ifndef MIMFAST_CUDA_MISSING
#define MIMFAST_CUDA_MISSING ""  // why there are none
#endif
#ifndef MIMFAST_SOURCES
#define MIMFAST_SOURCES ""  // "op=sha256 op=sha256 ..."
#endif

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::object source_hash(const std::string& op) {
  std::istringstream sources(MIMFAST_SOURCES);
  for (std::string entry; sources >> entry;)
    if (entry.rfind(op + "=", 0) == 0) return py::str(entry.substr(op.size() + 1));
  return py::none();
}

mimfast::MaskPlan make_mask_plan(uintptr_t sample_ids, uintptr_t epochs, int64_t epoch, int64_t batch, int32_t rows,
                                 int32_t cols, int32_t unit, int32_t keep_units, uint64_t seed, uint32_t word_mask,
                                 uintptr_t keep, uintptr_t inverse, uintptr_t hidden) {
  return {at<const int64_t>(sample_ids),
          at<const int64_t>(epochs),
          epoch,
          batch,
          rows,
          cols,
          unit,
          keep_units,
          seed,
          word_mask,
          at<int64_t>(keep),
          at<int64_t>(inverse),
          at<bool>(hidden)};
}

mimfast::PixelLoss make_pixel_loss(uintptr_t pred, bool pred_bf16, std::array<int64_t, 2> pred_stride, uintptr_t img,
                                   bool img_uint8, std::array<int64_t, 4> img_stride, uintptr_t map, uintptr_t index,
                                   int64_t batch, int64_t rows, int32_t grid_rows, int32_t grid_cols, int32_t patch,
                                   bool norm, int32_t kind, std::array<float, 3> mean, std::array<float, 3> std,
                                   float eps, float beta, float upstream, uintptr_t loss, uintptr_t grad) {
  return {at<const void>(pred),
          pred_bf16,
          pred_stride,
          at<const void>(img),
          img_uint8,
          img_stride,
          at<const bool>(map),
          at<const int64_t>(index),
          batch,
          rows,
          grid_rows,
          grid_cols,
          patch,
          norm,
          static_cast<mimfast::PixelLossKind>(kind),
          mean,
          std,
          eps,
          beta,
          upstream,
          at<float>(loss),
          at<void>(grad)};
}

using release_gil = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native kernels of mimfast; called through mimfast.ops.";
  m.def(
      "cuda_archs", [] { return MIMFAST_CUDA_ARCHS; },
      "CUDA architectures compiled in, as \"80 90\"; empty when none.");
  m.def("cuda_missing", [] { return MIMFAST_CUDA_MISSING; }, "Why there are no CUDA kernels; empty when there are.");
  m.def("source_hash", &source_hash, py::arg("op"), "sha256 over the sources of an op's CUDA kernel, or None.");

  m.def(
      "noop_cpu", [](uintptr_t x, uintptr_t y, int64_t n) { mimfast::noop_cpu(at<const float>(x), at<float>(y), n); },
      py::arg("x"), py::arg("y"), py::arg("n"), release_gil());

  // module_local: the emulated twin may be loaded beside this module
  py::class_<mimfast::MaskPlan>(m, "MaskPlan", py::module_local(), "One call, field by field as in csrc/mask_plan.h.")
      .def(py::init(&make_mask_plan), py::kw_only(), py::arg("sample_ids"), py::arg("epochs"), py::arg("epoch"),
           py::arg("batch"), py::arg("rows"), py::arg("cols"), py::arg("unit"), py::arg("keep_units"), py::arg("seed"),
           py::arg("word_mask"), py::arg("keep"), py::arg("inverse"), py::arg("hidden"));
  m.def("mask_plan_cpu", &mimfast::mask_plan_cpu, py::arg("plan"), py::arg("threads"), release_gil());
  m.attr("MASK_PLAN_MAX_UNITS_CUDA") = mimfast::kMaskPlanMaxUnitsCuda;

  py::class_<mimfast::PixelLoss>(m, "PixelLoss", py::module_local(), "One call, as in csrc/pixel_loss.h.")
      .def(py::init(&make_pixel_loss), py::kw_only(), py::arg("pred"), py::arg("pred_bf16"), py::arg("pred_stride"),
           py::arg("img"), py::arg("img_uint8"), py::arg("img_stride"), py::arg("map"), py::arg("index"),
           py::arg("batch"), py::arg("rows"), py::arg("grid_rows"), py::arg("grid_cols"), py::arg("patch"),
           py::arg("norm"), py::arg("kind"), py::arg("mean"), py::arg("std"), py::arg("eps"), py::arg("beta"),
           py::arg("upstream"), py::arg("loss"), py::arg("grad"));
  m.def("pixel_loss_cpu", &mimfast::pixel_loss_cpu, py::arg("call"), py::arg("threads"), release_gil());

#ifdef MIMFAST_CUDA
  m.def(
      "noop_cuda",
      [](uintptr_t x, uintptr_t y, int64_t n, uintptr_t stream) {
        mimfast::noop_cuda(at<const float>(x), at<float>(y), n, at<CUstream_st>(stream));
      },
      py::arg("x"), py::arg("y"), py::arg("n"), py::arg("stream"), release_gil());
  m.def(
      "mask_plan_cuda",
      [](const mimfast::MaskPlan& plan, uintptr_t stream) { mimfast::mask_plan_cuda(plan, at<CUstream_st>(stream)); },
      py::arg("plan"), py::arg("stream"), release_gil());
#endif
}
