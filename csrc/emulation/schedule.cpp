#include "schedule.h"

#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <utility>

#include "runtime.h"

namespace ckd::emulation {
namespace {

enum class Schedule {
  ordered,  // every thread to its next wait, by number
  eager,    // every warp until it waits for others, in random order
  random,   // every warp for a few waits, in random order
};

Schedule schedule;
std::mt19937 random_numbers;

int random_below(int end) {
  return static_cast<int>(random_numbers() % static_cast<unsigned>(end));
}

template <class T>
void shuffle(std::vector<T>& items) {
  for (std::size_t i = items.size(); i > 1; --i) {
    std::swap(items[i - 1], items[random_numbers() % i]);
  }
}

bool run_fiber(Fiber& fiber) {
  if (fiber.state != State::ready) return false;
  current = &fiber;
  resume(fiber);
  current = nullptr;
  return true;
}

// Runs the lanes of a warp, each to its next wait, until none can go on or the rounds are over.
bool run_warp(std::vector<Fiber>& fibers, int warp, int rounds) {
  bool ran_any = false, ran = true;
  while (ran && rounds-- > 0) {
    ran = false;
    const int first = random_below(LANES), step = random_below(2) == 0 ? 1 : LANES - 1;
    for (int i = 0; i < LANES; ++i) {
      const int lane = (first + i * step) % LANES;
      ran |= run_fiber(fibers[static_cast<std::size_t>(warp * LANES + lane)]);
    }
    ran_any |= ran;
  }
  return ran_any;
}

}  // namespace

void read_schedule() {
  const char* name = std::getenv("CKD_EMULATION_SCHEDULE");
  const std::string wanted = name == nullptr ? "eager" : name;
  if (wanted == "ordered") {
    schedule = Schedule::ordered;
  } else if (wanted == "eager") {
    schedule = Schedule::eager;
  } else if (wanted == "random") {
    schedule = Schedule::random;
  } else {
    fail("CKD_EMULATION_SCHEDULE must be ordered, eager or random, got " + wanted, LAUNCH);
  }
  const char* seed = std::getenv("CKD_EMULATION_SEED");
  random_numbers.seed(seed == nullptr ? 0 : static_cast<unsigned>(std::atoll(seed)));
}

std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule != Schedule::ordered) shuffle(order);
  return order;
}

bool run_some(std::vector<Fiber>& fibers) {
  bool ran = false;
  if (schedule == Schedule::ordered) {
    for (Fiber& fiber : fibers) ran |= run_fiber(fiber);
    return ran;
  }
  std::vector<int> order(fibers.size() / LANES);
  std::iota(order.begin(), order.end(), 0);
  shuffle(order);
  constexpr int UNTIL_STUCK = 1 << 30;
  for (int warp : order) {
    ran |= run_warp(fibers, warp, schedule == Schedule::eager ? UNTIL_STUCK : 1 + random_below(4));
  }
  return ran;
}

}  // namespace ckd::emulation
