#include "ema_pairs.h"

#include <algorithm>
#include <numeric>

namespace sslops::ema_update {
namespace {

constexpr int32_t kCpu = 0;

struct Entry {
  Tensor x;
  int list;
  int64_t index;
  bool dense;
  const char *begin, *end;  // the bytes it spans

  bool written() const { return list != kSources; }
};

bool same_sizes(const Tensor& a, const Tensor& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.device_type == b.device_type && (a.device_type == kCpu || a.device_index == b.device_index);
}

// Of tensors of the same sizes. Strides of dimensions of size 1 say nothing.
bool same_order(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

bool contiguous(const Tensor& x) {
  int64_t stride = 1;
  for (int64_t d = x.dim - 1; d >= 0; --d)
    if (x.sizes[d] != 1) {
      if (x.strides[d] != stride) return false;
      stride *= x.sizes[d];
    }
  return true;
}

// Without holes or overlaps, in some order of the dimensions.
bool dense(const Tensor& x) {
  if (x.numel == 0 || contiguous(x)) return true;
  std::vector<int64_t> dims(x.dim);
  std::iota(dims.begin(), dims.end(), 0);
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return x.strides[a] < x.strides[b]; });
  int64_t stride = 1;
  for (int64_t d : dims)
    if (x.sizes[d] != 1) {
      if (x.strides[d] != stride) return false;
      stride *= x.sizes[d];
    }
  return true;
}

Entry entry(const Tensor& x, int list, int64_t index) {
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim; ++d) last += (x.sizes[d] - 1) * x.strides[d];
  return {x, list, index, dense(x), x.data, x.data + (last + 1) * x.item_size()};
}

// visit(address) of every element until it returns false.
template <typename Visit>
bool each_element(const Tensor& x, Visit visit) {
  std::vector<int64_t> at(x.dim);
  const char* p = x.data;
  for (int64_t k = 0; k < x.numel; ++k) {
    if (!visit(p)) return false;
    for (int64_t d = x.dim - 1; d >= 0; --d) {
      p += x.strides[d] * x.item_size();
      if (++at[d] < x.sizes[d]) break;
      p -= x.sizes[d] * x.strides[d] * x.item_size();
      at[d] = 0;
    }
  }
  return true;
}

// Marks e's bytes in [begin, begin + taken.size()); false if one was marked already.
bool mark(const Entry& e, const char* begin, std::vector<bool>& taken) {
  const int64_t size = taken.size();
  return each_element(e.x, [&](const char* p) {
    for (int64_t k = p - begin, end = k + e.x.item_size(); k < end; ++k) {
      if (k < 0 || k >= size) continue;
      if (taken[k]) return false;
      taken[k] = true;
    }
    return true;
  });
}

bool overlaps_itself(const Entry& e) {
  std::vector<bool> taken(e.end - e.begin);
  return !mark(e, e.begin, taken);
}

// Of two whose spans overlap: interleaved views share none of their elements.
bool share_memory(const Entry& a, const Entry& b) {
  if (a.dense && b.dense) return true;
  std::vector<bool> taken(a.end - a.begin);
  if (a.written()) {
    mark(a, a.begin, taken);
  } else {  // a source may be expanded
    each_element(a.x, [&](const char* p) {
      std::fill_n(taken.begin() + (p - a.begin), a.x.item_size(), true);
      return true;
    });
  }
  const int64_t size = taken.size();
  return !each_element(b.x, [&](const char* p) {
    for (int64_t k = p - a.begin, end = k + b.x.item_size(); k < end; ++k)
      if (k >= 0 && k < size && taken[k]) return false;
    return true;
  });
}

bool same_memory(const Tensor& a, const Tensor& b) {
  return a.data == b.data && a.dtype == b.dtype && same_sizes(a, b) && same_order(a, b);
}

}  // namespace

