// Shared memory and its checks; asynchronous copies, which are made when they are waited for.

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime.h"
#include "sanitizers.h"

namespace ckd::emulation {
namespace {

// More than any GPU has, for the red zones between the pieces.
constexpr std::size_t MAPPED = 512 << 10;
constexpr std::size_t PAST_END = 256;  // watched for writes past the end
constexpr int NAN_BYTE = 0xff;         // NaN in every floating-point type

unsigned char* shared;
std::size_t shared_bytes;

bool inside_shared(const void* address, std::size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(address);
  // Red zones push pieces past the end of the GPU's memory; AddressSanitizer checks bounds then.
  const std::size_t size = RED_ZONE > 0 ? MAPPED : shared_bytes;
  return first >= shared && first + bytes <= shared + size;
}

void check_shared(const void* address, const char* what, Site site) {
  if (!inside_shared(address, 16) || is_forbidden(address, 16)) {
    const auto offset = static_cast<const unsigned char*>(address) - shared;
    fail(std::string(what) + ": shared address out of range, at byte " + std::to_string(offset) +
             " of " + std::to_string(shared_bytes),
         site);
  }
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) {
    fail(std::string(what) + ": shared address is not a multiple of 16", site);
  }
}

}  // namespace

void begin_shared(int bytes) {
  if (shared == nullptr || FINDS_RACES) {
    // Mapped anew for each block, which ThreadSanitizer takes as unordered: see take_stacks.
    const int fixed = shared == nullptr ? 0 : MAP_FIXED;
    void* mapped =
        mmap(shared, MAPPED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
    if (mapped == MAP_FAILED) {
      std::perror("ckd emulation: shared memory");
      std::abort();
    }
    shared = static_cast<unsigned char*>(mapped);
  }
  shared_bytes = static_cast<std::size_t>(bytes);
  allow(shared, MAPPED);
  const Unseen unseen;
  std::memset(shared, NAN_BYTE, RED_ZONE > 0 ? MAPPED : shared_bytes + PAST_END);
  forbid(shared + shared_bytes, MAPPED - shared_bytes);
}

bool shared_overrun() {
  if (RED_ZONE > 0) return false;
  const unsigned char* end = shared + shared_bytes;
  return std::any_of(end, end + PAST_END, [](unsigned char byte) { return byte != NAN_BYTE; });
}

unsigned char* shared_begin() { return shared; }

unsigned char* carve(unsigned char* piece, std::size_t bytes, int used, Site site) {
  if (static_cast<std::size_t>(used) > shared_bytes) {
    fail("Carve takes " + std::to_string(used) + " bytes, of " + std::to_string(shared_bytes) +
             " that the launch gave",
         site);
  }
  unsigned char* next = piece + (bytes + 15) / 16 * 16 + RED_ZONE;
  if (!inside_shared(piece, static_cast<std::size_t>(next - piece))) {
    fail("Carve: more pieces than there is room for red zones", site);
  }
  allow(piece, bytes);
  forbid(piece + bytes, static_cast<std::size_t>(next - piece) - bytes);
  return next;
}

void read_shared_row(unsigned char (&row)[16], const void* address, Site site) {
  check_shared(address, "load_matrix", site);
  note_read(address, sizeof row);
  const Unseen unseen;
  std::memcpy(row, address, sizeof row);
}

void start_copy(void* to, const void* from, int bytes, Site site) {
  if (bytes < 0 || bytes > 16) fail("copy_async: bytes is not in 0 to 16", site);
  check_shared(to, "copy_async", site);
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    fail("copy_async: global address is not a multiple of 16", site);
  }
  if (bytes > 0 && is_forbidden(from, static_cast<std::size_t>(bytes))) {
    fail("copy_async: global address out of range", site);
  }
  note_write(to, 16);
  note_read(from, static_cast<std::size_t>(bytes));
  const Unseen unseen;
  std::memset(to, NAN_BYTE, 16);  // undefined while the copy is pending
  running()->open_copies.push_back({to, from, bytes});
}

void commit_copies() {
  const Unseen unseen;
  Fiber& fiber = *running();
  fiber.copy_groups.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}

void wait_copies(int newest) {
  auto& groups = running()->copy_groups;
  const auto end = groups.size() - std::min(groups.size(), static_cast<std::size_t>(newest));
  for (std::size_t i = 0; i < end; ++i) {
    for (const Copy& copy : groups[i]) {
      note_write(copy.shared, 16);
      const Unseen unseen;
      std::memset(copy.shared, 0, 16);
      std::memcpy(copy.shared, copy.global, static_cast<std::size_t>(copy.bytes));
    }
  }
  const Unseen unseen;
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(end));
}

}  // namespace ckd::emulation
