#include "prototypes.h"

#include "last_layer.h"
#include "parts.h"
#include "prototype_rows.h"

namespace sslops::prototypes {
namespace {

// The views of a list of [V_i, B, width], or of examples from `first` on in memory of float32.
struct Crops {
  int64_t views = 0, item, width, first = 0;  // width: from a row to the next
  DType dtype = DType::f32;
  Buffer<char*> base;

  explicit Crops(Tensors list)
      : item(list.count ? list.data[0].item_size : 0),
        width(list.count ? list.data[0].sizes[2] : 0),
        base(views_of(list)) {
    if (list.count) dtype = list.data[0].dtype;
    for (int64_t i = 0; i < list.count; ++i)
      for (int64_t v = 0; v < list.data[i].sizes[0]; ++v)
        base[views++] = list.data[i].data + v * list.data[i].sizes[1] * width * item;
  }
  Crops(float* data, int64_t views, int64_t first, int64_t count, int64_t width)
      : views(views), item(sizeof(float)), width(width), first(first), base(views) {
    for (int64_t v = 0; v < views; ++v) base[v] = reinterpret_cast<char*>(data + v * count * width);
  }
  // Row b of view v.
  char* row(int64_t v, int64_t b) const { return base[v] + (b - first) * width * item; }

 private:
  static int64_t views_of(Tensors list) {
    int64_t views = 0;
    for (int64_t i = 0; i < list.count; ++i) views += list.data[i].sizes[0];
    return views;
  }
};

struct Batch {
  const Crops &student, &teacher;  // their logits
  const int64_t n, k, tiles;
  const Inverse student_inverse, teacher_inverse;
  const Tensor bias, weights, index;
  const bool same_view;
  const float each;  // what an example counts, beside its weight
  int64_t pairs = 0;

  Batch(const Crops& student, const Crops& teacher, int64_t n, int64_t k, double student_temp, double teacher_temp,
        Tensor bias, Tensor weights, Tensor index, bool same_view, bool mean)
      : student(student),
        teacher(teacher),
        n(n),
        k(k),
        tiles(tiles_of(k)),
        student_inverse(student_temp),
        teacher_inverse(teacher_temp),
        bias(bias),
        weights(weights),
        index(index),
        same_view(same_view),
        each(mean ? 1.f / static_cast<float>(n) : 1.f) {
    for (int64_t v = 0; v < student.views; ++v) pairs += teachers_of(v);
  }

  int64_t teachers_of(int64_t v) const { return teacher.views - (v < teacher.views && !same_view); }
  int64_t length(int64_t tile) const { return k - tile * kTile < kTile ? k - tile * kTile : kTile; }
  const char* teacher_row(int64_t t, int64_t b) const { return teacher.row(t, index ? index.as<int64_t>()[b] : b); }
  const float* bias_of(int64_t t) const { return bias ? bias.as<float>() + (bias.sizes[0] > 1 ? t * k : 0) : nullptr; }
  // The views of example b, step by step: those of distant examples do not begin with the same one.
  int64_t view(int64_t step, int64_t b) const { return (step + b * student.views / n) % student.views; }
  // Of example b, for each of its pairs.
  float weight(int64_t b) const { return (weights ? weights.as<float>()[b] : 1.f) / static_cast<float>(pairs); }
};

// A thread's example: the teachers' q, as exponentials relative to their tiles' maxima and a factor for each tile. Its
// sweeps are called from three places, and are code once.
class Example {
 public:
  explicit Example(const Batch& batch)
      : batch_(batch),
        ld_(round_up(batch.k, 16)),
        e_(batch.teacher.views * ld_),
        factors_(batch.teacher.views * batch.tiles),
        tops_(batch.tiles),
        entropies_(batch.tiles),
        q_((batch.teacher.views + 2) * kTile),
        student_tops_(batch.student.views * batch.tiles),
        softmax_(batch.student.views),
        student_(kernels_of(batch.student.dtype)),
        teacher_(kernels_of(batch.teacher.dtype)) {}