Problem Pairs::read(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& sources,
                    const std::vector<uintptr_t>& shadows, int64_t first) {
  std::vector<Tensor> lists[3];
  std::vector<int64_t> layout{first, static_cast<int64_t>(targets.size()), static_cast<int64_t>(shadows.size())};
  layout.reserve(layout_.size());
  for (int list : {kTargets, kSources, kShadows}) {
    const auto& impls = list == kTargets ? targets : list == kSources ? sources : shadows;
    lists[list].reserve(impls.size());
    for (uintptr_t impl : impls) {
      const Tensor& x = lists[list].emplace_back(read_tensor(impl));
      layout.insert(layout.end(), {reinterpret_cast<int64_t>(x.data), x.floating ? static_cast<int64_t>(x.dtype) : -1,
                                   x.device_type, x.device_index, x.dim, x.strides != nullptr});
      layout.insert(layout.end(), x.sizes, x.sizes + x.dim);
      if (x.strides) layout.insert(layout.end(), x.strides, x.strides + x.dim);
    }
  }
  if (layout == layout_) return {};
  layout_.clear();  // until all is checked

  const int64_t count = targets.size();
  const int used = shadows.empty() ? 2 : 3;
  std::vector<Entry> entries;
  entries.reserve(used * count);
  for (int64_t k = 0; k < count; ++k)
    for (int list = 0; list < used; ++list) {
      const Tensor& x = lists[list][k];
      if (!x.floating) return {"dtype", list, k};
      if (!same_sizes(x, lists[kTargets][k])) return {"shape", list, k};
      if (!same_device(x, lists[kTargets][0])) return {"device", list, k};
      if (!x.strides || (x.numel && !x.data)) return {"memory", list, k};
      if (list == kShadows && lists[kTargets][k].dtype != DType::f32) return {"shadowed", kTargets, k};
      if (list == kShadows && x.item_size() != 2) return {"shadow", list, k};
      if (x.numel == 0) continue;
      entries.push_back(entry(x, list, k));
      if (entries.back().written() && !entries.back().dense && overlaps_itself(entries.back()))
        return {"itself", list, k};
    }

  // A sweep over the spans in memory. The same target may come twice (shared parameters): it is updated once.
  std::vector<bool> repeated(count);
  std::vector<const Entry*> by_address(entries.size()), open;
  std::transform(entries.begin(), entries.end(), by_address.begin(), [](const Entry& e) { return &e; });
  std::sort(by_address.begin(), by_address.end(), [](const Entry* a, const Entry* b) {
    return a->begin != b->begin ? a->begin < b->begin : a < b;  // entries are in the order of the lists
  });
  for (const Entry* e : by_address) {
    open.erase(std::remove_if(open.begin(), open.end(), [&](const Entry* o) { return o->end <= e->begin; }),
               open.end());
    for (const Entry* o : open) {
      if (!(o->written() || e->written()) || !share_memory(*o, *e)) continue;
      const auto same = [&](int list) { return same_memory(lists[list][o->index], lists[list][e->index]); };
      const bool twice = o->list == e->list && same(kTargets) && same(kSources) && (used == 2 || same(kShadows));
      if (!twice) return {"overlap", o->list, o->index, e->list, e->index};
      repeated[e->index] = true;
    }
    open.push_back(e);
  }

  rows.clear();
  strided.clear();
  first_chunk = chunks = first;
  elements = 0;
  for (int64_t k = 0; k < count; ++k) {
    const Tensor &t = lists[kTargets][k], &s = lists[kSources][k];
    if (t.numel == 0 || repeated[k]) continue;
    bool flat = dense(t) && same_order(t, s);
    Row row{t.data, s.data, nullptr, t.numel, chunks, t.dtype, s.dtype, DType::f32};
    if (used == 3) {
      const Tensor& shadow = lists[kShadows][k];
      flat = flat && same_order(t, shadow);
      row.shadow = shadow.data;
      row.shadow_dtype = shadow.dtype;
    }
    if (!flat) {
      strided.push_back(k);
      continue;
    }
    rows.push_back(row);
    chunks += ema_update::chunks(row);
    elements += row.numel;
  }
  ++version;
  layout_ = std::move(layout);
  return {};
}

}  // namespace sslops::ema_update
