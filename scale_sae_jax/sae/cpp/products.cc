// Products of rows with the matrix of their expert. `native.py` calls them.
//
//   P rows of A numbers, in the order of their experts; N experts, with matrices of B columns
//
// Numbers are float32. Each sum is made on one thread, in one order. A matrix is read from memory
// while what was read before is multiplied; so a few rows an expert take little longer than many.

#include <type_traits>
#include <vector>

#include "threads.h"

namespace scale_sae {
namespace {

namespace ffi = xla::ffi;
using Rows = ffi::Buffer<ffi::F32, 2>;
using Numbers = ffi::Buffer<ffi::S32, 1>;
using Matrices = ffi::Buffer<ffi::F32, 3>;

// A block of a matrix, of so many rows (`depth`) and the columns of a part. The first rows that are
// multiplied by it take it from the matrix, and pack it; it is in the first-level cache for the
// others. Meanwhile the block `next` is fetched.
struct Block {
  const float* from;
  const float* next;
  int64_t width;
  int64_t depth;
  float* packed;
};
constexpr int64_t PACKED = 1 << 12;  // numbers

// out[r] += sum_a rows[r][at + a] * block[a] for r < ROWS, in the columns of a part; the sums stay
// in registers. `first`: out is 0 so far.
template <class P, int ROWS, bool PACK>
INLINE inline void multiply(P, const float* const* rows, int64_t at, const Block& block, bool first,
                            float* out) {
  typename P::Vector sums[ROWS][P::count] = {}, columns[P::count];
  if (!first)
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < P::count; j++) load(out + r * block.width + j * P::step, sums[r][j]);
  const float* row[ROWS];
  for (int r = 0; r < ROWS; r++) row[r] = rows[r] + at;
  for (int64_t a = 0; a < block.depth; a++) {
    float* packed = block.packed + a * P::columns;
    for (int j = 0; j < P::count; j++) {
      load((PACK ? block.from + a * block.width : packed) + j * P::step, columns[j]);
      if (PACK) store(columns[j], packed + j * P::step);
    }
    if (PACK) prefetch(block.next + a * block.width, P::columns);
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < P::count; j++) sums[r][j] += row[r][a] * columns[j];
  }
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < P::count; j++) store(sums[r][j], out + r * block.width + j * P::step);
}

// rows [COUNT], w [A, B] -> out [COUNT, B]
template <class V>
INLINE inline void product(const float* const* rows, int64_t count, const float* w, int64_t inner,
                           int64_t width, float* out) {
  using Panel = Part<V, 2>;
  constexpr int64_t depth = PACKED / Panel::columns;
  alignas(64) float packed[PACKED];
  for (int64_t a = 0; a < inner; a += depth) {
    const float* here = w + a * width;
    const float* below = a + depth < inner ? here + depth * width : here;
    const auto columns = [&](auto part, int64_t b) INLINE {
      using P = decltype(part);
      const float* next = b + P::columns < width ? here + b + P::columns : below;
      const Block block{here + b, next, width, std::min(depth, inner - a), packed};
      int64_t r = 0;
      const auto tiles = [&](auto size) INLINE {
        for (; r + size() <= count; r += size()) {
          float* to = out + r * width + b;
          if (r == 0)
            multiply<P, size(), true>(part, rows, a, block, a == 0, to);
          else
            multiply<P, size(), false>(part, rows + r, a, block, a == 0, to);
        }
      };
      tiles(std::integral_constant<int, 6>());
      tiles(std::integral_constant<int, 4>());
      tiles(std::integral_constant<int, 2>());
      tiles(std::integral_constant<int, 1>());
    };
    over_columns<Panel, Part<V, 1>, Part<float, 1>>(width, columns);
  }
}

// x [R, A], index [P], w [N, A, B], sizes [N] -> [P, B]
ffi::Error grouped_dot(ffi::ThreadPool pool, Rows x, Numbers index, Matrices w, Numbers sizes,
                       ffi::Result<Rows> out) {
  const int64_t pairs = index.element_count(), last = x.dimensions()[0] - 1;
  const int64_t experts = w.dimensions()[0], inner = w.dimensions()[1], width = w.dimensions()[2];
  struct Run {
    int64_t expert, begin, count;
  };
  constexpr int64_t LONGEST = 96;  // rows that a matrix is read for
  std::vector<Run> runs;
  int64_t end = 0;
  for (int64_t n = 0; n < experts; n++) {
    int64_t left = std::clamp<int64_t>(sizes.typed_data()[n], 0, pairs - end);
    for (int64_t count; (count = std::min(left, LONGEST)) > 0; left -= count, end += count)
      runs.push_back({n, end, count});
  }
  in_parallel(pool, runs.size(), 1, [&](auto wide, int64_t i, int64_t) INLINE {
    const Run run = runs[i];
    const float* rows[LONGEST];
    for (int64_t r = 0; r < run.count; r++) {
      const int64_t row = index.typed_data()[run.begin + r];
      rows[r] = x.typed_data() + std::clamp<int64_t>(row, 0, last) * inner;
    }
    product<typename decltype(wide)::Vector>(rows, run.count,
                                             w.typed_data() + run.expert * inner * width, inner,
                                             width, out->typed_data() + run.begin * width);
  });
  std::fill_n(out->typed_data() + end * width, (pairs - end) * width, 0.0f);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(scale_sae_grouped_dot, grouped_dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Rows>()
                                  .Arg<Numbers>()
                                  .Arg<Matrices>()
                                  .Arg<Numbers>()
                                  .Ret<Rows>());

}  // namespace scale_sae
