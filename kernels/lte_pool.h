// A few threads that wait without spinning, for lte_ffn.cpp. OpenMP is not used: two runtimes in one
// process (torch brings its own) spin against each other, which was measured to cost a factor of 50.
#pragma once

namespace lte {

class Pool {
 public:
  explicit Pool(int workers) : owner_(getpid()) {
    for (int i = 0; i < workers; ++i) threads_.emplace_back([this, i] { work(i + 1); });
    for (std::thread& thread : threads_) thread.detach();
  }
  int size() const { return int(threads_.size()) + 1; }
  bool usable() const { return owner_ == getpid(); }  // threads do not survive a fork

  void run(int parts, const std::function<void(int)>& task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      parts_ = parts;
      left_ = parts - 1;
      ++round_;
    }
    wake_.notify_all();
    task(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
    task_ = nullptr;
  }

 private:
  void work(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (index >= parts_ || !task_) continue;
      const std::function<void(int)>* task = task_;
      lock.unlock();
      (*task)(index);
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  const pid_t owner_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* task_ = nullptr;
  uint64_t round_ = 0;
  int parts_ = 0, left_ = 0;
};

// Run task(0..parts-1), on the pool where it is free; a second caller meanwhile runs its parts alone.
static void parallel(int parts, const std::function<void(int)>& task) {
  static std::mutex busy;
  static Pool* pool = nullptr;  // never freed: its threads may still wait when the process ends
  std::unique_lock<std::mutex> lock(busy, std::try_to_lock);
  if (parts > 1 && lock.owns_lock()) {
    if (!pool || !pool->usable() || pool->size() < parts) pool = new Pool(parts - 1);
    pool->run(parts, task);
    return;
  }
  for (int part = 0; part < parts; ++part) task(part);
}

}  // namespace lte
