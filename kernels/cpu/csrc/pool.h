// A persistent pool of threads for parallel loops of a few microseconds: workers spin briefly, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
public:
    using Task = void (*)(void *context, int64_t index);

    // The pool of this process, made on first use; after a fork the child makes its own.
    static Pool &get();
    int threads() const { return static_cast<int>(workers_.size()) + 1; }
    // Calls task(context, i) for i in 0..count-1, on all threads; returns when all are done. One loop at a time.
    void run(int64_t count, Task task, void *context);

    template <typename F> void each(int64_t count, F &&body) {
        run(count, [](void *f, int64_t i) { (*static_cast<std::remove_reference_t<F> *>(f))(i); }, &body);
    }

private:
    explicit Pool(int threads);
    void work();
    bool take_one();

    std::vector<std::thread> workers_;
    std::mutex callers_, sleeping_;
    std::condition_variable wake_;
    // How many tasks of the present loop nobody has taken. A thread takes one by counting down; while it has not
    // finished it the loop can't end, so task_ and context_ are those of the loop it took from.
    std::atomic<int64_t> left_{0};
    std::atomic<int64_t> done_{0};
    std::atomic<int> asleep_{0};
    Task task_ = nullptr;
    void *context_ = nullptr;
};
