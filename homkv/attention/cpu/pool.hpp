// Threads that sleep between calls. The caller works too and waits for tasks, never for a worker that has not woken
// up: on a busy machine a late worker costs nothing.
#ifndef HOMKV_POOL_HPP
#define HOMKV_POOL_HPP
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace homkv {

class Pool {
 public:
  using Function = void (*)(void* context, int task);

  // Calls function(context, 0 .. tasks - 1) on up to `threads` threads. One call at a time; a second caller works alone.
  void run(int tasks, int threads, Function function, void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (threads <= 1 || tasks <= 1 || !turn.owns_lock()) {
      for (int i = 0; i < tasks; i++) function(context, i);
      return;
    }
    const uint32_t epoch = publish(tasks, threads, function, context);
    wake_.notify_all();
    drain(epoch, tasks, function, context);
    while (done_.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
  }

 private:
  uint32_t publish(int tasks, int threads, Function function, void* context) {
    std::lock_guard<std::mutex> lock(state_);
    function_ = function, context_ = context, tasks_ = tasks, helpers_ = threads - 1;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store((uint64_t)++epoch_ << 32, std::memory_order_release);
    for (; workers_ < threads - 1; workers_++) {
      try {
        std::thread([this, id = workers_] { work(id); }).detach();
      } catch (const std::system_error&) {
        break;  // no more threads to be had: the caller does the work
      }
    }
    return epoch_;
  }

  void work(int id) {
    for (uint32_t seen = 0;;) {
      std::unique_lock<std::mutex> lock(state_);
      wake_.wait(lock, [&] { return epoch_ != seen; });
      seen = epoch_;
      const Function function = function_;
      void* context = context_;
      const int tasks = id < helpers_ ? tasks_ : 0;
      lock.unlock();
      drain(seen, tasks, function, context);
    }
  }

  // The epoch in the ticket keeps a worker that slept through its call from touching the next one's tasks.
  void drain(uint32_t epoch, int tasks, Function function, void* context) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while ((uint32_t)(ticket >> 32) == epoch && (int)(uint32_t)ticket < tasks) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      function(context, (int)(uint32_t)ticket);
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  std::mutex turn_, state_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};  // epoch << 32 | next task
  std::atomic<int> done_{0};
  int tasks_ = 0, helpers_ = 0, workers_ = 0;
  uint32_t epoch_ = 0;
  Function function_ = nullptr;
  void* context_ = nullptr;
};

// Leaked on purpose: workers may outlive main(). A forked child has no workers and perhaps a locked mutex, so it starts
// with a new pool.
inline Pool*& pool() {
  static Pool* instance = [] {
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
    return new Pool;
  }();
  return instance;
}

template <class F>
void run_tasks(int tasks, int threads, F& body) {
  pool()->run(tasks, threads, [](void* context, int task) { (*(F*)context)(task); }, &body);
}

}  // namespace homkv
#endif
