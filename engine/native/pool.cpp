// The pool: one job at a time, whose tasks are claimed from a counter.
//
// A thread enters a job by counting itself in and then reading whether it is open; the owner closes
// it and then waits until nobody is inside. Both are sequentially consistent, so one of the two
// sees the other: no thread touches a job after its owner returned. A thread that wakes too late
// finds the job closed, and the owner has not waited for it.
#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace pool {
namespace {

// Longer than the Python between two kernels of a layer, shorter than anyone waits for a core.
constexpr auto SPIN = std::chrono::microseconds(50);

template <typename Done>
bool spin_until(const Done& done) {
    const auto end = std::chrono::steady_clock::now() + SPIN;
    do {
        for (int i = 0; i < 32; i++) {
            if (done()) return true;
            _mm_pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

struct Pool {
    std::mutex turn;  // held by the owner of the running job, or while threads change
    std::vector<std::thread> threads;

    Task task = nullptr;
    const void* body = nullptr;
    int64_t tasks = 0;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<uint32_t> job{0};  // counts jobs: a change wakes
    alignas(64) std::atomic<int> inside{0};
    std::atomic<bool> open{false};
    std::atomic<bool> stopping{false};

    std::mutex sleep;
    std::condition_variable wake, left;

    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(body, i);
    }

    void announce() {
        {
            const std::lock_guard<std::mutex> lock(sleep);
            job.fetch_add(1);
        }
        wake.notify_all();  // without a sleeper this is no system call
    }

    void serve(uint32_t seen) {
        for (;;) {
            const auto changed = [&] { return job.load() != seen; };
            if (!spin_until(changed)) {
                std::unique_lock<std::mutex> lock(sleep);
                wake.wait(lock, changed);
            }
            seen = job.load();
            if (stopping) return;
            inside.fetch_add(1);
            if (open) work();
            if (inside.fetch_sub(1) == 1) {
                const std::lock_guard<std::mutex> lock(sleep);
                left.notify_one();
            }
        }
    }

    void run(int64_t count, Task what, const void* with) {
        task = what, body = with, tasks = count;
        next.store(0);
        open = true;
        announce();
        work();
        open = false;
        const auto empty = [&] { return inside.load() == 0; };
        if (!spin_until(empty)) {
            std::unique_lock<std::mutex> lock(sleep);
            left.wait(lock, empty);
        }
    }

    void resize(size_t others) {
        if (others == threads.size()) return;
        stopping = true;
        announce();
        for (std::thread& thread : threads) thread.join();
        threads.clear();
        stopping = false;
        // Signals belong to Python's threads.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        for (size_t i = 0; i < others; i++) threads.emplace_back(&Pool::serve, this, job.load());
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
};

// Never destroyed: its threads sleep in it until the process ends.
Pool* current = new Pool;
std::atomic<int> count{1};

// A child of fork has the caller's thread only; what the others held is lost with them.
const int at_fork = pthread_atfork(nullptr, nullptr, [] {
    current = new Pool;
    count = 1;
});

struct Scratch {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(memory); }
};

}  // namespace

alignas(64) std::atomic<int64_t> done{0};

void set_threads(int threads) {
    const std::lock_guard<std::mutex> lock(current->turn);
    const int wanted = threads < 1 ? 1 : threads;
    current->resize(static_cast<size_t>(wanted - 1));
    count = wanted;
}

int threads() { return count.load(std::memory_order_relaxed); }

void* scratch(size_t bytes) {
    thread_local Scratch held;
    if (held.bytes < bytes) {
        std::free(held.memory);
        held.bytes = (bytes + 4095) / 4096 * 4096;
        held.memory = std::aligned_alloc(64, held.bytes);
        if (!held.memory) {
            held.bytes = 0;
            throw std::bad_alloc();
        }
    }
    return held.memory;
}

void run(int64_t tasks, Task task, const void* body) {
    // Two callers at once: the second does its work alone rather than wait for the first.
    const std::unique_lock<std::mutex> lock(current->turn, std::try_to_lock);
    if (lock) {
        current->run(tasks, task, body);
    } else {
        for (int64_t i = 0; i < tasks; i++) task(body, i);
    }
}

}  // namespace pool
