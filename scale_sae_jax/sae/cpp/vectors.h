// Rows of numbers, many columns at once: in vectors as wide as this processor has them.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define INLINE __attribute__((always_inline))

namespace scale_sae {

// ---- The processor ----

template <int BYTES>
struct Wide {
  typedef float Vector __attribute__((vector_size(BYTES)));
};

#if defined(__x86_64__)
template <class Work>
__attribute__((target("avx512f"))) void with_avx512(const Work& work) {
  work(Wide<64>());
}
template <class Work>
__attribute__((target("avx2,fma"))) void with_avx2(const Work& work) {
  work(Wide<32>());
}
#endif

#ifndef MOST_BYTES  // of a vector
#define MOST_BYTES 64
#endif

// work(Wide<...>()), compiled for this processor; `work` is INLINE, and all that it calls.
template <class Work>
void vectorised(const Work& work) {
#if defined(__x86_64__)
  if (MOST_BYTES >= 64 && __builtin_cpu_supports("avx512f")) return with_avx512(work);
  if (MOST_BYTES >= 32 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return with_avx2(work);
#endif
  work(Wide<16>());
}

// ---- Columns ----

// COUNT vectors V of columns; a V may be a single float.
template <class V, int COUNT>
struct Part {
  using Vector = V;
  static constexpr int count = COUNT;
  static constexpr int64_t step = sizeof(V) / sizeof(float);
  static constexpr int64_t columns = COUNT * step;
};

// work(part, its first column), for parts that make up all columns from `at` on: as many of the
// first kind as there is room for, then of the next. The last kind is of one column.
template <class First, class... Rest, class Work>
INLINE inline void over_columns(int64_t columns, const Work& work, int64_t at = 0) {
  for (; at + First::columns <= columns; at += First::columns) work(First(), at);
  if constexpr (sizeof...(Rest) > 0) over_columns<Rest...>(columns, work, at);
}

template <class V>
struct __attribute__((packed, may_alias)) InMemory {
  V value;
};
template <class V>
INLINE inline void load(const float* from, V& to) {
  to = reinterpret_cast<const InMemory<V>*>(from)->value;
}
template <class V>
INLINE inline void store(const V& from, float* to) {
  reinterpret_cast<InMemory<V>*>(to)->value = from;
}

// ---- Memory ----

// Whether so many are more than a last-level cache holds, for most processors.
inline bool exceeds_cache(size_t floats) { return floats >= size_t{8} << 20; }

// What goes through the cache is read there before it is written; what goes past it is not.
INLINE inline void write(const float* from, int64_t count, [[maybe_unused]] bool past_cache,
                         float* to) {
#if defined(__SSE__)
  if (past_cache && (reinterpret_cast<uintptr_t>(to) | count * sizeof(float)) % 16 == 0) {
    for (int64_t i = 0; i < count; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
    return;
  }
#endif
  std::copy_n(from, count, to);
}

// What this thread wrote past the cache comes before all it writes from now on.
inline void finish_writing() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// The numbers are on their way into the second-level cache when it returns.
INLINE inline void prefetch(const float* from, int64_t count) {
  constexpr int64_t line = 16;
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i, 0, 2);
}

}  // namespace scale_sae
