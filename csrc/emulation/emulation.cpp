// Launches (blocks run one after another, their threads as fibers), barriers and collectives.

#include "emulation.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#include "runtime.h"
#include "sanitizers.h"
#include "schedule.h"

namespace ckd::emulation {

Thread* current;
uint3 block_index;
dim3 block_size, grid_size;

namespace {

// Tells ThreadSanitizer what barriers order. They alternate between two addresses: a thread that is
// already at the next barrier must not be ordered before one that has yet to leave this one.
struct Ordering {
  char address[2];
  int turn = 0;
};

struct Warp {
  Exchange exchange;
  Collective collective = {};
  Site site = {"", 0};
  int arrived = 0, at_block_barrier = 0, returned = 0;
  Ordering ordering;
};

// The state of the running launch and block. Only one runs at a time.
const char* kernel = "";
void (*body)(const void*);
const void* body_context;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Site barrier_site = {"", 0};
std::size_t at_barrier, returned;
std::unique_ptr<Ordering> block_ordering;
char end_of_launch;

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

Fiber* lane_in(int warp, State state) {
  const auto first = fibers.begin() + warp * LANES;
  const auto found =
      std::find_if(first, first + LANES, [&](const Fiber& f) { return f.state == state; });
  return found == first + LANES ? nullptr : &*found;
}

void set_states(std::vector<Fiber>::iterator first, std::size_t count, State state) {
  for (std::size_t i = 0; i < count; ++i) first[static_cast<std::ptrdiff_t>(i)].state = state;
}

// A lane that waits for its warp waits forever if another one waits elsewhere or has returned.
void check_convergence(const Warp& warp, int number, const char* what, Site site) {
  const auto blame = [&](State state, const char* does) {
    const Fiber* other = lane_in(number, state);
    if (other == nullptr) return;
    const std::string where = state == State::returned ? "" : " at " + place(other->site);
    fail(std::string("divergence: ") + what + " while thread " + text(other->index) +
             " of the same warp " + does + where,
         site);
  };
  if (warp.at_block_barrier > 0) blame(State::at_block_barrier, "waits in sync_block");
  if (warp.returned > 0) blame(State::returned, "has returned");
}

void finish_thread(Fiber& fiber) {
  Warp& warp = warps[static_cast<std::size_t>(fiber.warp)];
  if (at_barrier > 0) {
    fail("early return: a thread returns while " + std::to_string(at_barrier) +
             " threads wait in sync_block",
         barrier_site);
  }
  if (warp.arrived > 0) {
    fail(std::string("early return: a thread returns while lanes of its warp wait in ") +
             warp.collective.name,
         warp.site);
  }
  fiber.state = State::returned;
  ++warp.returned;
  ++returned;
}

void run_thread() {
  entered();
  Fiber& fiber = *running();
  body(body_context);
  release(end_of_launch);  // the launch waits for all of them
  finish_thread(fiber);
  suspend(fiber, true);
  std::abort();
}

void run_block(int shared_bytes) {
  begin_shared(shared_bytes);
  at_barrier = returned = 0;
  // Allocated anew for each block, since ThreadSanitizer forgets releases in freed memory:
  // otherwise a barrier would order its block after earlier blocks.
  block_ordering = std::make_unique<Ordering>();
  warps = std::vector<Warp>(fibers.size() / LANES);
  for (std::size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    const auto number = static_cast<unsigned>(i);
    fiber.index = {number % block_size.x, number / block_size.x % block_size.y,
                   number / block_size.x / block_size.y};
    fiber.lane = static_cast<int>(i) % LANES;
    fiber.warp = static_cast<int>(i) / LANES;
    fiber.state = State::ready;
    fiber.open_copies.clear();
    fiber.copy_groups.clear();
  }
  prepare(fibers, run_thread);
  while (returned < fibers.size()) {
    if (run_some(fibers)) continue;
    const auto stuck = std::find_if(fibers.begin(), fibers.end(),
                                    [](const Fiber& f) { return f.state != State::returned; });
    current = &*stuck;
    fail(std::string("deadlock: waits forever in ") + stuck->wait, stuck->site);
  }
  if (shared_overrun()) fail("shared memory was written past its end", LAUNCH);
}

}  // namespace

Fiber* running() { return static_cast<Fiber*>(current); }

std::string place(Site site) {
  return site.line == 0 ? site.file : std::string(site.file) + ":" + std::to_string(site.line);
}

void fail(const std::string& what, Site site) {
  std::string name = kernel;
  if (name.front() == '(') name = name.substr(1, name.size() - 2);  // (name<A, B>)
  std::fprintf(stderr, "ckd emulation: %s\n  kernel %s, at %s, block %s, thread %s\n", what.c_str(),
               name.c_str(), place(site).c_str(), text(block_index).c_str(),
               current == nullptr ? "none" : text(current->index).c_str());
  print_stack();
  std::abort();
}

void wait_for_block(Site site) {
  const Unseen unseen;
  Fiber& fiber = *running();
  Warp& warp = warps[static_cast<std::size_t>(fiber.warp)];
  if (warp.arrived > 0) {
    fail(std::string("divergence: sync_block while lanes of the same warp wait in ") +
             warp.collective.name + " at " + place(warp.site),
         site);
  }
  if (returned > 0) fail("early return: sync_block after a thread of the block returned", site);
  if (at_barrier > 0 && !same(site, barrier_site)) {
    fail("divergence: sync_block while other threads wait in the one at " + place(barrier_site),
         site);
  }
  fiber.site = barrier_site = site;
  fiber.wait = "sync_block";
  fiber.state = State::at_block_barrier;
  ++warp.at_block_barrier;
  char& ordering = block_ordering->address[block_ordering->turn];
  release(ordering);
  if (++at_barrier == fibers.size()) {
    at_barrier = 0;
    block_ordering->turn ^= 1;
    for (Warp& each : warps) each.at_block_barrier = 0;
    set_states(fibers.begin(), fibers.size(), State::ready);
  }
  suspend(fiber);
  acquire(ordering);
}

void wait_for_warp(const Collective& collective, const void* in, std::size_t in_bytes, void* out,
                   std::size_t out_bytes, Site site) {
  const Unseen unseen;
  Fiber& fiber = *running();
  Warp& warp = warps[static_cast<std::size_t>(fiber.warp)];
  check_convergence(warp, fiber.warp, collective.name, site);
  if (warp.arrived == 0) {
    warp.collective = collective;
    warp.site = site;
  } else if (collective.compute != warp.collective.compute || !same(site, warp.site)) {
    fail(std::string("divergence: ") + collective.name + " while lanes of the same warp wait in " +
             warp.collective.name + " at " + place(warp.site),
         site);
  } else if (collective.argument != warp.collective.argument) {
    fail(std::string(collective.name) + ": lanes give different masks", site);
  }
  fiber.site = site;
  fiber.wait = collective.name;
  if (in_bytes > 0) std::memcpy(warp.exchange.in[fiber.lane], in, in_bytes);
  const bool orders = collective.order == Order::memory;
  char& ordering = warp.ordering.address[warp.ordering.turn];
  if (orders) release(ordering);
  fiber.state = State::in_collective;
  if (++warp.arrived == LANES) {
    collective.compute(warp.exchange, collective.argument);
    warp.arrived = 0;
    if (orders) warp.ordering.turn ^= 1;
    set_states(fibers.begin() + fiber.warp * LANES, LANES, State::ready);
    if (orders) suspend(fiber);  // otherwise the last lane would always go on first
  } else {
    suspend(fiber);
  }
  if (orders) acquire(ordering);
  if (out_bytes > 0) std::memcpy(out, warp.exchange.out[fiber.lane], out_bytes);
}

int run(const char* name, dim3 grid, dim3 block, int shared_bytes, void (*thread)(const void*),
        const void* context) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  constexpr unsigned MAX_THREADS = 1024, MAX_GRID = 65535;
  constexpr int MAX_SHARED = 227 << 10;
  const unsigned threads = block.x * block.y * block.z;
  kernel = name;
  block_index = {};
  if (threads == 0 || threads > MAX_THREADS || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > MAX_GRID || grid.z > MAX_GRID) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes < 0 || shared_bytes > MAX_SHARED) return cudaErrorInvalidValue;
  if (threads % LANES != 0) fail("blocks must be whole warps of 32 threads", LAUNCH);
  read_schedule();
  body = thread;
  body_context = context;
  block_size = block;
  grid_size = grid;
  fibers.resize(threads);

  for (unsigned number : block_order(grid.x * grid.y * grid.z)) {
    block_index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    run_block(shared_bytes);
  }
  acquire(end_of_launch);
  return cudaSuccess;
}

}  // namespace ckd::emulation