  // entropy [T, B], unless it is null
  __attribute__((noinline)) void read_teachers(int64_t b, float* entropy) {
    for (int64_t t = 0; t < batch_.teacher.views; ++t) {
      const char* const row = batch_.teacher_row(t, b);
      float *const factors = factors_ + t * batch_.tiles, top = kLowest;
      const float* const bias = batch_.bias_of(t);
      const Inverse& inverse = batch_.teacher_inverse;
      for (int64_t i = 0; i < batch_.tiles; ++i) {
        const int64_t first = i * kTile, n = batch_.length(i);
        tops_[i] = teacher_.top_of(row, first, n, inverse.high, bias);
        const Sums tile =
            teacher_.exponentials_of(row, batch_.teacher.item, first, n, inverse, bias, tops_[i], e_ + t * ld_ + first);
        factors[i] = tile.of_e;
        entropies_[i] = tile.cross;
        top = max(tops_[i], top);
      }
      double total = 0., cross = 0.;
      for (int64_t i = 0; i < batch_.tiles; ++i) {
        const double d = (static_cast<double>(tops_[i]) - top) * (bias ? 1.f : inverse.high);
        const double scale = exp_nonpositive(static_cast<float>(d));
        total += factors[i] * scale;
        cross += (entropies_[i] + factors[i] * (d > -100. ? d : -100.)) * scale;
        tops_[i] = static_cast<float>(scale);
      }
      for (int64_t i = 0; i < batch_.tiles; ++i) factors[i] = static_cast<float>(tops_[i] / total);
      if (entropy) entropy[t * batch_.n + b] = static_cast<float>(log(total) - cross / total);
    }
  }

  // The losses' sum over pairs; stats [2, V, B]. kept, unless it is null: the exponentials go where float32 gradients
  // will be, for write_gradients.
  __attribute__((noinline)) double read_students(int64_t b, float* stats, const Crops* kept) {
    const int64_t views = batch_.student.views;
    for (int64_t v = 0; v < views; ++v) softmax_[v] = Softmax();
    for (int64_t i = 0; i < batch_.tiles; ++i) {
      const int64_t first = i * kTile, n = batch_.length(i);
      fill_q(i, true);
      for (int64_t step = 0; step < views; ++step) {
        const int64_t v = batch_.view(step, b);
        const char* const row = batch_.student.row(v, b);
        float mass;
        const float* const q = q_of(v, n, &mass);
        const float top = student_.top_of(row, first, n, 1.f, nullptr);
        const float inverse = batch_.student_inverse.high;
        float* const e = kept ? reinterpret_cast<float*>(kept->row(v, b)) + first : nullptr;
        const auto run = kept ? student_.kept_sums_of : student_.sums_of;
        student_tops_[v * batch_.tiles + i] = top;
        softmax_[v].add(top, run(row, batch_.student.item, first, n, inverse, top, q, e), mass, inverse);
      }
    }
    double loss = 0.;
    for (int64_t v = 0; v < views; ++v) {
      const Softmax& s = softmax_[v];
      if (const int64_t teachers = batch_.teachers_of(v)) loss += teachers * log(s.sum) - s.cross;
      stats[v * batch_.n + b] = s.top;
      stats[(views + v) * batch_.n + b] = static_cast<float>(s.sum);
    }
    return loss;
  }

  // scale: what each of the example's pairs counts. read: read_students has just been here; kept: with that.
  __attribute__((noinline)) void write_gradients(int64_t b, float scale, const float* stats, const Crops& gradients,
                                                 bool read, bool kept) {
    const int64_t views = batch_.student.views;
    const float inverse = batch_.student_inverse.high;
    scale *= inverse;
    for (int64_t i = 0; i < batch_.tiles; ++i) {
      const int64_t first = i * kTile, n = batch_.length(i);
      fill_q(i, false);
      for (int64_t step = 0; step < views; ++step) {
        const int64_t v = batch_.view(step, b);
        char* const to = gradients.row(v, b);
        const int64_t teachers = batch_.teachers_of(v);
        if (!teachers) {
          std::memset(to + first * gradients.item, 0, n * gradients.item);
          continue;
        }
        const float* const q = q_of(v, n, nullptr);
        const char* const x = batch_.student.row(v, b);
        float& top = student_tops_[v * batch_.tiles + i];
        if (!read) top = student_.top_of(x, first, n, 1.f, nullptr);
        const double d = (static_cast<double>(top) - stats[v * batch_.n + b]) * inverse;
        const float share = static_cast<float>(teachers) / stats[(views + v) * batch_.n + b];
        const float p = exp_nonpositive(static_cast<float>(d)) * share * scale;
        if (kept)
          gradient_in_place(reinterpret_cast<float*>(to) + first, n, p, q, scale);
        else
          student_.gradient(x, first, n, inverse, top, p, q, scale, to);
      }
    }
  }

