// The Python module mimfast._core: plain functions on addresses, sizes and a stream handle. Shapes, dtypes and devices
// are checked by the fronts in mimfast/ops. The tests build this file a second time with the kernels emulated, see
// emulate.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>

#include "crop_gather.h"
#include "crop_resize.h"
#include "group_plan.h"
#include "hog.h"
#include "hog_loss.h"
#include "local_norm.h"

#include "crc32c.h"
#include "mask_blockwise.h"
#include "mask_guided.h"
#include "mask_pack.h"
#include "mask_plan.h"
#include "noop.h"
#include "patch_gather.h"
#include "pixel_loss.h"
#include "short_attention.h"
#include "window_attention.h"

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

mimfast::HogImages make_hog_images(uintptr_t img, std::array<int64_t, 4> stride, int64_t batch, int32_t height,
                                   int32_t width, int32_t cell, float unit, const std::vector<float>& weight,
                                   bool normalize, std::array<float, 3> factor) {
  mimfast::HogImages images = {};
  images.img = at<const uint8_t>(img);
  std::copy(stride.begin(), stride.end(), images.stride);
  images.batch = batch;
  images.height = height;
  images.width = width;
  images.cell = cell;
  images.unit = unit;
  images.window = static_cast<int32_t>(weight.size());
  if (images.window > mimfast::kHogMaxWindow) throw py::value_error("hog: the window is too large");
  std::copy(weight.begin(), weight.end(), images.weight);
  images.normalize = normalize;
  std::copy(factor.begin(), factor.end(), images.factor);
  return images;
}

mimfast::Hog make_hog(const mimfast::HogImages& images, int32_t side, bool dense, int64_t rows, uintptr_t index,
                      uintptr_t out, bool out_bf16) {
  return {images, side, rows, at<const int64_t>(index), dense, out_bf16, at<void>(out)};
}

mimfast::MaskPlan make_mask_plan(uintptr_t sample_ids, uintptr_t epochs, int64_t epoch, int64_t batch, int32_t rows,
                                 int32_t cols, int32_t unit, int32_t keep_units, uintptr_t cu_seqlens,
                                 uintptr_t importance, uint64_t seed, uint32_t word_mask, uintptr_t keep,
                                 uintptr_t inverse, uintptr_t hidden, uintptr_t hide) {
  return {at<const int64_t>(sample_ids),
          at<const int64_t>(epochs),
          epoch,
          batch,
          rows,
          cols,
          unit,
          keep_units,
          at<const int32_t>(cu_seqlens),
          at<const float>(importance),
          seed,
          word_mask,
          at<int64_t>(keep),
          at<int64_t>(inverse),
          at<bool>(hidden),
          at<int64_t>(hide)};
}

mimfast::MaskPack make_mask_pack(uintptr_t hidden, int64_t batch, int64_t tokens, int64_t visible, int64_t most_hidden,
                                 uintptr_t kept, uintptr_t keep, uintptr_t inverse, uintptr_t hide,
                                 uintptr_t cu_seqlens) {
  return {at<const bool>(hidden),
          batch,
          tokens,
          visible,
          most_hidden,
          at<int32_t>(kept),
          at<int64_t>(keep),
          at<int64_t>(inverse),
          at<int64_t>(hide),
          at<int32_t>(cu_seqlens)};
}

mimfast::MaskBlockwise make_mask_blockwise(uintptr_t sample_ids, uintptr_t epochs, int64_t epoch, int64_t batch,
                                           int32_t rows, int32_t cols, int32_t count, int32_t min_block,
                                           int32_t log_low, int32_t log_high, bool exact, uint64_t seed,
                                           uintptr_t hidden) {
  return {at<const int64_t>(sample_ids),
          at<const int64_t>(epochs),
          epoch,
          batch,
          rows,
          cols,
          count,
          min_block,
          log_low,
          log_high,
          exact,
          seed,
          at<bool>(hidden)};
}

