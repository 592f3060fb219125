// Projects and normalises the bank a chunk at a time, the first step of every op.

#pragma once

#include "operands.cuh"
#include "projection.cuh"
#include "weight_gradient.cuh"

namespace ckd::cuda {

// Runs f with a null pointer to the element type.
template <class F>
int with_element(Element element, const F& f) {
  switch (element) {
    case Element::float16:
      return f(static_cast<const __half*>(nullptr));
    case Element::bfloat16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
    default:
      return f(static_cast<const float*>(nullptr));
  }
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t largest_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }
inline unsigned blocks(std::int64_t n, std::int64_t per_block) {
  return static_cast<unsigned>(ceil_div(n, per_block));
}

// Allocates arrays in the workspace, aligned to 256 bytes; with null memory it only counts bytes.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(std::int64_t count) {
    char* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(count * static_cast<std::int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(piece);
  }
  std::int64_t used() const { return used_; }

 private:
  char* memory_;
  std::int64_t used_ = 0;
};

constexpr std::int64_t CHUNK_BYTES = 64 << 20;
constexpr int MAX_PARTS = 64;
constexpr std::int64_t BLOCKS_OF_PROCESSOR = 2;  // resident at a time, of the longest kernels

// Sizes that follow from the inputs and the device.
struct Plan {
  Plan(const Inputs& in, int processors, std::int64_t most_chunk_rows)
      : pieces(in.exact ? 3 : 1),
        piece(static_cast<int>(round_up(in.student.width, 16))),
        ld(pieces * piece),
        width(ld <= 64                ? 64
              : ld <= 128 || in.exact ? 128
                                      : 256),
        width_blocks(static_cast<int>(ceil_div(ld, width))) {
    const std::int64_t row = ld * (2 + 4) + 4, slots = BLOCKS_OF_PROCESSOR * processors;
    // Rows whose blocks fill the device once: at most 26 MB on 132 multiprocessors.
    const std::int64_t wave = TILE * largest_of(slots / width_blocks, 1);
    chunk_rows = largest_of(CHUNK_BYTES / row / wave, 1) * wave;
    if (most_chunk_rows < chunk_rows) chunk_rows = round_up(most_chunk_rows, TILE);
    if (in.bank.count < chunk_rows) chunk_rows = in.bank.count;
    const std::int64_t others = blocks(in.student.count, TILE) * width_blocks;
    parts = best_parts(chunk_rows, others > 0 ? others : 1, processors);
  }

  // The number of parts, of two tiles at least, that leaves the fewest processors idle in the last
  // wave of blocks.
  static int best_parts(std::int64_t rows, std::int64_t others, std::int64_t processors) {
    int best = 1;
    double busiest = 0;
    const std::int64_t slots = BLOCKS_OF_PROCESSOR * processors;
    for (int parts = 1; parts <= MAX_PARTS; ++parts) {
      if (parts > 1 && (parts * 2 * TILE > rows || (parts - 1) * others >= slots)) break;
      const double used = static_cast<double>(parts * others);
      const double busy = used / static_cast<double>(round_up(parts * others, slots));
      if (busy > busiest + 0.02) best = parts, busiest = busy;
    }
    return best;
  }

  Layout student_layout() const { return pieces > 1 ? Layout::student_pieces : Layout::plain; }

  int pieces;        // of a row of u and n
  int piece;         // columns of a piece: the student's width padded with zeros
  int ld;            // row length of u and n
  int width;         // columns of a block of the sums; 256 leave no registers for exact arithmetic
  int width_blocks;  // blocks of that width in ld
  std::int64_t chunk_rows;
  int parts;  // of a chunk
};

// Iterates over the chunks of the bank.
class BankChunks {
 public:
  BankChunks(const Inputs& in, const Plan& plan, void* cache, bool filled, Pieces& pieces,
             cudaStream_t stream)
      : in_(in),
        plan_(plan),
        cached_(cache != nullptr),
        filled_(cached_ && filled),
        stream_(stream) {
    const std::int64_t rows = plan.chunk_rows;
    if (cached_) {
      n_ = static_cast<__half*>(cache);
      inverse_ = reinterpret_cast<float*>(n_ + in.bank.count * plan.ld);
    } else {
      n_ = pieces.take<__half>(rows * plan.ld);
      inverse_ = pieces.take<float>(rows);
    }
    z_ = in.weight != nullptr && !filled_ ? pieces.take<float>(rows * plan.piece) : nullptr;
  }

  // Makes the kernel of the first chunk also normalise students into u [B, ld], and clear words.
  void normalise_students(__half* u, Cleared cleared) { u_ = u, cleared_ = cleared; }

