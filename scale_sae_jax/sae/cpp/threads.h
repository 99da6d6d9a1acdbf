// Work in parts, on this thread and on those of XLA's pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace scale_sae {

struct Crew {
  std::mutex mutex;
  std::condition_variable idle;
  int64_t busy = 0;
  bool closed = false;
};

// work(Wide<...>(), begin, end) on parts of [0, count) that are `grain` long. It waits for threads
// at work alone: one that would start now may be waiting for another such call.
template <class Work>
void in_parallel(xla::ffi::ThreadPool& pool, int64_t count, int64_t grain, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto take_parts = [&] {
    for (int64_t begin; (begin = next.fetch_add(grain)) < count;)
      vectorised([&](auto wide) INLINE { work(wide, begin, std::min(begin + grain, count)); });
    finish_writing();
  };
  const auto crew = std::make_shared<Crew>();
  const int64_t others = std::min(pool.num_threads(), (count + grain - 1) / grain) - 1;
  for (int64_t i = 0; i < others; i++)
    pool.Schedule([crew, &take_parts] {
      std::unique_lock<std::mutex> lock(crew->mutex);
      if (crew->closed) return;
      crew->busy++;
      lock.unlock();
      take_parts();
      lock.lock();
      if (--crew->busy == 0) crew->idle.notify_one();
    });
  take_parts();
  std::unique_lock<std::mutex> lock(crew->mutex);
  crew->closed = true;
  crew->idle.wait(lock, [&] { return crew->busy == 0; });
}

}  // namespace scale_sae