mimfast::PixelType pixel_type(const std::string& name) {
  if (name == "uint8") return mimfast::PixelType::kUint8;
  if (name == "float32") return mimfast::PixelType::kFloat32;
  if (name == "bfloat16") return mimfast::PixelType::kBfloat16;
  if (name == "float16") return mimfast::PixelType::kFloat16;
  throw py::value_error("patch_gather: no native code for " + name);
}

mimfast::PatchGather make_patch_gather(uintptr_t img, const std::string& img_type, std::array<int64_t, 4> stride,
                                       int64_t batch, int32_t grid_rows, int32_t grid_cols, int32_t patch,
                                       uintptr_t keep, uintptr_t flip, uintptr_t cu_seqlens, int64_t rows,
                                       bool channels_last, std::array<float, 3> mean, std::array<float, 3> std,
                                       uintptr_t out, const std::string& out_type) {
  return {at<const void>(img),
          pixel_type(img_type),
          stride,
          batch,
          grid_rows,
          grid_cols,
          patch,
          at<const int64_t>(keep),
          at<const bool>(flip),
          at<const int32_t>(cu_seqlens),
          rows,
          channels_last,
          mean,
          std,
          at<void>(out),
          pixel_type(out_type)};
}

mimfast::LossRows make_loss_rows(uintptr_t pred, bool pred_bf16, std::array<int64_t, 2> pred_stride, uintptr_t map,
                                 uintptr_t index, int64_t batch, int64_t rows, int64_t tokens, int64_t values,
                                 int32_t kind, float beta, float upstream, uintptr_t loss, uintptr_t grad) {
  return {at<const void>(pred),
          pred_bf16,
          {pred_stride[0], pred_stride[1]},
          at<const bool>(map),
          at<const int64_t>(index),
          batch,
          rows,
          tokens,
          values,
          static_cast<mimfast::LossKind>(kind),
          beta,
          upstream,
          at<float>(loss),
          at<void>(grad)};
}

mimfast::PixelLoss make_pixel_loss(const mimfast::LossRows& rows, uintptr_t img, bool img_uint8,
                                   std::array<int64_t, 4> img_stride, int32_t grid_cols, int32_t patch, bool norm,
                                   bool colour_major, std::array<float, 3> mean, std::array<float, 3> std, float eps) {
  return {rows, at<const void>(img), img_uint8, img_stride, grid_cols, patch, norm, colour_major, mean, std, eps};
}

mimfast::CropResize make_crop_resize(uintptr_t img, std::array<int64_t, 4> stride, int32_t height, int32_t width,
                                     int64_t bytes, uintptr_t offsets, uintptr_t shapes, int64_t batch, uintptr_t boxes,
                                     uintptr_t flip, int32_t size, bool bicubic, uintptr_t out) {
  return {at<const uint8_t>(img),
          {stride[0], stride[1], stride[2], stride[3]},
          height,
          width,
          bytes,
          at<const int64_t>(offsets),
          at<const int32_t>(shapes),
          batch,
          at<const int32_t>(boxes),
          at<const bool>(flip),
          size,
          bicubic,
          at<uint8_t>(out)};
}

mimfast::CropGather make_crop_gather(const mimfast::CropResize& crop, uintptr_t keep, int64_t kept, int32_t patch,
                                     bool channels_last, std::array<float, 3> mean, std::array<float, 3> std,
                                     uintptr_t out, const std::string& out_type) {
  return {crop,
          at<const int64_t>(keep),
          kept,
          patch,
          channels_last,
          {mean[0], mean[1], mean[2]},
          {std[0], std[1], std[2]},
          at<void>(out),
          pixel_type(out_type)};
}

mimfast::LocalNorm make_local_norm(uintptr_t img, bool img_uint8, std::array<int64_t, 4> stride, int64_t batch,
                                   int32_t height, int32_t width, int32_t radius, std::array<float, 3> floor,
                                   uintptr_t out) {
  return {at<const void>(img),
          img_uint8,
          {stride[0], stride[1], stride[2], stride[3]},
          batch,
          height,
          width,
          radius,
          {floor[0], floor[1], floor[2]},
          at<float>(out)};
}

