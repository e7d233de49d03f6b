// Bindings, nothing else. Tensors come as addresses; Python has checked dtypes, shapes, contiguity and devices.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/huge_pages.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/barlow_twins.h"
#include "cpu/columns.h"
#include "cpu/cross_correlation.h"
#include "cpu/ema_update.h"
#include "cpu/gather_patches.h"
#include "cpu/gather_tokens.h"
#include "cpu/info_nce.h"
#include "cpu/masked_patch_mse.h"
#include "cpu/nt_xent.h"
#include "cpu/prototypes.h"
#include "cpu/random_mask.h"
#include "cpu/random_token_corruption.h"
#include "cpu/relic.h"
#include "cpu/restore_tokens.h"
#include "cpu/sinkhorn.h"
#include "cpu/vicreg.h"
#ifdef SSLOPS_CUDA
#include "cuda/ema_update.h"
#include "cuda/gather_patches.h"
#include "cuda/gather_tokens.h"
#include "cuda/masked_patch_mse.h"
#include "cuda/probe.h"
#include "cuda/random_mask.h"
#include "cuda/random_token_corruption.h"
#include "cuda/restore_tokens.h"
#endif

namespace py = pybind11;
using namespace sslops;

namespace pybind11::detail {

// A torch tensor or None, as the address of its implementation tells.
template <>
struct type_caster<Tensor> {
  PYBIND11_TYPE_CASTER(Tensor, const_name("Tensor | None"));
  bool load(handle source, bool) {
    if (source.is_none()) {
      value = {};
      return true;
    }
    static PyObject* const name = PyUnicode_InternFromString("_cdata");
    const auto address = reinterpret_steal<object>(PyObject_GetAttr(source.ptr(), name));
    if (!address) {
      PyErr_Clear();
      return false;
    }
    value = read_tensor(reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(address.ptr())));
    return true;
  }
};

// A list of torch tensors.
template <>
struct type_caster<Tensors> {
  PYBIND11_TYPE_CASTER(Tensors, const_name("list[Tensor]"));
  bool load(handle source, bool convert) {
    if (!isinstance<list>(source)) return false;
    for (const handle each : reinterpret_borrow<list>(source)) {
      make_caster<Tensor> one;
      if (!one.load(each, convert)) return false;
      held_.push_back(cast_op<Tensor>(one));
    }
    value = {held_.data(), static_cast<int64_t>(held_.size())};
    return true;
  }

 private:
  std::vector<Tensor> held_;
};

// A torch.dtype.
template <>
struct type_caster<DType> {
  PYBIND11_TYPE_CASTER(DType, const_name("torch.dtype"));
  bool load(handle source, bool) {
    static const std::array<PyObject*, 3> known = [] {
      const auto torch = module_::import("torch");
      return std::array{torch.attr("float32").ptr(), torch.attr("float16").ptr(), torch.attr("bfloat16").ptr()};
    }();
    const auto found = std::find(known.begin(), known.end(), source.ptr());
    value = DType(found - known.begin());
    return found != known.end();
  }
};

}  // namespace pybind11::detail

