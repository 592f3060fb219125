// Golden vectors of csrc/cuda/device.cuh: every wrapper, on a GPU and in the emulation.
//
//     wrappers                  prints the vectors
//     wrappers check FILE       compares; exits with 1 where they differ, and says what does
//
// tests/emulation/wrappers.golden is what the emulation prints (docs/emulation.md). The first
// letter of a line says how its 32-bit words are compared: `=` bit by bit, `u` as float32 to 2.5
// units in the last place, `s` and `l` as sums of tensor cores, to 1e-6 and 1e-3 of their size. It
// prints how many sums have equal bits: on an H100 all 1,029, since the emulation's `truncated`
// sums as it does; other GPUs sum differently.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/device.cuh"

namespace {

using namespace ckd::cuda;

using Word = std::uint32_t;
constexpr int WARP = 32;

void require(int error, const char* what) {
  if (error == 0) return;
  std::printf("cudaError %d in %s\n", error, what);
  std::exit(2);
}

// Device memory, initialised from a vector.
template <class T>
class Device {
 public:
  explicit Device(const std::vector<T>& from) : count_(from.size()) {
    const std::size_t bytes = count_ * sizeof(T);
#ifdef CKD_EMULATION
    data = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    std::memcpy(data, from.data(), bytes);
#else
    require(cudaMalloc(&data, bytes), "cudaMalloc");
    require(cudaMemcpy(data, from.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
#endif
  }
  ~Device() {
#ifdef CKD_EMULATION
    std::free(data);
#else
    cudaFree(data);
#endif
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  std::vector<T> get() const {
    std::vector<T> to(count_);
#ifdef CKD_EMULATION
    std::memcpy(to.data(), data, count_ * sizeof(T));
#else
    require(cudaMemcpy(to.data(), data, count_ * sizeof(T), cudaMemcpyDeviceToHost), "a kernel");
#endif
    return to;
  }

  T* data;

 private:
  std::size_t count_;
};

// 16 rows of 64 elements in the layout of a Tile, loaded both straight and transposed.
CKD_KERNEL void matrices(const std::uint16_t* from, Word* to) {
  CKD_SHARED(memory);
  Carve carve(memory);
  std::uint16_t* tile = carve.take<std::uint16_t>(16 * 64);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 16 * 64; i += WARP) {
    const int row = i / 64, column = i % 64;
    tile[row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8] = from[i];
  }
  sync_warp();
  for (int column = 0; column < 64; column += 16) {
    const int row = lane % 16, piece = column / 8 + lane / 16;
    const SharedAddress at = shared_address(tile) + row * 128 + (piece ^ (row % 8)) * 16;
    std::uint32_t straight[4], transposed[4];
    load_matrix(straight, at);
    load_matrix_transposed(transposed, at);
    for (int i = 0; i < 4; ++i) {
      to[((column / 8 + 0) * WARP + lane) * 4 + i] = straight[i];
      to[((column / 8 + 1) * WARP + lane) * 4 + i] = transposed[i];
    }
  }
}

// c += a b, `times` times, for fragments in memory.
template <class T>
CKD_KERNEL void products(const Word* a, const Word* b, float* c, int times) {
  const int lane = static_cast<int>(threadIdx.x);
  std::uint32_t x[4];
  float sums[4];
  for (int e = 0; e < 4; ++e) x[e] = a[lane * 4 + e], sums[e] = c[lane * 4 + e];
  for (int n = 0; n < times; ++n) multiply_add<T>(sums, x, b[lane * 2], b[lane * 2 + 1]);
  for (int e = 0; e < 4; ++e) c[lane * 4 + e] = sums[e];
}

// Copies of 0 to 16 bytes in three groups; the rest of the 16 becomes zero.
CKD_KERNEL void copies(const unsigned char* from, Word* to) {
  CKD_SHARED(memory);
  Carve carve(memory);
  Word* pieces = carve.take<Word>(WARP * 4);
  const int lane = static_cast<int>(threadIdx.x), group = lane % 3;
  const int bytes = lane <= 16 ? lane : lane % 8 * 2;
  for (int i = 0; i < 4; ++i) pieces[lane * 4 + i] = 0xeeeeeeeeu;
  sync_warp();
  for (int g = 0; g < 3; ++g) {
    if (group == g) copy_async(shared_address(pieces + lane * 4), from + lane * 16, bytes);
    commit_copies();
  }
  const auto store_own = [&] {
    for (int i = 0; i < 4; ++i) to[lane * 4 + i] = pieces[lane * 4 + i];
  };
  wait_copies<2>();
  if (group == 0) store_own();
  wait_copies<1>();
  if (group == 1) store_own();
  wait_copies<0>();
  if (group == 2) store_own();
  sync_warp();
  const int other = (lane + 1) % WARP;  // another thread's copy, after the barrier
  for (int i = 0; i < 4; ++i) to[128 + lane * 4 + i] = pieces[other * 4 + i];
}

CKD_KERNEL void powers(const float* x, float* to, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += WARP) to[i] = exp2_fast(x[i]);
}

CKD_KERNEL void shuffles(Word* to) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 5; ++i) {
    to[i * WARP + lane] = shuffle_xor(static_cast<Word>(lane * 7 + i), 1 << i);
  }
}