 private:
  // q of tile i: each teacher's, and behind them their sum.
  void fill_q(int64_t i, bool with_mass) {
    const int64_t n = batch_.length(i), teachers = batch_.teacher.views;
    float* const all = q_ + teachers * kTile;
    for (int64_t t = 0; t < teachers; ++t) {
      const float *const e = e_ + t * ld_ + i * kTile, factor = factors_[t * batch_.tiles + i];
      float* const q = q_ + t * kTile;
      for (int64_t j = 0; j < n; j += kLanes) {
        const F v = load(e + j) * factor;
        store(q + j, v);
        store(all + j, t ? load(all + j) + v : v);
      }
    }
    all_mass_ = with_mass ? mass_of(all, n) : 0.f;
  }
  static float mass_of(const float* q, int64_t n) {
    F total[4]{};
    in_chains(n, [&](int64_t j, int k, int) { total[k] += load(q + j); });
    return sum(total);
  }

  // The sum of those that view v is paired with, and its sum over the tile, if that is asked for.
  const float* q_of(int64_t v, int64_t n, float* mass) {
    const int64_t teachers = batch_.teacher.views;
    const float* found = q_ + teachers * kTile;
    if (mass) *mass = all_mass_;
    if (batch_.teachers_of(v) == teachers) return found;
    if (teachers == 2) {
      found = q_ + (1 - v) * kTile;
    } else {
      float* const rest = q_ + (teachers + 1) * kTile;
      for (int64_t j = 0; j < round_up(n, kLanes); ++j) rest[j] = 0.f;
      for (int64_t t = 0; t < teachers; ++t)
        for (int64_t j = 0; j < n && t != v; j += kLanes) store(rest + j, load(rest + j) + load(q_ + t * kTile + j));
      found = rest;
    }
    if (mass) *mass = mass_of(found, n);
    return found;
  }