namespace {

// Ctrl-C, seen where Python runs its signal handlers: on the main thread.
bool check_signals() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

template <typename Table, typename Result, typename... Arguments>
void bind(py::module_& m, const Table& (*table)(), const Bound<Table, Result, Arguments...>& bound) {
  const auto function = bound.function;
  m.def(bound.name, [=](Arguments... arguments) -> Result {
    const Call call(check_signals);
    const auto run = [&] {
      const py::gil_scoped_release others_may_run;
      return (table().*function)(arguments...);
    };
    if constexpr (std::is_void_v<Result>) {
      run();
      if (call.interrupted()) throw py::error_already_set();
    } else {
      Result result = run();
      if (call.interrupted()) throw py::error_already_set();
      return result;
    }
  });
}

// Each function of a table under its name, to be called on the table of the instruction set in use, without the GIL.
template <typename Table>
void bind(py::module_& m, const Table& (*table)()) {
  std::apply([&](const auto&... bound) { (bind(m, table, bound), ...); }, Table::bound());
}

using Address = uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

py::dict build_info() {
  py::dict info;
  info["version"] = SSLOPS_VERSION;
  info["compiler"] = __VERSION__;
  info["isas"] = SSLOPS_ISAS;
#ifdef SSLOPS_CUDA
  info["cuda_archs"] = SSLOPS_CUDA_ARCHS;
#else
  info["cuda_archs"] = py::none();
#endif
  info["isa"] = isa_name(current_isa());
  info["threads"] = parallel_backend();
  return info;
}

void bind_patches(py::module_& m) {
  using Four = std::array<int64_t, 4>;
  py::class_<Patches>(m, "Patches", "A grid of patches over images of this shape [B, C, H, W] and these strides.")
      .def(py::init([](const Four& shape, const Four& strides, int64_t height, int64_t width) {
        return Patches{shape[0], shape[1],   shape[2] / height, shape[3] / width, height,
                       width,    strides[0], strides[1],        strides[2],       strides[3]};
      }));
}

void bind_gather_patches(py::module_& m) {
  using namespace gather_patches;
  const auto factors = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
  m.def(
      "gather_patches",
      [=](Address images, int dtype, const Patches& patches, Address ids, int64_t k, int layout,
          const std::vector<float>& scale, const std::vector<float>& shift, Address out, int out_dtype) {
        table().forward(at<void>(images), DType(dtype), patches, at<int64_t>(ids), k, Layout(layout), factors(scale),
                        factors(shift), at<void>(out), DType(out_dtype));
      },
      NoGil());
  m.def(
      "gather_patches_backward",
      [=](Address d_images, int dtype, const Patches& patches, Address ids, int64_t k, int layout,
          const std::vector<float>& scale, Address grad, int grad_dtype) {
        table().backward(at<void>(d_images), DType(dtype), patches, at<int64_t>(ids), k, Layout(layout), factors(scale),
                         at<void>(grad), DType(grad_dtype));
      },
      NoGil());
#ifdef SSLOPS_CUDA
  const auto packed = [](const std::vector<float>& scale, const std::vector<float>& shift) {
    Factors f{!scale.empty(), {}, {}};
    if (scale.size() > kMaxChannels) throw std::invalid_argument("too many channels");
    std::copy(scale.begin(), scale.end(), f.scale);
    std::copy(shift.begin(), shift.end(), f.shift);
    return f;
  };
  m.attr("CUDA_MAX_CHANNELS") = kMaxChannels;
  m.def("cuda_gather_patches", [=](Address images, int dtype, const Patches& patches, Address ids, int64_t k,
                                   int layout, const std::vector<float>& scale, const std::vector<float>& shift,
                                   Address out, int out_dtype, Address stream) {
    cuda_forward(at<void>(images), DType(dtype), patches, at<int64_t>(ids), k, Layout(layout), packed(scale, shift),
                 at<void>(out), DType(out_dtype), at<void>(stream));
  });
  m.def("cuda_gather_patches_backward",
        [=](Address d_images, int dtype, const Patches& patches, Address ids, int64_t k, int layout,
            const std::vector<float>& scale, Address grad, int grad_dtype, Address stream) {
          cuda_backward(at<void>(d_images), DType(dtype), patches, at<int64_t>(ids), k, Layout(layout),
                        packed(scale, scale), at<void>(grad), DType(grad_dtype), at<void>(stream));
        });
#endif
}

void bind_masked_patch_mse(py::module_& m) {
  using namespace masked_patch_mse;
  py::class_<Prediction>(m, "PatchPrediction", "Predicted patches: address, dtype, strides of an image and of a patch.")
      .def(py::init([](Address data, int dtype, int64_t image_stride, int64_t patch_stride) {
        return Prediction{at<void>(data), DType(dtype), image_stride, patch_stride};
      }));
  py::class_<Target>(m, "PatchTarget", "What they should be: images, their patches, and how those are normalised.")
      .def(py::init([](Address images, int dtype, const Patches& patches, bool normalized, double eps) {
        return Target{at<void>(images), DType(dtype), patches, normalized, static_cast<float>(eps)};
      }));
  m.def(
      "masked_patch_mse",
      [](const Prediction& pred, const Target& target, Address mask, double grad, Address errors, Address d_pred) {
        const Sums sums =
            table().loss(pred, target, at<float>(mask), static_cast<float>(grad), at<float>(errors), at<void>(d_pred));
        return std::pair(sums.error, sums.weight);
      },
      NoGil());
#ifdef SSLOPS_CUDA
  m.def("cuda_masked_patch_mse", [](const Prediction& pred, const Target& target, Address mask, Address errors,
                                    Address loss, Address inverse, Address stream) {
    cuda_forward(pred, target, at<float>(mask), at<float>(errors), at<float>(loss), at<float>(inverse),
                 at<void>(stream));
  });
  m.def("cuda_masked_patch_mse_backward", [](const Prediction& pred, const Target& target, Address mask, Address grad,
                                             Address inverse, Address d_pred, Address stream) {
    cuda_backward(pred, target, at<float>(mask), at<float>(grad), at<float>(inverse), at<void>(d_pred),
                  at<void>(stream));
  });
#endif
}

// Where the implementations of a list of tensors are; TypeError if one is no tensor. The property is looked up once: it
// is half the price.
std::vector<uintptr_t> implementations(const py::list& tensors) {
  static py::gil_safe_call_once_and_store<py::object> stored;
  PyObject* const cdata =
      stored.call_once_and_store_result([] { return py::module_::import("torch").attr("Tensor").attr("_cdata"); })
          .get_stored()
          .ptr();
  std::vector<uintptr_t> found;
  found.reserve(tensors.size());
  for (const py::handle tensor : tensors) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    const auto address = py::reinterpret_steal<py::object>(Py_TYPE(cdata)->tp_descr_get(cdata, tensor.ptr(), type));
    if (!address) throw py::error_already_set();
    found.push_back(reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(address.ptr())));
  }
  return found;
}

