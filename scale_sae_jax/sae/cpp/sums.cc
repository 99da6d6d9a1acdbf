// Sums of rows: decoding, and the gradients of matrices from those latents alone that tokens use.
// `native.py` calls them.
//
//   T tokens with K slots each, D columns, L rows; N experts with M latents each
//
// Numbers are float32. Each sum is made on one thread, in one order.

#include <vector>

#include "threads.h"

namespace scale_sae {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32, 2>;
using Ids = ffi::Buffer<ffi::S32, 2>;
using Matrices = ffi::Buffer<ffi::F32, 3>;
using ffi::ThreadPool;

// The part of a row whose sums stay in registers.
template <class V>
using Widest = Part<V, 8>;
template <class V, class Work>
INLINE inline void over_parts(int64_t width, const Work& work) {
  over_columns<Widest<V>, Part<V, 1>, Part<float, 1>>(width, work);
}

// out = start + sum_i values[i] * row(i), in the columns of a part.
template <class P, class Row>
INLINE inline void add_rows(P, const float* start, int64_t terms, const float* values,
                            const Row& row, float* out) {
  typename P::Vector total[P::count], columns;
  for (int j = 0; j < P::count; j++) load(start + j * P::step, total[j]);
  for (int64_t i = 0; i < terms; i++) {
    const float* from = row(i);
    for (int j = 0; j < P::count; j++) {
      load(from + j * P::step, columns);
      total[j] += values[i] * columns;
    }
  }
  for (int j = 0; j < P::count; j++) store(total[j], out + j * P::step);
}

template <class V>
INLINE inline float dot(const float* a, const float* b, int64_t columns) {
  using Part = Part<V, 4>;
  V total[4] = {}, left, right;
  int64_t at = 0;
  for (; at + Part::columns <= columns; at += Part::columns)
    for (int j = 0; j < 4; j++) {
      load(a + at + j * Part::step, left);
      load(b + at + j * Part::step, right);
      total[j] += left * right;
    }
  const V all = (total[0] + total[1]) + (total[2] + total[3]);
  float sum = 0;
  for (int j = 0; j < Part::step; j++) sum += all[j];
  for (; at < columns; at++) sum += a[at] * b[at];
  return sum;
}

// ---- Sums over the rows that a token uses; an id beyond them is that of the last ----

// Rows of the ids `ahead`, if given, are on their way into the cache when it returns.
template <class V>
INLINE inline void sum_and_dots_of_token(const float* start, const float* values,
                                         const int32_t* ids, const int32_t* ahead, int64_t slots,
                                         const float* rows, int64_t latents, int64_t width,
                                         float* sum, float* dots) {
  const auto row = [&](const int32_t* id)
                       INLINE { return rows + std::clamp<int64_t>(*id, 0, latents - 1) * width; };
  over_parts<V>(width, [&](auto part, int64_t at) INLINE {
    const auto row_at = [&](int64_t k) INLINE { return row(ids + k) + at; };
    add_rows(part, start + at, slots, values, row_at, sum + at);
  });
  for (int64_t k = 0; k < slots; k++) {
    if (ahead) prefetch(row(ahead + k), width);
    dots[k] = dot<V>(sum, row(ids + k), width);
  }
}

// start [T, D], values and ids [T, K], rows [L, D] -> sum [T, D], dots [T, K]
ffi::Error sum_and_dots(ThreadPool pool, Floats start, Floats values, Ids ids, Floats rows,
                        ffi::Result<Floats> sum, ffi::Result<Floats> dots) {
  const int64_t tokens = ids.dimensions()[0], slots = ids.dimensions()[1];
  const int64_t latents = rows.dimensions()[0], width = rows.dimensions()[1];
  const bool far = exceeds_cache(rows.element_count());
  in_parallel(pool, tokens, 16, [&](auto wide, int64_t begin, int64_t end) INLINE {
    using V = typename decltype(wide)::Vector;
    for (int64_t t = begin; t < end; t++) {
      const int32_t* now = ids.typed_data() + t * slots;
      const int32_t* ahead = far && t + 1 < end ? now + slots : nullptr;
      sum_and_dots_of_token<V>(start.typed_data() + t * width, values.typed_data() + t * slots, now,
                               ahead, slots, rows.typed_data(), latents, width,
                               sum->typed_data() + t * width, dots->typed_data() + t * slots);
    }
  });
  return ffi::Error::Success();
}

// ---- Sums over the tokens that use a row ----

// The slots of each row in the order of their tokens: those of row l from start[l] to start[l + 1].
// An id that is no row's is left out.
struct Runs {
  std::vector<int64_t> start;
  std::vector<int32_t> tokens;
  std::vector<float> values;
};

Runs by_row(Floats values, Ids ids, int64_t latents) {
  const int64_t tokens = ids.dimensions()[0], slots = ids.dimensions()[1];
  const int32_t* id = ids.typed_data();
  const auto exists = [&](int64_t i) { return id[i] >= 0 && id[i] < latents; };
  Runs runs{std::vector<int64_t>(latents + 1), {}, {}};
  for (int64_t i = 0; i < tokens * slots; i++)
    if (exists(i)) runs.start[id[i] + 1]++;
  for (int64_t l = 0; l < latents; l++) runs.start[l + 1] += runs.start[l];
  runs.tokens.resize(runs.start[latents]);
  runs.values.resize(runs.start[latents]);
  std::vector<int64_t> next(runs.start.begin(), runs.start.end() - 1);
  for (int64_t i = 0; i < tokens * slots; i++)
    if (exists(i)) {
      const int64_t place = next[id[i]]++;
      runs.tokens[place] = i / slots;
      runs.values[place] = values.typed_data()[i];
    }
  return runs;
}

// start + the sum of values times rows of `grad` over the slots of row l, in the columns of a part.
template <class P>
INLINE inline void add_run(P part, const float* start, const Runs& runs, int64_t l,
                           const float* grad, int64_t width, float* out) {
  const int64_t first = runs.start[l];
  const auto row = [&](int64_t i) INLINE { return grad + runs.tokens[first + i] * width; };
  add_rows(part, start, runs.start[l + 1] - first, runs.values.data() + first, row, out);
}

template <class V>
INLINE inline void sum_of_row(const Runs& runs, int64_t l, const float* zeros, const float* grad,
                              int64_t width, bool past_cache, float* out) {
  over_parts<V>(width, [&](auto part, int64_t at) INLINE {
    constexpr int64_t columns = decltype(part)::columns;
    alignas(64) float sum[columns];
    add_run(part, zeros, runs, l, grad + at, width, sum);
    write(sum, columns, past_cache, out + at);
  });
}

// values and ids [T, K], grad [T, D] -> [L, D]
ffi::Error scatter(ThreadPool pool, Floats values, Ids ids, Floats grad, ffi::Result<Floats> out) {
  const int64_t latents = out->dimensions()[0], width = out->dimensions()[1];
  const Runs runs = by_row(values, ids, latents);
  const bool past_cache = exceeds_cache(out->element_count());
  in_parallel(pool, latents, 64, [&](auto wide, int64_t begin, int64_t end) INLINE {
    using V = typename decltype(wide)::Vector;
    const float zeros[Widest<V>::columns] = {};
    for (int64_t l = begin; l < end; l++)
      sum_of_row<V>(runs, l, zeros, grad.typed_data(), width, past_cache,
                    out->typed_data() + l * width);
  });
  return ffi::Error::Success();
}

// Latents whose sums wait in the cache until they are written as columns.
constexpr int64_t BLOCK = 32;

// start [D] -> out [D, M], of whose columns `count` belong to the latents from `first` on.
template <class V>
INLINE inline void sums_of_columns(const float* start, const Runs& runs, int64_t first,
                                   int64_t count, const float* x, int64_t width, int64_t latents,
                                   bool past_cache, float* out) {
  over_parts<V>(width, [&](auto part, int64_t at) INLINE {
    constexpr int64_t columns = decltype(part)::columns;
    constexpr int64_t stride = columns + 16;  // powers of two would share a place in the cache
    alignas(64) float sums[BLOCK * stride], line[BLOCK];
    for (int64_t j = 0; j < count; j++)
      add_run(part, start + at, runs, first + j, x + at, width, sums + j * stride);
    float* to = out + at * latents;
    for (int64_t d = 0; d < columns; d++) {
      for (int64_t j = 0; j < count; j++) line[j] = sums[j * stride + d];
      write(line, count, past_cache, to + d * latents);
    }
  });
}

// start [N, D], values and ids [T, K], x [T, D] -> [N, D, M]
ffi::Error scatter_columns(ThreadPool pool, Floats start, Floats values, Ids ids, Floats x,
                           ffi::Result<Matrices> out) {
  const int64_t experts = start.dimensions()[0], width = start.dimensions()[1];
  const int64_t latents = out->dimensions()[2], blocks = (latents + BLOCK - 1) / BLOCK;
  const Runs runs = by_row(values, ids, experts * latents);
  const bool past_cache = exceeds_cache(out->element_count());
  in_parallel(pool, experts * blocks, 2, [&](auto wide, int64_t begin, int64_t end) INLINE {
    using V = typename decltype(wide)::Vector;
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / blocks, m = i % blocks * BLOCK;
      sums_of_columns<V>(start.typed_data() + n * width, runs, n * latents + m,
                         std::min(BLOCK, latents - m), x.typed_data(), width, latents, past_cache,
                         out->typed_data() + n * width * latents + m);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(scale_sae_sum_and_dots, sum_and_dots,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ids>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    scale_sae_scatter, scatter,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Ids>().Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(scale_sae_scatter_columns, scatter_columns,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ids>()
                                  .Arg<Floats>()
                                  .Ret<Matrices>());

}  // namespace scale_sae
