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
  bool distinct;            // its strides prove that no two elements share memory
  const char *begin, *end;  // the bytes it spans

  bool dense() const { return distinct && end - begin == x.numel * x.item_size; }
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

// Of complex tensors the dtype of the parts, which are averaged one by one.
Tensor read_parts(uintptr_t impl) {
  Tensor x = read_tensor(impl);
  if (x.complex) x.dtype = x.item_size == 8 ? DType::f32 : DType::f64;
  x.floating = x.floating || x.complex;
  return x;
}

Entry entry(const Tensor& x, int list, int64_t index) {
  int64_t last = 0;  // of the offsets, so far
  bool distinct = true;
  if (contiguous(x)) {
    last = x.numel - 1;
  } else {
    std::vector<int64_t> dims(x.dim);
    std::iota(dims.begin(), dims.end(), 0);
    std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return x.strides[a] < x.strides[b]; });
    for (int64_t d : dims)
      if (x.sizes[d] != 1) {
        distinct = distinct && x.strides[d] > last;
        last += (x.sizes[d] - 1) * x.strides[d];
      }
  }
  return {x, list, index, distinct, x.data, x.data + (last + 1) * x.item_size};
}

std::vector<const char*> sorted_addresses(const Tensor& x) {
  std::vector<const char*> addresses(x.numel);
  std::vector<int64_t> at(x.dim);
  const char* p = x.data;
  for (const char*& address : addresses) {
    address = p;
    for (int64_t d = x.dim - 1; d >= 0; --d) {
      p += x.strides[d] * x.item_size;
      if (++at[d] < x.sizes[d]) break;
      p -= x.sizes[d] * x.strides[d] * x.item_size;
      at[d] = 0;
    }
  }
  std::sort(addresses.begin(), addresses.end());
  return addresses;
}

bool overlaps_itself(const Entry& e) {
  if (e.distinct) return false;
  const auto addresses = sorted_addresses(e.x);
  return std::adjacent_find(addresses.begin(), addresses.end()) != addresses.end();
}

// Of two whose spans overlap: interleaved views share none of their elements.
bool share_memory(const Entry& a, const Entry& b) {
  if (a.dense() && b.dense()) return true;
  const auto in_a = sorted_addresses(a.x), in_b = sorted_addresses(b.x);
  for (auto p = in_a.begin(), q = in_b.begin(); p != in_a.end() && q != in_b.end();) {
    if (*p + a.x.item_size <= *q)
      ++p;
    else if (*q + b.x.item_size <= *p)
      ++q;
    else
      return true;
  }
  return false;
}

bool same_memory(const Tensor& a, const Tensor& b) {
  return a.data == b.data && a.torch_dtype == b.torch_dtype && same_sizes(a, b) && same_order(a, b);
}

}  // namespace

Problem Pairs::read(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& sources,
                    const std::vector<uintptr_t>& shadows, bool copied) {
  std::vector<Tensor> lists[3];
  std::vector<int64_t>& layout = now_;  // its memory is kept
  layout.clear();
  layout.push_back(targets.size());
  layout.push_back(shadows.size());
  for (int list : {kTargets, kSources, kShadows}) {
    const auto& impls = list == kTargets ? targets : list == kSources ? sources : shadows;
    lists[list].reserve(impls.size());
    for (uintptr_t impl : impls) {
      const Tensor& x = lists[list].emplace_back(read_parts(impl));
      const int64_t kind = static_cast<int64_t>(x.torch_dtype) << 32 | x.device_type << 16 | (x.device_index & 0xffff);
      for (int64_t value : {reinterpret_cast<int64_t>(x.data), kind, x.dim, int64_t{x.strides != nullptr}})
        layout.push_back(value);
      for (int64_t d = 0; d < x.dim; ++d) layout.push_back(x.sizes[d]);
      for (int64_t d = 0; d < x.dim && x.strides; ++d) layout.push_back(x.strides[d]);
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
      const Tensor &x = lists[list][k], &target = lists[kTargets][k];
      if (!x.strides) return {"memory", list, k};
      if (!copied && !x.floating) return {"dtype", list, k};
      if (x.torch_dtype != target.torch_dtype && !(x.floating && target.floating && x.complex == target.complex))
        return {"other dtype", list, k};
      if (!same_sizes(x, target)) return {"shape", list, k};
      if (!same_device(x, lists[kTargets][0])) return {"device", list, k};
      if (x.numel && !x.data) return {"memory", list, k};
      if (list == kShadows && (target.dtype != DType::f32 || target.complex)) return {"shadowed", kTargets, k};
      if (list == kShadows && x.item_size != 2) return {"shadow", list, k};
      if (x.numel == 0) continue;
      entries.push_back(entry(x, list, k));
      if (entries.back().written() && overlaps_itself(entries.back())) return {"itself", list, k};
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

  auto found = std::make_shared<Work>();
  updated.clear();
  strided.clear();
  lazy.clear();
  for (size_t at = 0; at < entries.size(); at += used) {
    const Entry& target = entries[at];
    const int64_t k = target.index;
    const Tensor &t = target.x, &s = lists[kSources][k];
    if (repeated[k]) continue;
    updated.push_back(k);
    if (t.numel == 1 || t.complex) lazy.push_back(k);
    bool flat = target.dense() && same_order(t, s);
    Row row{t.data, s.data, nullptr, t.numel, found->chunks, t.dtype, s.dtype, DType::f32, false};
    row.copied = copied && t.torch_dtype == s.torch_dtype;
    row.numel *= row.copied ? t.item_size : t.complex ? 2 : 1;
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
    found->rows.push_back(row);
    found->chunks += chunks(row);
    found->elements += row.numel;
  }
  work = std::move(found);
  layout_.swap(now_);
  return {};
}

}  // namespace sslops::ema_update
