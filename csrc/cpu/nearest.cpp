#include "nearest.h"

#include "rows.h"
#include "softmax.h"
#include "tiles.h"

namespace sslops::nearest {
namespace {

constexpr int64_t kBlock = 256;     // queries that a tile has at most
constexpr int64_t kSpan = 1024;     // queries that meet a chunk of candidates while it is in the caches
constexpr int64_t kTickets = 64;    // to aim at: if the queries do not fill the threads, the candidates are split
constexpr int64_t kTogether = 4;    // candidates that are looked at at once
constexpr int64_t kKept = 1 << 20;  // of all queries' best, over all parts, unless one part has more

// The k best candidates that have passed of each query, best first, those of one rank side by side.
struct Best {
  float* value;
  int32_t* id;  // in the part
  int64_t k, ld;

  void clear(int64_t n) const {
    for (int64_t rank = 0; rank < k; ++rank)
      for (int64_t i = 0; i < n; ++i) value[rank * ld + i] = kLowest;
  }

  // v is more than the last.
  void insert(int64_t i, float v, int32_t candidate) const {
    int64_t at = (k - 1) * ld + i;
    for (; at >= ld && v > value[at - ld]; at -= ld) value[at] = value[at - ld], id[at] = id[at - ld];
    value[at] = v, id[at] = candidate;
  }
};

// The candidates from `first` on, rows of s, kTogether of them.
template <bool kOne>
SSLOPS_INLINE void look(const float* s, int64_t ld, int64_t n, int32_t first, const Best& best) {
  const float* const last = best.value + (best.k - 1) * best.ld;
  for (int64_t i = 0; i < n; i += kLanes) {
    F top = load(last + i);
    if constexpr (kOne) {
      I id;
      std::memcpy(&id, best.id + i, sizeof id);
      for (int32_t j = 0; j < kTogether; ++j) {
        const F v = load(s + j * ld + i);
        const I beats = v > top;
        top = select(beats, v, top);
        id = beats ? I{} + (first + j) : id;
      }
      store(best.value + i, top);
      std::memcpy(best.id + i, &id, sizeof id);
    } else {
      F high = top;
      for (int64_t j = 0; j < kTogether; ++j) high = max(load(s + j * ld + i), high);
      if (!bits(high > top)) continue;
      for (int32_t j = 0; j < kTogether; ++j) {
        const float* const v = s + j * ld + i;
        for (unsigned beats = bits(load(v) > load(last + i)); beats; beats &= beats - 1) {
          const int lane = __builtin_ctz(beats);
          best.insert(i + lane, v[lane], first + j);
        }
      }
    }
  }
}

void forward(Tensor query, Tensor support, bool normalize, DType operand, int64_t first, Tensor ids) {
  const int64_t b = query.sizes[0], d = query.sizes[1], candidates = support.sizes[0], k = ids.sizes[1];
  const int64_t padded = round_up(b, kGroup), chunk = chunk_rows(candidates), chunks = ceil_div(candidates, chunk);
  Buffer<float> inv_norm(b);
  const Rows queries(query, normalize, inv_norm);
  Operand q(b, d, operand);
  parallel_tickets(padded / kGroup, [&](int64_t ticket) {
    const int64_t from = ticket * kGroup, count = at_most(b - from, kGroup);
    for (int64_t i = from; i < from + count; ++i) inv_norm[i] = queries.norm_of(i);
    q.fill(from, count, [&](int64_t i, int64_t j, int lanes) { return round_to(operand, queries.at(i, j, lanes)); });
  });

  const int64_t spans = ceil_div(b, kSpan), fit = spans ? kKept / (k * padded) : 0;
  const int64_t most = fit > 1 ? at_most(ceil_div(kTickets, spans), fit) : 1;
  const int64_t length = ceil_div(chunks, at_most(chunks, most)), parts = ceil_div(chunks, length);
  Buffer<float> value(parts * k * padded);
  Buffer<int32_t> id(parts * k * padded);
  struct State {
    Tile tile;
    Operand rows;
    Buffer<float> inv_norm;
  };
  parallel_tickets(
      spans * parts,
      [&] { return State{Tile(kBlock, q.bf16), Operand(chunk, d, operand, false), Buffer<float>(chunk)}; },
      [&](int64_t ticket, State& state) {
        const int64_t part = ticket / spans, begin = ticket % spans * kSpan, end = at_most(begin + kSpan, b);
        const auto best = [&](int64_t i) {
          const int64_t at = part * k * padded + i;
          return Best{value + at, id + at, k, padded};
        };
        best(begin).clear(round_up(end - begin, kGroup));
        for (int64_t from = part * length * chunk; from < at_most((part + 1) * length * chunk, candidates);
             from += chunk) {
          const int64_t count = at_most(candidates - from, chunk);
          Rows rows(support, normalize, state.inv_norm);
          rows.x = support.data + from * d * support.item_size;
          for (int64_t j = 0; j < count; ++j) state.inv_norm[j] = rows.norm_of(j);
          state.rows.fill(0, count, [&](int64_t i, int64_t j, int lanes) { return rows.at(i, j, lanes); });
          for (int64_t i0 = begin; i0 < end; i0 += kBlock) {
            const int64_t n = at_most(end - i0, kBlock), ld = state.tile.ld;
            float* const s = state.tile.s;
            state.tile.multiply(state.rows, 0, count, q, i0, n);
            for (int64_t i = count * ld; i < round_up(count, kTogether) * ld; ++i) s[i] = -kInf;
            for (int64_t j = 0; j < count && first >= 0; ++j)
              if (const int64_t i = from + j - first - i0; i >= 0 && i < n) s[j * ld + i] = -kInf;
            const auto at = static_cast<int32_t>(from - part * length * chunk);
            for (int32_t j = 0; j < count; j += kTogether)
              (k == 1 ? look<true> : look<false>)(s + j * ld, ld, n, at + j, best(i0));
          }
        }
      });

  parallel_tickets(
      padded / kGroup, [&] { return Buffer<float>(k); },
      [&](int64_t ticket, float* found) {
        for (int64_t i = ticket * kGroup; i < at_most((ticket + 1) * kGroup, b); ++i) {
          int64_t* const out = ids.as<int64_t>() + i * k;
          int64_t count = 0;
          for (int64_t part = 0; part < parts; ++part) {
            for (int64_t rank = 0; rank < k; ++rank) {
              const int64_t at = (part * k + rank) * padded + i;
              if (!(value[at] > (count < k ? kLowest : found[k - 1]))) break;
              int64_t to = count < k ? count++ : k - 1;
              for (; to && value[at] > found[to - 1]; --to) found[to] = found[to - 1], out[to] = out[to - 1];
              found[to] = value[at], out[to] = part * length * chunk + id[at];
            }
          }
          for (int64_t j = 0; count < k; ++j) {  // the others are NaN or -inf
            bool taken = first >= 0 && j == first + i;
            for (int64_t rank = 0; rank < count; ++rank) taken |= out[rank] == j;
            if (!taken) out[count++] = j;
          }
        }
      });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>};
}

}  // namespace sslops::nearest