void bind_ema_update(py::module_& m) {
  using namespace ema_update;
  py::class_<Work, std::shared_ptr<Work>>(m, "EmaWork", "Where a momentum update reads and writes.")
      .def_property_readonly("nbytes", [](const Work& work) { return work.rows.size() * sizeof(Row); });
  py::class_<Pairs>(m, "EmaPairs", "Targets and their sources, as they were when they were read.")
      .def(py::init<>())
      .def("read",
           [](Pairs& pairs, const py::list& targets, const py::list& sources, const py::list& shadows, bool copied) {
             const Problem p =
                 pairs.read(implementations(targets), implementations(sources), implementations(shadows), copied);
             return std::tuple(p.what, p.list, p.index, p.other_list, p.other_index);
           })
      .def_readonly("work", &Pairs::work)
      .def_readonly("updated", &Pairs::updated)
      .def_readonly("strided", &Pairs::strided)
      .def_readonly("lazy", &Pairs::lazy);
  m.def("ema_update", [](std::shared_ptr<Work> work, double momentum, std::optional<uint64_t> seed) {
    const py::gil_scoped_release others_may_run;
    table().update(*work, momentum, seed ? &*seed : nullptr);
  });
#ifdef SSLOPS_CUDA
  m.def("cuda_ema_upload", [](const Work& work, Address device_rows, Address stream) {
    cuda_upload(work, at<Row>(device_rows), at<void>(stream));
  });
  m.def("cuda_ema_update", [](const Work& work, Address device_rows, double momentum, Address device_momentum,
                              bool is_double, bool stochastic, uint64_t seed, Address device_seed, Address stream) {
    cuda_update(work, at<Row>(device_rows), {momentum, at<void>(device_momentum), is_double},
                {stochastic, seed, at<uint64_t>(device_seed)}, at<void>(stream));
  });
#endif
}

