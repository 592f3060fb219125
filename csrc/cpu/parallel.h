// Teams of threads: `parallel` starts one, `each` shares a loop among its members and ends with a
// barrier. Work stealing: a member takes the indices of its static share first, the same in all
// loops of one length, so that its core's caches hold its earlier data; then those of other
// members. Since any member may get an index, an index must write only its own data; results then
// do not depend on the number of threads.
//
// Threads come from OpenMP, whose pool torch uses too. CKD_STD_THREADS replaces it by std::thread
// for ThreadSanitizer, which does not understand OpenMP's barriers.

#pragma once

#include "buffer.h"

#if defined(CKD_STD_THREADS)
#include <condition_variable>
#include <mutex>
#include <thread>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace ckd::cpu::CKD_TIER {

// Where adjacent work items share an operand, a loop runs over groups of them. More groups balance
// the load better, fewer read the operand less often.
constexpr int GROUPS_PER_THREAD = 2;

#if defined(CKD_STD_THREADS)

class Barrier {
 public:
  void wait(int size) {
    std::unique_lock<std::mutex> lock(mutex_);
    const long generation = generation_;
    if (++waiting_ == size) {
      waiting_ = 0;
      ++generation_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  long generation_ = 0;
};

#else

struct Barrier {
  void wait(int) {
#if defined(_OPENMP)
#pragma omp barrier
#endif
  }
};

#endif

class Team {
 public:
  explicit Team(int most) : most_(most), taken_(2 * most) { taken_.zero(); }

  struct alignas(64) Count {  // alone in its cache line
    std::int64_t n;
  };
  // How many indices of each member's share are taken. Double-buffered: while a loop uses one row
  // of counts, members clear their own count in the other for the next loop.
  Count* taken(int loop) const { return taken_ + loop % 2 * most_; }

  Barrier barrier;

 private:
  int most_;
  Buffer<Count> taken_;
};

struct Member {
  Team* team;
  int index, size, loops;
};
inline thread_local Member member;

// body(index) on at most `threads` threads.
template <class Body>
void parallel(int threads, const Body& body) {
  Team team(threads);
  const auto run = [&](int index, int size) {
    const Member outside = member;
    member = {&team, index, size, 0};
    body(index);
    member = outside;
  };
#if defined(CKD_STD_THREADS)
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i, threads);
  run(0, threads);
  for (auto& other : others) other.join();
#elif defined(_OPENMP)
  // Also with one thread: the barrier in `each` would otherwise be that of an enclosing team.
#pragma omp parallel num_threads(threads)
  run(omp_get_thread_num(), omp_get_num_threads());
#else
  run(0, 1);
#endif
}

template <class F>
void each(std::int64_t n, const F& f) {
  Member& me = member;
  Team::Count* taken = me.team->taken(me.loops);
  me.team->taken(++me.loops)[me.index].n = 0;
  for (int i = 0; i < me.size; ++i) {
    const int owner = (me.index + i) % me.size;
    const auto part = [&](int of) { return (n * of + me.size - 1) / me.size; };
    const std::int64_t first = part(owner), count = part(owner + 1) - first;
    std::int64_t& next = taken[owner].n;
    // Read before the atomic add: others' shares are mostly used up, and reads share the line.
    while (__atomic_load_n(&next, __ATOMIC_RELAXED) < count) {
      const std::int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item < count) f(first + item);
    }
  }
  me.team->barrier.wait(me.size);
}

}  // namespace ckd::cpu::CKD_TIER
