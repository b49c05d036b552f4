#include "pool.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <pthread.h>
#include <sched.h>

namespace {

// Longer than Python needs between two kernels, shorter than anybody notices.
constexpr auto SPIN = std::chrono::microseconds(400);

std::atomic<Pool *> pool{nullptr};
std::mutex making;

void forget() { pool.store(nullptr); }  // in a forked child: the threads are not there, and are left alone

// Whole CPUs that this process's control group may use, version 2 or 1; 0 without a limit. A container sees its own
// group at the root of the hierarchy.
int quota() {
    long long most = -1, period = 0;
    if (FILE *file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
        if (std::fscanf(file, "%lld %lld", &most, &period) != 2) most = -1;  // "max" is no number
        std::fclose(file);
    } else {
        auto number = [](const char *path, long long &out) {
            FILE *one = std::fopen(path, "r");
            if (!one) return;
            if (std::fscanf(one, "%lld", &out) != 1) out = -1;
            std::fclose(one);
        };
        number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", most);
        number("/sys/fs/cgroup/cpu/cpu.cfs_period_us", period);
    }
    return most > 0 && period > 0 ? static_cast<int>((most + period - 1) / period) : 0;
}

int wanted() {
    if (const char *text = std::getenv("QWENRUN_THREADS")) {
        const int count = std::atoi(text);
        if (count > 0) return count < 256 ? count : 256;
    }
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        const int allowed = CPU_COUNT(&set), paid = quota();
        return paid > 0 && paid < allowed ? paid : allowed;
    }
#endif
    const int count = static_cast<int>(std::thread::hardware_concurrency());
    return count > 0 ? count : 1;
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool &Pool::get() {
    Pool *found = pool.load(std::memory_order_acquire);
    if (found) return *found;
    std::lock_guard<std::mutex> lock(making);
    if (!pool.load()) {
        static std::once_flag once;
        std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget); });
        pool.store(new Pool(wanted()), std::memory_order_release);  // never destroyed: threads end with the process
    }
    return *pool.load();
}

Pool::Pool(int threads) {
    for (int i = 1; i < threads; ++i) {
        workers_.emplace_back([this] { work(); });
        workers_.back().detach();
    }
}

bool Pool::take_one() {
    int64_t left = left_.load(std::memory_order_acquire);
    while (left > 0) {
        if (left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {
            task_(context_, left - 1);
            done_.fetch_add(1, std::memory_order_release);
            return true;
        }
    }
    return false;
}

void Pool::run(int64_t count, Task task, void *context) {
    if (count <= 0) return;
    if (count == 1 || workers_.empty()) {
        for (int64_t i = 0; i < count; ++i) task(context, i);
        return;
    }
    std::lock_guard<std::mutex> lock(callers_);
    task_ = task;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    left_.store(count, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) {
        { std::lock_guard<std::mutex> sleepers(sleeping_); }
        wake_.notify_all();
    }
    while (take_one()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
        // A worker that has been put aside by the system needs the processor more than this loop does.
        if (spins < 2000) pause();
        else std::this_thread::yield();
    }
}

void Pool::work() {
    for (;;) {
        auto until = std::chrono::steady_clock::now() + SPIN;
        for (int spins = 0;; ++spins) {
            if (take_one()) {
                until = std::chrono::steady_clock::now() + SPIN;
                continue;
            }
            pause();
            if ((spins & 63) == 63 && std::chrono::steady_clock::now() > until) break;
        }
        std::unique_lock<std::mutex> lock(sleeping_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [this] { return left_.load(std::memory_order_seq_cst) > 0; });
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
}