void bind_random_mask(py::module_& m) {
  using namespace random_mask;
  m.def(
      "random_mask",
      [](Address noise, Address key, int64_t batch, int64_t length, int64_t num_prefix, int64_t keep, Address ids_keep,
         Address ids_mask, Address ids_restore, Address mask) {
        table().draw({at<float>(noise), at<uint64_t>(key), length, num_prefix}, batch,
                     {keep, at<int64_t>(ids_keep), at<int64_t>(ids_mask), at<int64_t>(ids_restore), at<float>(mask)});
      },
      NoGil());
#ifdef SSLOPS_CUDA
  m.def("cuda_random_mask",
        [](Address noise, Address key, int64_t batch, int64_t length, int64_t num_prefix, int64_t keep,
           Address ids_keep, Address ids_mask, Address ids_restore, Address mask, Address stream) {
          cuda_draw({at<float>(noise), at<uint64_t>(key), length, num_prefix}, batch,
                    {keep, at<int64_t>(ids_keep), at<int64_t>(ids_mask), at<int64_t>(ids_restore), at<float>(mask)},
                    at<void>(stream));
        });
#endif
}

void bind_gather_tokens(py::module_& m) {
  using namespace gather_tokens;
  m.def(
      "gather_tokens",
      [](Address tokens, int64_t batch_stride, int64_t row_stride, Address ids, int64_t batch, int64_t count,
         int64_t rows, int64_t row, Address out) {
        table().forward({at<char>(tokens), batch_stride, row_stride}, {at<int64_t>(ids), batch, count, rows}, row,
                        at<char>(out));
      },
      NoGil());
  m.def(
      "gather_tokens_backward",
      [](Address grad, int64_t grad_batch_stride, int64_t grad_row_stride, int grad_dtype, Address ids, int64_t batch,
         int64_t count, int64_t rows, int64_t d, Address out, int64_t out_batch_stride, int64_t out_row_stride,
         int out_dtype) {
        table().backward({at<char>(grad), grad_batch_stride, grad_row_stride}, DType(grad_dtype),
                         {at<int64_t>(ids), batch, count, rows}, d, {at<char>(out), out_batch_stride, out_row_stride},
                         DType(out_dtype));
      },
      NoGil());
#ifdef SSLOPS_CUDA
  m.def("cuda_gather_tokens", [](Address tokens, int64_t batch_stride, int64_t row_stride, Address ids, int64_t batch,
                                 int64_t count, int64_t rows, int64_t row, Address out, Address stream) {
    cuda_forward({at<char>(tokens), batch_stride, row_stride}, {at<int64_t>(ids), batch, count, rows}, row,
                 at<char>(out), at<void>(stream));
  });
  m.def("cuda_gather_tokens_scatter",
        [](Address grad, Address ids, int64_t batch, int64_t count, int64_t rows, int64_t row, Address out,
           int64_t batch_stride, int64_t row_stride, Address stream) {
          cuda_scatter(at<char>(grad), {at<int64_t>(ids), batch, count, rows}, row,
                       {at<char>(out), batch_stride, row_stride}, at<void>(stream));
        });
  m.def("cuda_gather_tokens_backward",
        [](Address grad, int64_t grad_batch_stride, int64_t grad_row_stride, int grad_dtype, Address ids, int64_t batch,
           int64_t count, int64_t rows, int64_t d, Address out, int64_t out_batch_stride, int64_t out_row_stride,
           int out_dtype, Address stream) {
          cuda_backward({at<char>(grad), grad_batch_stride, grad_row_stride}, DType(grad_dtype),
                        {at<int64_t>(ids), batch, count, rows}, d, {at<char>(out), out_batch_stride, out_row_stride},
                        DType(out_dtype), at<void>(stream));
        });
#endif
}

