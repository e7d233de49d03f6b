// Casters, and a line for each table. Python has checked dtypes, shapes, contiguity and devices.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/huge_pages.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/barlow_twins.h"
#include "cpu/clip.h"
#include "cpu/columns.h"
#include "cpu/cross_correlation.h"
#include "cpu/ema_update.h"
#include "cpu/exceeding.h"
#include "cpu/gather_patches.h"
#include "cpu/gather_tokens.h"
#include "cpu/info_nce.h"
#include "cpu/masked_prediction.h"
#include "cpu/multi_block_mask.h"
#include "cpu/nearest.h"
#include "cpu/nt_xent.h"
#include "cpu/prototypes.h"
#include "cpu/random_mask.h"
#include "cpu/random_token_corruption.h"
#include "cpu/relic.h"
#include "cpu/restore_tokens.h"
#include "cpu/siglip.h"
#include "cpu/sigreg.h"
#include "cpu/sinkhorn.h"
#include "cpu/skip_gram.h"
#include "cpu/supcon.h"
#include "cpu/vicreg.h"
#ifdef SSLOPS_CUDA
#include "cuda/ema_update.h"
#include "cuda/gather_patches.h"
#include "cuda/gather_tokens.h"
#include "cuda/masked_prediction.h"
#include "cuda/multi_block_mask.h"
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
    return value.data || !value.numel;  // a null pointer is None's alone
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

// A stream's handle, torch.cuda.Stream.cuda_stream.
template <>
struct type_caster<Stream> {
  PYBIND11_TYPE_CASTER(Stream, const_name("int"));
  bool load(handle source, bool) {
    value.handle = PyLong_AsVoidPtr(source.ptr());
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native core of sslops: no dependency on libtorch.";
  m.def("build_info", &build_info, "What this binary holds: version, compiler, instruction sets, CUDA targets.");
  m.attr("WORTH_HUGE_PAGES") = kWorthHugePages;
  m.def("advise_huge_pages", [](Address x, int64_t bytes) { advise_huge_pages(at<void>(x), bytes); });
  m.def("isa", [] { return isa_name(current_isa()); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, "Use a lower instruction set than the machine has; ValueError if it has not got it.");
  bind(m, barlow_twins::table);
  bind(m, clip::table);
  bind(m, columns::table);
  bind(m, cross_correlation::table);
  bind(m, exceeding::table);
  bind(m, gather_patches::table);
  bind(m, gather_tokens::table);
  bind(m, info_nce::table);
  bind(m, masked_prediction::table);
  bind(m, multi_block_mask::table);
  bind(m, nearest::table);
  bind(m, nt_xent::table);
  bind(m, prototypes::table);
  bind(m, random_mask::table);
  bind(m, random_token_corruption::table);
  bind(m, relic::table);
  bind(m, restore_tokens::table);
  bind(m, siglip::table);
  bind(m, sigreg::table);
  bind(m, sinkhorn::table);
  bind(m, skip_gram::table);
  bind(m, supcon::table);
  bind(m, vicreg::table);
  bind_ema_update(m);
#ifdef SSLOPS_CUDA
  bind(m, gather_patches::cuda_table);
  bind(m, gather_tokens::cuda_table);
  bind(m, masked_prediction::cuda_table);
  bind(m, multi_block_mask::cuda_table);
  bind(m, random_mask::cuda_table);
  bind(m, random_token_corruption::cuda_table);
  bind(m, restore_tokens::cuda_table);
  m.def("cuda_iota", [](Address out, int64_t n, Address stream) { cuda_iota(at<int32_t>(out), n, at<void>(stream)); });
#endif
}