  // Calls f(chunk, t) for each chunk, where t are its rows as stored; stops at an error.
  template <class F>
  int each(const F& f) const {
    for (std::int64_t first = 0; first < in_.bank.count; first += plan_.chunk_rows) {
      Rows t = in_.bank;
      t.count = smaller_of(plan_.chunk_rows, in_.bank.count - first);
      t.data = static_cast<const char*>(in_.bank.data) + first * t.stride * bytes(t.element);
      const std::int64_t at = cached_ ? first : 0;
      const Chunk chunk = {n_ + at * plan_.ld, inverse_ + at, static_cast<int>(t.count), first,
                           in_.bank.count};
      if (int error = filled_ ? 0 : fill(chunk, t)) return error;
      if (int error = f(chunk, t)) return error;
    }
    return 0;
  }

  static std::int64_t bytes(Element element) { return element == Element::float32 ? 4 : 2; }
  static std::int64_t smaller_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
  static bool is_aligned(const Rows& t) {
    return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 &&
           t.stride * bytes(t.element) % 16 == 0;
  }

 private:
  int fill(const Chunk& chunk, const Rows& t) const {
    __half* n = const_cast<__half*>(chunk.n);
    float* inverse = const_cast<float*>(chunk.inverse);
    const int width = static_cast<int>(in_.student.width);
    const auto normalise = [&](auto* rows, std::int64_t stride) {
      using Z = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
      const Layout layout = in_.exact ? Layout::bank_pieces : Layout::plain;
      return write_unit_rows(
          UnitRows<Z>{rows, stride, t.count, width, n, plan_.piece, layout, inverse},
          chunk.first == 0);
    };
    if (in_.weight == nullptr) {
      return with_element(t.element, [&](auto* element) {
        return normalise(static_cast<decltype(element)>(t.data), t.stride);
      });
    }
    if (int error = with_element(t.element, [&](auto* element) {
          using S = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
          using T = std::conditional_t<std::is_same<S, __half>::value, __half, __nv_bfloat16>;
          if (in_.exact) return project_chunk_exactly<S>(t);
          if constexpr (std::is_same<S, T>::value) {
            if (is_aligned(t)) return project_chunk<T, S, true>(t);
          }
          return project_chunk<T, S, false>(t);
        })) {
      return error;
    }
    return normalise(static_cast<const float*>(z_), plan_.piece);
  }

  template <class Z>
  int write_unit_rows(const UnitRows<Z>& bank, bool is_first) const {
    const unsigned of_bank = blocks(bank.rows, ROWS_PER_BLOCK);
    if (u_ == nullptr || !is_first) {
      return CKD_LAUNCH(unit_rows<Z>, dim3(of_bank), dim3(THREADS), 0, stream_, bank);
    }
    return with_element(in_.student.element, [&](auto* element) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
      const UnitRows<S> students = {static_cast<const S*>(in_.student.data),
                                    in_.student.stride,
                                    in_.student.count,
                                    static_cast<int>(in_.student.width),
                                    u_,
                                    plan_.piece,
                                    plan_.student_layout(),
                                    nullptr};
      return CKD_LAUNCH((unit_rows_of_both<S, Z>),
                        dim3(blocks(students.rows, ROWS_PER_BLOCK) + of_bank), dim3(THREADS), 0,
                        stream_, students, bank, cleared_);
    });
  }

  template <class T, class S, bool ALIGNED>
  int project_chunk(const Rows& t) const {
    const int width = static_cast<int>(in_.student.width);
    return CKD_LAUNCH(
        (project<T, S, ALIGNED, false>), dim3(blocks(t.count, TILE), blocks(width, TILE)),
        dim3(THREADS), 4 * carve_bytes<T>(TILE * TILE), stream_, static_cast<const S*>(t.data),
        t.stride, t.count, static_cast<int>(t.width), static_cast<const T*>(in_.weight),
        in_.weight_stride, in_.bias, width, static_cast<const float*>(nullptr), 1.0f, z_,
        static_cast<std::int64_t>(plan_.piece));
  }

  template <class S>
  int project_chunk_exactly(const Rows& t) const {
    const int width = static_cast<int>(in_.student.width);
    return CKD_LAUNCH(project_exactly<S>, dim3(blocks(t.count, TILE), blocks(width, TILE)),
                      dim3(THREADS), 2 * carve_bytes<__nv_bfloat16>(TILE * TILE), stream_,
                      static_cast<const S*>(t.data), t.stride, t.count, static_cast<int>(t.width),
                      static_cast<const float*>(in_.weight), in_.weight_stride, in_.bias, width, z_,
                      static_cast<std::int64_t>(plan_.piece));
  }

  const Inputs& in_;
  const Plan& plan_;
  bool cached_, filled_;
  cudaStream_t stream_;
  __half* n_;
  float* inverse_;
  float* z_;
  __half* u_ = nullptr;
  Cleared cleared_ = {nullptr, 0};
};