  const Batch& batch_;
  const int64_t ld_;
  Buffer<float> e_, factors_, tops_, entropies_, q_, student_tops_;
  Buffer<Softmax> softmax_;
  const Kernels student_, teacher_;
  float all_mass_ = 0.f;
};

void reduce(Tensor losses, bool mean, Tensor loss) {
  if (!loss) return;
  double total = 0.;
  for (int64_t b = 0; b < losses.numel; ++b) total += losses.as<float>()[b];
  *loss.as<float>() = static_cast<float>(mean ? total / static_cast<double>(losses.numel) : total);
}

void forward(Tensors student, Tensors teacher, double student_temp, double teacher_temp, Tensor bias, Tensor weights,
             Tensor index, bool same_view, bool mean, Tensor losses, Tensor loss, Tensor entropy, Tensor stats,
             Tensors gradients) {
  const Crops of_student(student), of_teacher(teacher);
  const Tensor& first = student.data[0];
  const Batch batch(of_student, of_teacher, first.sizes[1], first.sizes[2], student_temp, teacher_temp, bias, weights,
                    index, same_view, mean);
  const Crops to(gradients);
  const bool keeps = to.views && to.dtype == DType::f32;
  float* const out = losses.as<float>();
  parallel_parts(
      batch.n, [&] { return Example(batch); },
      [&](int64_t b, Example& example) {
        const float weight = batch.weight(b);
        example.read_teachers(b, entropy.as<float>());
        out[b] = static_cast<float>(example.read_students(b, stats.as<float>(), keeps ? &to : nullptr) * weight);
        if (to.views) example.write_gradients(b, weight * batch.each, stats.as<float>(), to, true, keeps);
      });
  reduce(losses, mean, loss);
}

void backward(Tensors student, Tensors teacher, double student_temp, double teacher_temp, Tensor bias, Tensor weights,
              Tensor index, bool same_view, bool mean, Tensor grad, Tensor stats, Tensors gradients) {
  const Crops of_student(student), of_teacher(teacher);
  const Tensor& first = student.data[0];
  const Batch batch(of_student, of_teacher, first.sizes[1], first.sizes[2], student_temp, teacher_temp, bias, weights,
                    index, same_view, mean);
  const Crops to(gradients);
  const float* const g = grad.as<float>();
  parallel_parts(
      batch.n, [&] { return Example(batch); },
      [&](int64_t b, Example& example) {
        example.read_teachers(b, nullptr);
        const float of_loss = grad.dim ? g[b] : g[0] * batch.each;
        example.write_gradients(b, batch.weight(b) * of_loss, stats.as<float>(), to, false, false);
      });
}

void features(Tensors student, Tensors teacher, Tensor prototypes, Tensor teacher_prototypes, bool unit, DType operand,
              double student_temp, double teacher_temp, Tensor bias, Tensor weights, Tensor index, bool same_view,
              bool mean, Tensor grad, Tensor losses, Tensor loss, Tensor entropy, Tensor d_student,
              Tensor d_prototypes) {
  const Crops of_student(student), of_teacher(teacher);
  const int64_t n = losses.numel, views = of_student.views, teachers = teacher_prototypes.dim ? of_teacher.views : 0;
  const int64_t crops = views > teachers ? views : teachers;
  const int64_t most = crops < LastLayer::kChunk ? LastLayer::kChunk / crops : 1;
  const int64_t chunks = n ? ceil_div(n, most) : 1, count = ceil_div(n, chunks);
  LastLayer layer(prototypes, unit, operand, views * count);
  LastLayer of_targets(teachers ? teacher_prototypes : prototypes, unit, operand, teachers * count);
  const bool differentiates = d_student.numel || d_prototypes.numel;
  Buffer<float> stats(2 * views * n);
  float *const out = losses.as<float>(), *const g = grad.as<float>();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * count, size = at_most(count, n - first);
    layer.multiply(views * size, [&](int64_t i, int64_t j, int lanes) {
      return load_as_float(of_student.row(i / size, first + i % size), of_student.dtype, j, lanes);
    });
    of_targets.multiply(teachers * size, [&](int64_t i, int64_t j, int lanes) {
      const int64_t b = first + i % size;
      const char* const row = of_teacher.row(i / size, index ? index.as<int64_t>()[b] : b);
      return load_as_float(row, of_teacher.dtype, j, lanes);
    });
    const Crops logits(layer.logits(), views, first, size, layer.ld);
    const Crops targets(of_targets.logits(), teachers, first, size, of_targets.ld);
    const Batch batch(logits, teachers ? targets : of_teacher, n, layer.k, student_temp, teacher_temp, bias, weights,
                      teachers ? Tensor{} : index, same_view, mean);
    parallel_tickets(
        size, [&] { return Example(batch); },
        [&](int64_t ticket, Example& example) {
          const int64_t b = first + ticket;
          const float weight = batch.weight(b);
          example.read_teachers(b, entropy.as<float>());
          out[b] = static_cast<float>(example.read_students(b, stats, differentiates ? &logits : nullptr) * weight);
          if (differentiates) example.write_gradients(b, weight * (g ? g[b] : batch.each), stats, logits, true, true);
        });
    if (!differentiates) continue;
    const auto row_of = [&](int64_t i) { return d_student.as<float>() + (i / size * n + first + i % size) * layer.d; };
    layer.differentiate(chunk + 1 == chunks, d_student.numel, row_of, d_prototypes);
  }
  reduce(losses, mean, loss);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>, together<backward>, together<features>};
}

}  // namespace sslops::prototypes
