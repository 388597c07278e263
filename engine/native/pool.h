// A few threads that share one kernel's work, and sleep between kernels.
//
//     pool::parallel_for(tasks, [&](int64_t i) { ... });
//
// runs every i of [0, tasks) once, in any order, on the caller and on the pool's threads, and
// returns when all are done. Tasks are claimed one by one, so make them a few times as many as
// threads where their cost differs, and large (> 10 us) against the ~1 us that a hand-over takes.
// A task must not start another parallel_for; an exception in it ends the process.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace pool {

// How many threads a parallel_for has, the caller included. With one there is no other thread.
// New threads inherit the caller's CPU affinity: pin first. Waits for a running parallel_for.
void set_threads(int threads);
int threads();

// This thread's scratch memory, 64-byte aligned, contents arbitrary; valid until the thread asks
// again. Throws bad_alloc.
void* scratch(size_t bytes);

// Tasks done by all parallel_for until now. It moves while the longest kernel goes on.
extern std::atomic<int64_t> done;

using Task = void (*)(const void* body, int64_t i);
void run(int64_t tasks, Task task, const void* body);

template <typename Body>
void parallel_for(int64_t tasks, const Body& body) {
    if (tasks <= 1 || threads() == 1) {
        for (int64_t i = 0; i < tasks; i++) {
            body(i);
            done.fetch_add(1, std::memory_order_relaxed);
        }
        return;
    }
    const Task task = [](const void* each, int64_t i) noexcept {
        (*static_cast<const Body*>(each))(i);
        done.fetch_add(1, std::memory_order_relaxed);
    };
    run(tasks, task, &body);
}

}  // namespace pool
