// Teams of threads: `parallel` starts one, `each` shares a loop among its members and waits for all
// of them. Who takes which index is left to chance, so an index may only write what is its own;
// then results do not depend on the number of threads.
//
// OpenMP, whose pool is torch's. CKD_STD_THREADS replaces it by std::thread for ThreadSanitizer,
// which cannot see into OpenMP's barriers.

#pragma once

#include <cstdint>

#if defined(CKD_STD_THREADS)
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace ckd::cpu::CKD_TIER {

// Into how many groups a loop is cut whose neighbouring items share an operand. More of them even
// out threads that are held up, fewer read the operand less often.
constexpr int GROUPS_PER_THREAD = 2;

#if defined(CKD_STD_THREADS)

struct StdTeam {
  std::mutex mutex;
  std::condition_variable changed;
  int size = 0, waiting = 0;
  long generation = 0;
  std::int64_t next = 0;
};
inline thread_local StdTeam* std_team = nullptr;

template <class Body>
void parallel(int threads, const Body& body) {
  StdTeam team;
  team.size = threads;
  const auto member = [&](int index) {
    std_team = &team;
    body(index);
    std_team = nullptr;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(member, i);
  member(0);
  for (auto& other : others) other.join();
}

template <class F>
void each(std::int64_t n, const F& f) {
  StdTeam& team = *std_team;
  for (;;) {
    std::unique_lock<std::mutex> lock(team.mutex);
    if (team.next >= n) break;
    const std::int64_t i = team.next++;
    lock.unlock();
    f(i);
  }
  std::unique_lock<std::mutex> lock(team.mutex);
  const long generation = team.generation;
  if (++team.waiting == team.size) {
    team.waiting = 0;
    team.next = 0;
    ++team.generation;
    team.changed.notify_all();
  } else {
    team.changed.wait(lock, [&] { return team.generation != generation; });
  }
}

#else

template <class Body>
void parallel(int threads, const Body& body) {
#if defined(_OPENMP)
  // A team even of one: `each` would otherwise join a team that the caller is a member of.
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num());
#else
  (void)threads;
  body(0);
#endif
}

template <class F>
void each(std::int64_t n, const F& f) {
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, 1)
#endif
  for (std::int64_t i = 0; i < n; ++i) f(i);
}

#endif

}  // namespace ckd::cpu::CKD_TIER