// Votes of one lane, of none and of all.
CKD_KERNEL void votes(Word* to) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < WARP; ++i) to[i * WARP + lane] = any_of_warp(lane == i);
  to[WARP * WARP + lane] = any_of_warp(lane > WARP);
  to[(WARP + 1) * WARP + lane] = any_of_warp(true);
}

CKD_KERNEL void maxima(const float* x, float* largest, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) atomic_max(largest, x[i]);
}

// The last block to arrive must see and add what all blocks wrote, as `combine` does.
CKD_KERNEL void last_block(int* values, int* counter, int* sum, int seed) {
  CKD_SHARED(memory);
  Carve carve(memory);
  int* last = carve.take<int>(4);
  int* parts = carve.take<int>(128);
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  values[block * 128 + thread] = seed + block + thread;
  sync_block();
  if (thread == 0) *last = arrive(counter) == static_cast<int>(gridDim.x) - 1;
  sync_block();
  if (*last == 0) return;
  int own = 0;
  for (int i = 0; i < static_cast<int>(gridDim.x); ++i) own += values[i * 128 + thread];
  parts[thread] = own;
  sync_block();
  if (thread != 0) return;
  int all = 0;
  for (int i = 0; i < 128; ++i) all += parts[i];
  *sum = all;
  *counter = 0;
}

// Pseudo-random inputs, the same on every machine.
class Numbers {
 public:
  Word word() { return state_ = state_ * 1664525u + 1013904223u; }
  float below_1() { return static_cast<float>(word() >> 8) / (1 << 23) - 1; }
  float integer(int most) {
    return static_cast<float>(static_cast<int>(word() >> 16) % (2 * most + 1) - most);
  }

 private:
  Word state_ = 12345;
};

template <class T>
Word bits16(float x) {
  const T narrow(x);
  std::uint16_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return bits;
}

float as_float(Word word) {
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

template <class V>
std::vector<Word> words(const std::vector<V>& values) {
  static_assert(sizeof(V) == sizeof(Word), "32 bits each");
  std::vector<Word> out(values.size());
  std::memcpy(out.data(), values.data(), values.size() * sizeof(Word));
  return out;
}

using Floats = std::vector<float>;

// c [16, 8] + a [16, 16] b [16, 8] by the PTX manual's tables, independently of csrc/emulation.
template <class T>
Floats product(const Floats& a, const Floats& b, const Floats& c, int times = 1) {
  std::vector<Word> of_a(4 * WARP), of_b(2 * WARP);
  Floats of_c(4 * WARP), out(128);
  const auto place = [](int lane, int i) {  // index in c of a lane's element i
    return ((lane >> 2) + (i < 2 ? 0 : 8)) * 8 + (lane & 3) * 2 + (i & 1);
  };
  for (int lane = 0; lane < WARP; ++lane) {
    const int group = lane >> 2, in_group = lane & 3;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int k = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      of_a[lane * 4 + i / 2] |= bits16<T>(a[row * 16 + k]) << (16 * (i & 1));
    }
    for (int i = 0; i < 4; ++i) {
      const int k = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
      of_b[lane * 2 + i / 2] |= bits16<T>(b[k * 8 + group]) << (16 * (i & 1));
      of_c[lane * 4 + i] = c[place(lane, i)];
    }
  }
  const Device<Word> left(of_a), right(of_b);
  const Device<float> sums(of_c);
  require(CKD_LAUNCH((products<T>), dim3(1), dim3(WARP), 0, nullptr, left.data, right.data,
                     sums.data, times),
          "products");
  of_c = sums.get();
  for (int lane = 0; lane < WARP; ++lane) {
    for (int i = 0; i < 4; ++i) out[place(lane, i)] = of_c[lane * 4 + i];
  }
  return out;
}

using Lines = std::map<std::string, std::vector<Word>>;

