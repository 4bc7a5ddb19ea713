#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace zsaq {

namespace {

// Workers look for the next task for a short while before they sleep: the layers of a model follow closely.
constexpr int kLooks = 2000;

inline void pause() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  std::mutex owner;  // of the caller that shares work now

  void run(int32_t threads, int64_t pieces, const std::function<void(int64_t)>& work) {
    while (static_cast<int32_t>(workers_.size()) < threads - 1) {
      const int index = static_cast<int>(workers_.size());
      workers_.emplace_back([this, index, seen = round_.load()] { serve(index, seen); });
    }
    work_ = &work;
    pieces_ = pieces;
    next_ = 0;
    active_ = threads - 1;
    busy_ = static_cast<int32_t>(workers_.size());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++round_;
    }
    wake_.notify_all();
    take();
    while (busy_.load(std::memory_order_acquire)) pause();
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
      ++round_;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

 private:
  void take() {
    for (int64_t piece; (piece = next_.fetch_add(1)) < pieces_;) (*work_)(piece);
  }

  void serve(int index, uint64_t seen) {
    for (;;) {
      for (int look = 0; look < kLooks && round_.load(std::memory_order_acquire) == seen; ++look) pause();
      if (round_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load() != seen; });
      }
      seen = round_.load(std::memory_order_acquire);
      if (ending_) return;
      if (index < active_) take();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int32_t> busy_{0};
  const std::function<void(int64_t)>* work_ = nullptr;
  int64_t pieces_ = 0;
  int32_t active_ = 0;
  bool ending_ = false;
};

// Never destroyed: at exit, and in the child of a fork, its threads are gone already.
Pool* pool = nullptr;
std::mutex making;

Pool* the_pool() {
  std::lock_guard<std::mutex> lock(making);
  if (!pool) {
    pool = new Pool;
#if !defined(_WIN32)
    static bool watched = false;
    if (!watched) pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
    watched = true;
#endif
  }
  return pool;
}

}  // namespace

void share(int32_t threads, int64_t pieces, const std::function<void(int64_t)>& work) {
  if (threads > 1) {
    Pool* shared = the_pool();
    if (shared->owner.try_lock()) {
      std::lock_guard<std::mutex> owned(shared->owner, std::adopt_lock);
      shared->run(threads, pieces, work);
      return;
    }
  }
  for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
}

}  // namespace zsaq