// Holds dZ of a chunk and multiplies it into the projection's gradient. dZ is float32, with its
// maximum, in exact arithmetic, and otherwise 16-bit numbers with scales.
class WeightGradient {
 public:
  WeightGradient(const Inputs& in, const Plan& plan, bool wants_bias, Pieces& pieces)
      : in_(in), plan_(plan) {
    const std::int64_t rows = plan.chunk_rows, tiles = ceil_div(rows, TILE);
    if (in.exact) {
      largest_count_ = static_cast<int>(ceil_div(in.bank.count, rows));
      largest_ = pieces.take<float>(largest_count_);
      return;
    }
    scaled_.is_bfloat16 = in.bank.element != Element::float16;
    scaled_.rows = pieces.take<std::uint16_t>(rows * plan.ld);
    scaled_.scales = pieces.take<float>(tiles);
    if (wants_bias) scaled_.column_sums = pieces.take<float>(tiles * plan.ld);
  }

  // An earlier kernel must clear these words.
  Cleared cleared() const { return {reinterpret_cast<std::uint32_t*>(largest_), largest_count_}; }
  const ScaledGradient& scaled() const { return scaled_; }

  // Computes dZ from dN [rows, ld] of a chunk, which it overwrites; times the scale, unless null.
  int take_through_norm(const Chunk& chunk, float* d_n, const float* scale, cudaStream_t stream) {
    if (!in_.exact) {
      return CKD_LAUNCH(through_norm_scaled, dim3(blocks(chunk.rows, TILE)), dim3(THREADS),
                        carve_bytes<float>(THREADS / 32), stream, d_n, chunk.n, chunk.inverse,
                        chunk.rows, plan_.piece, scale, scaled_);
    }
    d_z_ = d_n;
    return CKD_LAUNCH(through_norm, dim3(blocks(chunk.rows, ROWS_PER_BLOCK)), dim3(THREADS), 0,
                      stream, d_n, chunk.n, chunk.inverse, static_cast<std::int64_t>(chunk.rows),
                      plan_.piece, plan_.pieces, scale, largest(chunk));
  }

  // d_weight [parts, W, D], d_bias [parts, W] (or null) (+)= a chunk's terms; t: its stored rows.
  int add(const Chunk& chunk, const Rows& t, float* d_weight, float* d_bias, int parts,
          cudaStream_t stream) const {
    return with_element(t.element, [&](auto* element) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
      using T = std::conditional_t<std::is_same<S, __half>::value, __half, __nv_bfloat16>;
      if (in_.exact) return add_exactly<S>(chunk, t, d_weight, d_bias, parts, stream);
      if constexpr (std::is_same<S, T>::value) {
        if (BankChunks::is_aligned(t)) {
          return add_scaled<T, S, true>(chunk, t, d_weight, d_bias, parts, stream);
        }
      }
      return add_scaled<T, S, false>(chunk, t, d_weight, d_bias, parts, stream);
    });
  }

 private:
  float* largest(const Chunk& chunk) const { return largest_ + chunk.first / plan_.chunk_rows; }

  template <class T, class S, bool ALIGNED>
  int add_scaled(const Chunk& chunk, const Rows& t, float* d_weight, float* d_bias, int parts,
                 cudaStream_t stream) const {
    const int width = static_cast<int>(in_.student.width), dim = static_cast<int>(t.width);
    return CKD_LAUNCH(
        (weight_gradient<T, S, ALIGNED>),
        dim3(blocks(width, TILE), blocks(dim, GRADIENT_COLUMNS), static_cast<unsigned>(parts)),
        dim3(THREADS), GRADIENT_BYTES, stream, scaled_, plan_.ld, width,
        static_cast<const S*>(t.data), t.stride, dim, chunk.rows, d_weight, d_bias,
        chunk.first > 0);
  }

  // In bfloat16 pieces for a bank of any dtype: rows of dZ differ as much as the bank's norms, and
  // float16 would lose small ones, which count as much as large ones.
  template <class S>
  int add_exactly(const Chunk& chunk, const Rows& t, float* d_weight, float* d_bias, int parts,
                  cudaStream_t stream) const {
    using T = __nv_bfloat16;
    const int width = static_cast<int>(in_.student.width), dim = static_cast<int>(t.width);
    const auto run = [&](auto aligned) {
      return CKD_LAUNCH((sum_of_products<T, S, decltype(aligned)::value>),
                        dim3(blocks(width, TILE), blocks(dim, TILE), static_cast<unsigned>(parts)),
                        dim3(THREADS), PRODUCT_BYTES, stream, static_cast<const float*>(d_z_),
                        static_cast<std::int64_t>(plan_.ld), static_cast<std::int64_t>(1), width,
                        static_cast<const S*>(t.data), t.stride, dim, chunk.rows,
                        static_cast<const float*>(largest(chunk)), 0, true, d_weight, d_bias,
                        chunk.first > 0);
    };
    if constexpr (std::is_same<S, T>::value) {
      if (BankChunks::is_aligned(t)) return run(std::true_type());
    }
    return run(std::false_type());
  }

  const Inputs& in_;
  const Plan& plan_;
  ScaledGradient scaled_ = {};
  float* largest_ = nullptr;  // maximum of |dZ| of each chunk
  int largest_count_ = 0;
  float* d_z_ = nullptr;
};

}  // namespace ckd::cuda