template <class T>
void add_products(Lines& lines, const std::string& type, Numbers& numbers) {
  Floats a(256), b(128), c(128);
  for (Floats* v : {&a, &b}) {
    for (float& x : *v) x = numbers.integer(7);
  }
  for (float& x : c) x = numbers.integer(499);
  lines["= mma " + type + " integers"] = words(product<T>(a, b, c, 3));
  for (Floats* v : {&a, &b, &c}) {
    for (float& x : *v) x = numbers.below_1();
  }
  lines["s mma " + type + " random"] = words(product<T>(a, b, c));
  // Terms of very different sizes.
  for (float& x : a) x *= std::ldexp(1.0f, static_cast<int>(numbers.integer(6)));
  for (float& x : b) x *= std::ldexp(1.0f, static_cast<int>(numbers.integer(6)));
  lines["s mma " + type + " many sizes"] = words(product<T>(a, b, c));
  for (float& x : a) x = 6e-8f * std::fabs(numbers.below_1());  // subnormal as float16
  lines["s mma " + type + " subnormal"] = words(product<T>(a, b, Floats(128, 0)));
  // A long sum of positive products, as sums over a bank are: truncation makes it too small.
  for (Floats* v : {&a, &b}) {
    for (float& x : *v) x = std::fabs(numbers.below_1());
  }
  lines["l mma " + type + " 2048 times"] = words(product<T>(a, b, Floats(128, 0), 2048));
}

// For 1 + `count` products of 2^-exponent, from term `first` on: the sum - 1 in units of 2^-23.
float kept(int first, int count, int exponent) {
  Floats a(256, 0), b(128, 0);
  for (int k = first; k < first + count; ++k) a[k] = 1, b[k * 8] = std::ldexp(1.0f, -exponent / 2);
  for (int k = first; k < first + count; ++k) a[k] = std::ldexp(1.0f, exponent / 2 - exponent);
  return (product<__half>(a, b, Floats(128, 1))[0] - 1) * (1 << 23);
}

Lines run() {
  Lines lines;
  Numbers numbers;
  {
    std::vector<std::uint16_t> from(16 * 64);
    for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::uint16_t>(i * 3 + 1);
    const Device<std::uint16_t> in(from);
    const Device<Word> out(std::vector<Word>(8 * 128, 0xdeadbeef));
    require(CKD_LAUNCH(matrices, dim3(1), dim3(WARP), carve_bytes<std::uint16_t>(16 * 64), nullptr,
                       in.data, out.data),
            "matrices");
    lines["= ldmatrix, and transposed"] = out.get();
  }
  add_products<__half>(lines, "float16", numbers);
  add_products<__nv_bfloat16>(lines, "bfloat16", numbers);
  // How far below the largest term others still count, and whether 16 products are added at once.
  lines["l kept beside 1: 2 2^-24, 4 2^-25, 8 2^-26, 16 2^-27; 4 2^-25 in two halves"] = words(
      Floats{kept(0, 2, 24), kept(0, 4, 25), kept(0, 8, 26), kept(0, 16, 27), kept(6, 4, 25)});
  {
    std::vector<unsigned char> from(WARP * 16);
    for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<unsigned char>(i * 7 + 1);
    const Device<unsigned char> in(from);
    const Device<Word> out(std::vector<Word>(256, 0xdeadbeef));
    require(CKD_LAUNCH(copies, dim3(1), dim3(WARP), carve_bytes<Word>(WARP * 4), nullptr, in.data,
                       out.data),
            "copies");
    lines["= cp.async of 0 to 16 bytes"] = out.get();
  }
  {
    Floats x = {0,    -0.0f, 1,    -1,  127.99f,  128,       -125.9f, -126,
                -149, -1e4f, 1e4f, -10, INFINITY, -INFINITY, 1e-40f,  -1e-40f};
    for (int i = 0; i < 400; ++i) x.push_back(numbers.below_1() * (i < 200 ? 1 : 126));
    const Device<float> in(x), out(Floats(x.size(), -7));
    require(CKD_LAUNCH(powers, dim3(1), dim3(WARP), 0, nullptr, in.data, out.data,
                       static_cast<int>(x.size())),
            "powers");
    lines["u exp2"] = words(out.get());
  }
  {
    const Device<Word> out(std::vector<Word>(5 * WARP));
    require(CKD_LAUNCH(shuffles, dim3(1), dim3(WARP), 0, nullptr, out.data), "shuffles");
    lines["= shuffle_xor"] = out.get();
  }
  {
    const Device<Word> out(std::vector<Word>((WARP + 2) * WARP, 0xdeadbeef));
    require(CKD_LAUNCH(votes, dim3(1), dim3(WARP), 0, nullptr, out.data), "votes");
    lines["= any_of_warp"] = out.get();
  }
  {
    Floats x(4096);
    for (float& value : x) value = std::fabs(numbers.below_1()) * 1e-20f;
    const Device<float> in(x), out(Floats(1, 0));
    require(CKD_LAUNCH(maxima, dim3(32), dim3(128), 0, nullptr, in.data, out.data, 4096), "maxima");
    lines["= atomic_max"] = words(out.get());
  }
  {
#ifdef CKD_EMULATION
    constexpr int GRID = 20, TIMES = 3;
#else
    constexpr int GRID = 1000, TIMES = 2000;  // enough for a missing fence to show
#endif
    const Device<int> values(std::vector<int>(GRID * 128)), counter(std::vector<int>(1));
    const Device<int> sum(std::vector<int>(1));
    int wrong = 0;
    for (int n = 0; n < TIMES; ++n) {
      require(
          CKD_LAUNCH(last_block, dim3(GRID), dim3(128), carve_bytes<int>(4) + carve_bytes<int>(128),
                     nullptr, values.data, counter.data, sum.data, n),
          "last_block");
      if (n >= 20 && n % 20 != 0) continue;
      wrong += sum.get()[0] != 128 * GRID * n + 128 * (GRID * (GRID - 1) / 2) + GRID * 8128;
    }
    lines["= sums of the last block that are wrong"] = words(std::vector<int>{wrong});
  }
  return lines;
}