void bind_restore_tokens(py::module_& m) {
  using namespace restore_tokens;
  m.def(
      "restore_tokens",
      [](Address visible, int visible_dtype, Address token, int token_dtype, Address positions, int positions_dtype,
         Address ids, int64_t batch, int64_t prefix, int64_t kept, int64_t length, int64_t d, Address out,
         int out_dtype) {
        table().forward({at<void>(visible), DType(visible_dtype)}, {at<void>(token), DType(token_dtype)},
                        {at<void>(positions), DType(positions_dtype)}, at<int64_t>(ids),
                        {batch, prefix, kept, length, d}, {at<void>(out), DType(out_dtype)});
      },
      NoGil());
  m.def(
      "restore_tokens_reduce",
      [](Address grad, int dtype, Address ids, int64_t batch, int64_t prefix, int64_t kept, int64_t length, int64_t d,
         Address parts, Address token, Address positions) {
        table().reduce({at<void>(grad), DType(dtype)}, at<int64_t>(ids), {batch, prefix, kept, length, d},
                       at<double>(parts), at<float>(token), at<float>(positions));
      },
      NoGil());
#ifdef SSLOPS_CUDA
  m.def("cuda_restore_tokens", [](Address visible, int visible_dtype, Address token, int token_dtype, Address positions,
                                  int positions_dtype, Address ids, int64_t batch, int64_t prefix, int64_t kept,
                                  int64_t length, int64_t d, Address out, int out_dtype, Address stream) {
    cuda_forward({at<void>(visible), DType(visible_dtype)}, {at<void>(token), DType(token_dtype)},
                 {at<void>(positions), DType(positions_dtype)}, at<int64_t>(ids), {batch, prefix, kept, length, d},
                 {at<void>(out), DType(out_dtype)}, at<void>(stream));
  });
  m.def("cuda_restore_tokens_reduce",
        [](Address grad, int dtype, Address ids, int64_t batch, int64_t prefix, int64_t kept, int64_t length, int64_t d,
           Address parts, Address positions, Address stream) {
          cuda_reduce({at<void>(grad), DType(dtype)}, at<int64_t>(ids), {batch, prefix, kept, length, d},
                      at<double>(parts), at<float>(positions), at<void>(stream));
        });
#endif
}

void bind_random_token_corruption(py::module_& m) {
  using namespace random_token_corruption;
  m.def(
      "random_token_corruption",
      [](Address ids, Address special, int64_t count, int64_t mask_id, int64_t vocab_size, uint64_t chosen,
         uint64_t masked, uint64_t masked_or_random, Address key, Address corrupted, Address labels) {
        table().corrupt({at<int64_t>(ids), at<bool>(special), count, mask_id, vocab_size},
                        {chosen, masked, masked_or_random}, at<uint64_t>(key), at<int64_t>(corrupted),
                        at<int64_t>(labels));
      },
      NoGil());
#ifdef SSLOPS_CUDA
  m.def("cuda_random_token_corruption",
        [](Address ids, Address special, int64_t count, int64_t mask_id, int64_t vocab_size, uint64_t chosen,
           uint64_t masked, uint64_t masked_or_random, Address key, Address corrupted, Address labels, Address stream) {
          cuda_corrupt({at<int64_t>(ids), at<bool>(special), count, mask_id, vocab_size},
                       {chosen, masked, masked_or_random}, at<uint64_t>(key), at<int64_t>(corrupted),
                       at<int64_t>(labels), at<void>(stream));
        });
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native core of sslops: raw addresses in, no dependency on libtorch.";
  m.def("build_info", &build_info, "What this binary holds: version, compiler, instruction sets, CUDA targets.");
  m.def("advise_huge_pages", [](Address x, int64_t bytes) { advise_huge_pages(at<void>(x), bytes); });
  m.def("isa", [] { return isa_name(current_isa()); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, "Use a lower instruction set than the machine has; ValueError if it has not got it.");
  bind_gather_tokens(m);
  bind(m, info_nce::table);
  bind_patches(m);
  bind_gather_patches(m);
  bind_masked_patch_mse(m);
  bind(m, barlow_twins::table);
  bind(m, columns::table);
  bind(m, cross_correlation::table);
  bind(m, nt_xent::table);
  bind(m, prototypes::table);
  bind(m, relic::table);
  bind(m, sinkhorn::table);
  bind(m, vicreg::table);
  bind_ema_update(m);
  bind_random_mask(m);
  bind_random_token_corruption(m);
  bind_restore_tokens(m);
#ifdef SSLOPS_CUDA
  m.def("cuda_iota", [](Address out, int64_t n, Address stream) { cuda_iota(at<int32_t>(out), n, at<void>(stream)); });
#endif
}