mimfast::HogLoss make_hog_loss(const mimfast::LossRows& rows, const mimfast::HogImages& images, int32_t side,
                               int32_t parts, uintptr_t count, uintptr_t upstream, uintptr_t partial, bool stale) {
  return {rows, images, side, parts, at<const int64_t>(count), at<const float>(upstream), at<float>(partial), stale};
}

mimfast::ShortAttention make_short_attention(uintptr_t qkv, bool bf16, std::array<int64_t, 2> qkv_stride,
                                             uintptr_t cu_seqlens, int64_t groups, int64_t tokens, int32_t heads,
                                             int32_t head, float scale, uintptr_t grad,
                                             std::array<int64_t, 2> grad_stride, uintptr_t out, uintptr_t d_qkv) {
  return {at<const void>(qkv),
          bf16,
          qkv_stride,
          at<const int32_t>(cu_seqlens),
          groups,
          tokens,
          heads,
          head,
          scale,
          at<const void>(grad),
          grad_stride,
          at<void>(out),
          at<void>(d_qkv)};
}

mimfast::WindowAttention make_window_attention(uintptr_t qkv, bool bf16, std::array<int64_t, 3> qkv_stride,
                                               uintptr_t qkv_bias, uintptr_t table, uintptr_t head_scale,
                                               uintptr_t group, int64_t group_stride, int64_t batch, int32_t rows,
                                               int32_t cols, int32_t heads, int32_t head, std::array<int32_t, 2> window,
                                               std::array<int32_t, 2> shift, bool roll_first, float scale, float mask,
                                               uintptr_t grad, std::array<int64_t, 3> grad_stride, uintptr_t out,
                                               uintptr_t d_qkv, uintptr_t d_table, uintptr_t d_bias,
                                               uintptr_t d_head_scale) {
  return {at<const void>(qkv),
          bf16,
          {qkv_stride[0], qkv_stride[1], qkv_stride[2]},
          at<const float>(qkv_bias),
          at<const float>(table),
          at<const float>(head_scale),
          at<const int32_t>(group),
          group_stride,
          batch,
          rows,
          cols,
          heads,
          head,
          {window[0], window[1]},
          {shift[0], shift[1]},
          roll_first,
          scale,
          mask,
          at<const void>(grad),
          {grad_stride[0], grad_stride[1], grad_stride[2]},
          at<void>(out),
          at<void>(d_qkv),
          at<float>(d_table),
          at<float>(d_bias),
          at<float>(d_head_scale)};
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

  m.def(
      "crc32c_cpu",
      [](uintptr_t data, int64_t n, uint32_t crc, bool portable) {
        return mimfast::crc32c_cpu(at<const uint8_t>(data), n, crc, portable);
      },
      py::arg("data"), py::arg("n"), py::arg("crc") = 0, py::arg("portable") = false, release_gil());

  // module_local: the emulated twin may be loaded beside this module
  py::class_<mimfast::HogImages>(m, "HogImages", py::module_local(), "Images and rule, as in csrc/hog.h.")
      .def(py::init(&make_hog_images), py::kw_only(), py::arg("img"), py::arg("stride"), py::arg("batch"),
           py::arg("height"), py::arg("width"), py::arg("cell"), py::arg("unit"), py::arg("weight"),
           py::arg("normalize"), py::arg("factor"));
  py::class_<mimfast::Hog>(m, "Hog", py::module_local(), "One call, as in csrc/hog.h.")
      .def(py::init(&make_hog), py::kw_only(), py::arg("images"), py::arg("side"), py::arg("dense"), py::arg("rows"),
           py::arg("index"), py::arg("out"), py::arg("out_bf16"));
  m.def("hog_cpu", &mimfast::hog_cpu, py::arg("call"), py::arg("threads"), release_gil());
  m.def("hog_simd_bits", &mimfast::hog_simd_bits, py::arg("bits"), "For tests: 128, 256 or 512, at most.");

  // module_local: the emulated twin may be loaded beside this module
  py::class_<mimfast::MaskPlan>(m, "MaskPlan", py::module_local(), "One call, field by field as in csrc/mask_plan.h.")
      .def(py::init(&make_mask_plan), py::kw_only(), py::arg("sample_ids"), py::arg("epochs"), py::arg("epoch"),
           py::arg("batch"), py::arg("rows"), py::arg("cols"), py::arg("unit"), py::arg("keep_units"),
           py::arg("cu_seqlens"), py::arg("importance"), py::arg("seed"), py::arg("word_mask"), py::arg("keep"),
           py::arg("inverse"), py::arg("hidden"), py::arg("hide"));
  m.def("mask_plan_cpu", &mimfast::mask_plan_cpu, py::arg("plan"), py::arg("threads"), release_gil());
  m.def("mask_guided_cpu", &mimfast::mask_guided_cpu, py::arg("plan"), py::arg("threads"), release_gil());

  py::class_<mimfast::MaskPack>(m, "MaskPack", py::module_local(), "One call, field by field as in csrc/mask_pack.h.")
      .def(py::init(&make_mask_pack), py::kw_only(), py::arg("hidden"), py::arg("batch"), py::arg("tokens"),
           py::arg("visible"), py::arg("most_hidden"), py::arg("kept"), py::arg("keep"), py::arg("inverse"),
           py::arg("hide"), py::arg("cu_seqlens"));
  m.def("mask_pack_cpu", &mimfast::mask_pack_cpu, py::arg("pack"), py::arg("threads"), release_gil());

  py::class_<mimfast::MaskBlockwise>(m, "MaskBlockwise", py::module_local(), "One call, see csrc/mask_blockwise.h.")
      .def(py::init(&make_mask_blockwise), py::kw_only(), py::arg("sample_ids"), py::arg("epochs"), py::arg("epoch"),
           py::arg("batch"), py::arg("rows"), py::arg("cols"), py::arg("count"), py::arg("min_block"),
           py::arg("log_low"), py::arg("log_high"), py::arg("exact"), py::arg("seed"), py::arg("hidden"));
  m.def("mask_blockwise_cpu", &mimfast::mask_blockwise_cpu, py::arg("call"), py::arg("threads"), release_gil());
  m.attr("MASK_PLAN_MAX_UNITS_CUDA") = mimfast::kMaskPlanMaxUnitsCuda;

  m.def(
      "group_plan_cpu",
      [](uintptr_t window, int64_t tokens, int64_t windows, int64_t limit, int64_t overhead, uintptr_t slot) {
        return mimfast::group_plan_cpu(at<const int64_t>(window), tokens, windows, limit, overhead, at<int64_t>(slot));
      },
      py::arg("window"), py::arg("tokens"), py::arg("windows"), py::arg("limit"), py::arg("overhead"), py::arg("slot"),
      release_gil());

  py::class_<mimfast::PatchGather>(m, "PatchGather", py::module_local(), "One call, as in csrc/patch_gather.h.")
      .def(py::init(&make_patch_gather), py::kw_only(), py::arg("img"), py::arg("img_type"), py::arg("stride"),
           py::arg("batch"), py::arg("grid_rows"), py::arg("grid_cols"), py::arg("patch"), py::arg("keep"),
           py::arg("flip"), py::arg("cu_seqlens"), py::arg("rows"), py::arg("channels_last"), py::arg("mean"),
           py::arg("std"), py::arg("out"), py::arg("out_type"));
  m.def("patch_gather_cpu", &mimfast::patch_gather_cpu, py::arg("call"), py::arg("threads"), release_gil());

  py::class_<mimfast::LossRows>(m, "LossRows", py::module_local(), "What losses share, as in csrc/loss_tail.h.")
      .def(py::init(&make_loss_rows), py::kw_only(), py::arg("pred"), py::arg("pred_bf16"), py::arg("pred_stride"),
           py::arg("map"), py::arg("index"), py::arg("batch"), py::arg("rows"), py::arg("tokens"), py::arg("values"),
           py::arg("kind"), py::arg("beta"), py::arg("upstream"), py::arg("loss"), py::arg("grad"));
  py::class_<mimfast::PixelLoss>(m, "PixelLoss", py::module_local(), "One call, as in csrc/pixel_loss.h.")
      .def(py::init(&make_pixel_loss), py::kw_only(), py::arg("rows"), py::arg("img"), py::arg("img_uint8"),
           py::arg("img_stride"), py::arg("grid_cols"), py::arg("patch"), py::arg("norm"), py::arg("colour_major"),
           py::arg("mean"), py::arg("std"), py::arg("eps"));
  m.def("pixel_loss_cpu", &mimfast::pixel_loss_cpu, py::arg("call"), py::arg("threads"), release_gil());
  py::class_<mimfast::ShortAttention>(m, "ShortAttention", py::module_local(),
                                      "One call, as in csrc/short_attention.h.")
      .def(py::init(&make_short_attention), py::kw_only(), py::arg("qkv"), py::arg("bf16"), py::arg("qkv_stride"),
           py::arg("cu_seqlens"), py::arg("groups"), py::arg("tokens"), py::arg("heads"), py::arg("head"),
           py::arg("scale"), py::arg("grad"), py::arg("grad_stride"), py::arg("out"), py::arg("d_qkv"));
  m.def("short_attention_cpu", &mimfast::short_attention_cpu, py::arg("call"), py::arg("threads"), release_gil());

  py::class_<mimfast::HogLoss>(m, "HogLoss", py::module_local(), "One call, as in csrc/hog_loss.h.")
      .def(py::init(&make_hog_loss), py::kw_only(), py::arg("rows"), py::arg("images"), py::arg("side"),
           py::arg("parts"), py::arg("count"), py::arg("upstream"), py::arg("partial"), py::arg("stale"));
  m.def("hog_loss_cpu", &mimfast::hog_loss_cpu, py::arg("call"), py::arg("threads"), release_gil());
  m.def("hog_loss_partials", &mimfast::hog_loss_partials, py::arg("call"));

  py::class_<mimfast::CropResize>(m, "CropResize", py::module_local(), "One call, as in csrc/crop_resize.h.")
      .def(py::init(&make_crop_resize), py::kw_only(), py::arg("img"), py::arg("stride"), py::arg("height"),
           py::arg("width"), py::arg("bytes"), py::arg("offsets"), py::arg("shapes"), py::arg("batch"),
           py::arg("boxes"), py::arg("flip"), py::arg("size"), py::arg("bicubic"), py::arg("out"));
  m.def("crop_resize_cpu", &mimfast::crop_resize_cpu, py::arg("call"), py::arg("threads"), release_gil());
  m.def("crop_resize_simd_bits", &mimfast::crop_resize_simd_bits, py::arg("bits"));
  m.attr("CROP_MAX_SIDE") = mimfast::kCropMaxSide;

  py::class_<mimfast::CropGather>(m, "CropGather", py::module_local(), "One call, as in csrc/crop_gather.h.")
      .def(py::init(&make_crop_gather), py::kw_only(), py::arg("crop"), py::arg("keep"), py::arg("kept"),
           py::arg("patch"), py::arg("channels_last"), py::arg("mean"), py::arg("std"), py::arg("out"),
           py::arg("out_type"));
  m.def("crop_gather_cpu", &mimfast::crop_gather_cpu, py::arg("call"), py::arg("threads"), release_gil());

  py::class_<mimfast::LocalNorm>(m, "LocalNorm", py::module_local(), "One call, as in csrc/local_norm.h.")
      .def(py::init(&make_local_norm), py::kw_only(), py::arg("img"), py::arg("img_uint8"), py::arg("stride"),
           py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("radius"), py::arg("floor"), py::arg("out"));
  m.def("local_norm_cpu", &mimfast::local_norm_cpu, py::arg("call"), py::arg("threads"), release_gil());
  m.attr("LOCAL_NORM_MAX_BOX_UINT8") = mimfast::kLocalNormMaxBoxUint8;
  m.attr("LOCAL_NORM_MAX_WIDTH_CUDA") = mimfast::kLocalNormMaxWidthCuda;

  py::class_<mimfast::WindowAttention>(m, "WindowAttention", py::module_local(),
                                       "One call, as in csrc/window_attention.h.")
      .def(py::init(&make_window_attention), py::kw_only(), py::arg("qkv"), py::arg("bf16"), py::arg("qkv_stride"),
           py::arg("qkv_bias"), py::arg("table"), py::arg("head_scale"), py::arg("group"), py::arg("group_stride"),
           py::arg("batch"), py::arg("rows"), py::arg("cols"), py::arg("heads"), py::arg("head"), py::arg("window"),
           py::arg("shift"), py::arg("roll_first"), py::arg("scale"), py::arg("mask"), py::arg("grad"),
           py::arg("grad_stride"), py::arg("out"), py::arg("d_qkv"), py::arg("d_table"), py::arg("d_bias"),
           py::arg("d_head_scale"));
  m.def("window_attention_cpu", &mimfast::window_attention_cpu, py::arg("call"), py::arg("threads"),
        py::arg("lanes") = 16, release_gil());

#ifdef MIMFAST_CUDA
  m.def(
      "crop_gather_cuda",
      [](const mimfast::CropGather& call, uintptr_t stream) {
        mimfast::crop_gather_cuda(call, at<CUstream_st>(stream));
      },
      py::arg("call"), py::arg("stream"), release_gil());
  m.def(
      "crop_resize_cuda",
      [](const mimfast::CropResize& call, uintptr_t stream) {
        mimfast::crop_resize_cuda(call, at<CUstream_st>(stream));
      },
      py::arg("call"), py::arg("stream"), release_gil());
  m.def(
      "hog_loss_cuda",
      [](const mimfast::HogLoss& call, uintptr_t stream) { mimfast::hog_loss_cuda(call, at<CUstream_st>(stream)); },
      py::arg("call"), py::arg("stream"), release_gil());
  m.def(
      "local_norm_cuda",
      [](const mimfast::LocalNorm& call, uintptr_t stream) { mimfast::local_norm_cuda(call, at<CUstream_st>(stream)); },
      py::arg("call"), py::arg("stream"), release_gil());
  m.def(
      "hog_cuda", [](const mimfast::Hog& call, uintptr_t stream) { mimfast::hog_cuda(call, at<CUstream_st>(stream)); },
      py::arg("call"), py::arg("stream"), release_gil());
  m.def(
      "noop_cuda",
      [](uintptr_t x, uintptr_t y, int64_t n, uintptr_t stream) {
        mimfast::noop_cuda(at<const float>(x), at<float>(y), n, at<CUstream_st>(stream));
      },
      py::arg("x"), py::arg("y"), py::arg("n"), py::arg("stream"), release_gil());
  m.def(
      "window_attention_cuda",
      [](const mimfast::WindowAttention& call, int parts, uintptr_t partial, uintptr_t stream) {
        mimfast::window_attention_cuda(call, parts, at<float>(partial), at<CUstream_st>(stream));
      },
      py::arg("call"), py::arg("parts"), py::arg("partial"), py::arg("stream"), release_gil());
  m.def("window_attention_cuda_parts", &mimfast::window_attention_cuda_parts, py::arg("call"), release_gil());
  m.def(
      "mask_plan_cuda",
      [](const mimfast::MaskPlan& plan, uintptr_t stream) { mimfast::mask_plan_cuda(plan, at<CUstream_st>(stream)); },
      py::arg("plan"), py::arg("stream"), release_gil());
  m.def(
      "mask_guided_cuda",
      [](const mimfast::MaskPlan& plan, uintptr_t stream) { mimfast::mask_guided_cuda(plan, at<CUstream_st>(stream)); },
      py::arg("plan"), py::arg("stream"), release_gil());
  m.def(
      "mask_pack_cuda",
      [](const mimfast::MaskPack& pack, uintptr_t stream) { mimfast::mask_pack_cuda(pack, at<CUstream_st>(stream)); },
      py::arg("pack"), py::arg("stream"), release_gil());
  m.def(
      "mask_blockwise_cuda",
      [](const mimfast::MaskBlockwise& call, uintptr_t stream) {
        mimfast::mask_blockwise_cuda(call, at<CUstream_st>(stream));
      },
      py::arg("call"), py::arg("stream"), release_gil());
#endif
}