void print(const Lines& lines) {
  for (const auto& [name, values] : lines) {
    std::printf("%s\n", name.c_str());
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::printf("%s%08x%s", i % 16 == 0 ? "  " : " ", values[i],
                  i % 16 == 15 || i + 1 == values.size() ? "\n" : "");
    }
  }
}

Lines read(const char* path) {
  std::ifstream file(path);
  Lines lines;
  std::string line, name;
  while (std::getline(file, line)) {
    if (line.rfind("  ", 0) != 0) {
      name = line;
      continue;
    }
    std::istringstream text(line);
    for (std::string word; text >> word;) {
      lines[name].push_back(static_cast<Word>(std::stoul(word, nullptr, 16)));
    }
  }
  return lines;
}

bool agree(char how, Word found, Word wanted) {
  if (found == wanted) return true;
  const double x = static_cast<double>(as_float(found)), y = static_cast<double>(as_float(wanted));
  switch (how) {
    case 'u':
      if (std::isnan(y)) return std::isnan(x);
      if (std::fabs(y) < 1.2e-38 && x == 0) return true;  // subnormal results are 0
      return std::fabs(x - y) <= 2.5 * 1.1920929e-7 * std::fabs(y);
    case 's':  // terms are as large as 64 x 64; or a term is a subnormal number times 64
      return std::fabs(x - y) <= (std::fabs(y) < 1e-4 ? 2e-9 : 1e-6 * (std::fabs(y) + 64.0 * 64));
    case 'l':  // depends on the hardware's rounding, which these vectors show
      return std::fabs(x - y) <= 1e-3 * std::fabs(y) + 2;
    default:
      return false;
  }
}

bool compare(const Lines& found, const Lines& golden) {
  bool right = found.size() == golden.size();
  if (!right) std::printf("WRONG: %zu vectors, golden are %zu\n", found.size(), golden.size());
  int sums = 0, same_sums = 0;
  for (const auto& [name, values] : found) {
    const auto at = golden.find(name);
    const std::vector<Word> wanted = at == golden.end() ? std::vector<Word>() : at->second;
    std::size_t wrong = values.size() == wanted.size() ? 0 : 1, first = 0;
    for (std::size_t i = 0; i < values.size() && i < wanted.size(); ++i) {
      if (name[0] == 's' || name[0] == 'l') ++sums, same_sums += values[i] == wanted[i];
      if (!agree(name[0], values[i], wanted[i]) && wrong++ == 0) first = i;
    }
    if (wrong == 0) continue;
    right = false;
    std::printf("WRONG: %s: %zu of %zu words", name.c_str(), wrong, values.size());
    if (first < wanted.size()) {
      std::printf(", first [%zu] %08x (%g), golden %08x (%g)", first, values[first],
                  static_cast<double>(as_float(values[first])), wanted[first],
                  static_cast<double>(as_float(wanted[first])));
    }
    std::printf("\n");
  }
  std::printf("%s; %d of %d sums of matrix units have the golden bits\n",
              right ? "all right" : "not right", same_sums, sums);
  return right;
}

}  // namespace

int main(int count, char** arguments) {
  const Lines lines = run();
  if (count == 3 && std::string(arguments[1]) == "check") {
    return compare(lines, read(arguments[2])) ? 0 : 1;
  }
  print(lines);
  return 0;
}
