// Projects and normalises bank rows, read in their stored dtype, a panel of 64 at a time:
// z = P t + b, n = z / |z|. Bank rows are the columns of a panel, so that norms, and in the
// backward softmax and normalisation, are sums and products of whole vectors.

#pragma once

#include "rows.h"

namespace ckd::cpu::CKD_TIER {

// 64 projected bank rows, normalised (n = z / |z|), transposed and packed along W into words
// (gemm.h).
template <class Type>
struct Panel {
  const typename Type::Word* words;  // [words(W), 64]
  const float* inverse;              // [64]: 1 / |z|; 0 for padding and for norms below 1e-6
};

// An lse in two float32 numbers, since the error of lse is a relative error of every exp(l - lse):
// the nearest one and its rounding error. contrastive_ce.h has another form for large scales.
struct Lse {
  float high, low = 0;

  explicit Lse(float lse) : high(lse) {}
  explicit Lse(double lse)
      : high(static_cast<float>(lse)), low(static_cast<float>(lse - static_cast<double>(high))) {}
  Lse(float first, float second) : high(first), low(second) {}
};

template <class Type>
class Bank {
 public:
  using Word = typename Type::Word;
  static constexpr std::int64_t BLOCK = 256 * Type::PER_WORD;  // elements of D packed at a time

  // Up to these limits threads share each panel: whole panels would be too few work items.
  static constexpr std::int64_t FEW_PANELS = 8, FEW_BYTES = 4 << 20;

  // A thread's buffers for projecting panels.
  struct Scratch {
    explicit Scratch(const Bank& bank)
        : columns(256 * PANEL),
          z(bank.width_ * Type::PER_WORD * PANEL),
          words(Type::PER_WORD == 1 ? 0 : bank.width_ * PANEL),
          inverse(PANEL) {}
    Buffer<Word> columns;  // [256, 64] a block of the bank, packed along D
    Buffer<float> z;       // [W, 64]: z^T, then n^T; zero rows pad W to whole words
    Buffer<Word> words;    // [words(W), 64]: n^T packed, in bfloat16 only
    Buffer<float> inverse;
  };

  explicit Bank(const Inputs& in, Cache cache) : in_(in), width_(words<Type>(in.student_dim)) {
    find_room(cache);
    weight_ld_ = words<Type>(in.teacher_dim);
    if constexpr (Type::PER_WORD == 1) {
      weight_ = in.weight;
    } else if (in.weight != nullptr && !(cache.filled && cached_ == panels())) {
      narrow_ = Buffer<Word>(in.student_dim * weight_ld_);
      weight_ = narrow_;
    }
    const bool all_cached = cached_ > 0 && cached_ == panels();
    if (Type::PER_WORD == 1 && all_cached) {
      numbers_ = reinterpret_cast<float*>(cache_);
    }
    const std::int64_t few = panels() * weight_ld_ * PANEL;
    if (weight_ != nullptr && !(cache.filled && all_cached) && in.threads > 1 &&
        panels() <= FEW_PANELS && few * 4 <= FEW_BYTES) {
      few_columns_ = Buffer<Word>(few);
      if (numbers_ == nullptr) {
        few_numbers_ = Buffer<float>(panels() * panel_numbers());
        few_inverses_ = Buffer<float>(panels() * PANEL);
        numbers_ = few_numbers_;
      }
    }
  }

  // Every thread of a team must call this before it calls `make` or `recall`.
  void prepare() const {
    pack_weight();
    if (are_few()) project_few();
  }

  // A student's lse, which the cache takes to the backward; `otherwise` without a cache.
  void keep_lse(std::int64_t i, Lse lse) const {
    if (lse_ != nullptr) lse_[i] = lse;
  }
  Lse lse(std::int64_t i, Lse otherwise) const { return lse_ == nullptr ? otherwise : lse_[i]; }

  std::int64_t panels() const { return ceil_div(in_.bank_rows, PANEL); }
  std::int64_t width() const { return width_; }
  int rows(std::int64_t panel) const {
    return static_cast<int>(smaller(PANEL, in_.bank_rows - panel * PANEL));
  }
  int columns(std::int64_t panel) const { return static_cast<int>(round_up(rows(panel), 16)); }

  // Packs columns [d, d + 64) of bank rows [k, k + count) along the bank. Zeros pad the columns to
  // whole vectors and the rows to whole words.
  void pack_rows(std::int64_t k, std::int64_t count, std::int64_t d, Word* out) const {
    with_stored(in_.element, [&](auto stored) {
      using Stored = decltype(stored);
      const std::int64_t end = in_.teacher_dim, cols = round_up(smaller(PANEL, end - d), 16);
      for (std::int64_t p = 0; p < words<Type>(count); ++p, out += PANEL) {
        const char* row[Type::PER_WORD];
        std::int64_t ends[Type::PER_WORD];
        for (int e = 0; e < Type::PER_WORD; ++e) {
          const std::int64_t r = p * Type::PER_WORD + e;
          row[e] = stored_row<Stored>(k + r);
          ends[e] = r < count ? end : 0;
          ask_for<Stored>(k + r + AHEAD, d, PANEL);
        }
        for (std::int64_t j = 0; j < cols; j += LANES) {
          Vec numbers[Type::PER_WORD];
          for (int e = 0; e < Type::PER_WORD; ++e) {
            numbers[e] = widen<Stored>(row[e], d + j, ends[e]);
          }
          store_words(numbers, out + j);
        }
      }
    });
  }

  // The address of a panel's n^T if all panels stay in memory during the call, else `otherwise`.
  float* place(std::int64_t panel, float* otherwise) const {
    return numbers_ == nullptr ? otherwise : numbers_ + panel * panel_numbers();
  }

  // Projects and normalises a panel into z (its `place` if it has one), with zero rows up to whole
  // words, and into the cache if it has room for the panel.
  Panel<Type> make(std::int64_t panel, Scratch& scratch, float* z) const {
    const bool keep = panel < cached_;
    float* inverse = inverse_of(panel, scratch.inverse);
    if (!are_few()) {
      project(panel, scratch, z);
      normalise(panel, z, inverse);
    }
    if constexpr (Type::PER_WORD == 1) {
      const std::size_t size = static_cast<std::size_t>(width_ * PANEL) * sizeof(Word);
      if (keep && z != cached_words(panel)) std::memcpy(cached_words(panel), z, size);
      return {z, inverse};
    } else {
      Word* out = keep ? cached_words(panel) : scratch.words;
      for (std::int64_t p = 0; p < width_; ++p) {
        pair_rows(z + p * Type::PER_WORD * PANEL, PANEL, PANEL, out + p * PANEL);
      }
      return {out, inverse};
    }
  }

  // Returns the panel from the cache, or projects it again.
  Panel<Type> recall(std::int64_t panel, Scratch& scratch) const {
    if (panel < cached_) return {cached_words(panel), cached_inverse(panel)};
    return make(panel, scratch, place(panel, scratch.z));
  }

 private:
  void find_room(Cache cache) {
    const std::int64_t head = 64 + round_up(in_.batch * 8, 64);
    if (cache.data == nullptr || cache.bytes < head) return;
    CacheHeader header = {0, width_, Type::PER_WORD};
    if (cache.filled) {
      std::memcpy(&header, cache.data, sizeof header);
      if (header.width != width_ || header.per_word != Type::PER_WORD) return;
    } else {
      const std::int64_t panel = (width_ + 1) * PANEL * 4;
      header.panels = smaller(panels(), (cache.bytes - head) / panel);
      std::memset(cache.data, 0, static_cast<std::size_t>(head));
      std::memcpy(cache.data, &header, sizeof header);
    }
    cached_ = header.panels;
    known_ = cache.filled ? cached_ : 0;
    lse_ = reinterpret_cast<Lse*>(static_cast<char*>(cache.data) + 64);
    cache_ = static_cast<char*>(cache.data) + head;
  }

  void pack_weight() const {
    if constexpr (Type::PER_WORD > 1) {
      constexpr std::int64_t ROWS = 16;
      if (weight_ == nullptr) return;
      each(ceil_div(in_.student_dim, ROWS), [&](std::int64_t block) {
        const std::int64_t end = smaller((block + 1) * ROWS, in_.student_dim);
        for (std::int64_t w = block * ROWS; w < end; ++w) {
          to_words(in_.weight + w * in_.teacher_dim, in_.teacher_dim, narrow_ + w * weight_ld_);
        }
      });
    }
  }

  // Projects and normalises every panel that is not known. A work item is a few rows of the weight
  // times a panel: in the order of panels, so that a thread mostly multiplies panels that it
  // packed, and small, so that all threads finish at about the same time.
  void project_few() const {
    constexpr std::int64_t ROWS = 4 * MR;
    const std::int64_t count = panels() - known_, blocks = ceil_div(in_.teacher_dim, BLOCK);
    each(count * blocks, [&](std::int64_t item) {
      const std::int64_t panel = known_ + item / blocks, d = item % blocks * BLOCK;
      pack_block<Type>(panel, d, few_columns_ + (panel * weight_ld_ + d / Type::PER_WORD) * PANEL);
    });
    const std::int64_t parts = ceil_div(in_.student_dim, ROWS);
    each(count * parts, [&](std::int64_t item) {
      const std::int64_t panel = known_ + item / parts, w = item % parts * ROWS;
      const Word* columns = few_columns_ + panel * weight_ld_ * PANEL;
      for (std::int64_t d = 0; d < in_.teacher_dim; d += BLOCK) {
        multiply_block(panel, d, w, smaller(ROWS, in_.student_dim - w),
                       columns + d / Type::PER_WORD * PANEL, place(panel, nullptr));
      }
    });
    each(count, [&](std::int64_t item) {
      const std::int64_t panel = known_ + item;
      normalise(panel, place(panel, nullptr), inverse_of(panel, nullptr));
    });
  }

  bool are_few() const { return few_columns_ != nullptr; }
  // Floats of a panel's n^T, with zero rows up to whole words.
  std::int64_t panel_numbers() const { return width_ * Type::PER_WORD * PANEL; }
  float* inverse_of(std::int64_t panel, float* otherwise) const {
    if (panel < cached_) return cached_inverse(panel);
    return few_inverses_ != nullptr ? few_inverses_ + panel * PANEL : otherwise;
  }

  void project(std::int64_t panel, Scratch& scratch, float* z) const {
    for (std::int64_t d = 0; d < in_.teacher_dim; d += BLOCK) {
      if (in_.weight == nullptr) {
        pack_block<Float32>(panel, d, z + d * PANEL);
      } else {
        pack_block<Type>(panel, d, scratch.columns);
        multiply_block(panel, d, 0, in_.student_dim, scratch.columns, z);
      }
    }
  }

  template <class Stored>
  const char* stored_row(std::int64_t k) const {
    return static_cast<const char*>(in_.bank) + k * in_.bank_stride * Stored::SIZE;
  }

  // Prefetches part of a later row: hardware prefetchers do not follow reads of a part of each row.
  static constexpr std::int64_t AHEAD = 16;
  template <class Stored>
  void ask_for(std::int64_t k, std::int64_t d, std::int64_t n) const {
    if (k >= in_.bank_rows) return;
    const char* at = stored_row<Stored>(k) + d * Stored::SIZE;
    for (std::int64_t byte = 0; byte < n * Stored::SIZE; byte += 64) __builtin_prefetch(at + byte);
  }

  // Packs elements [d, d + BLOCK) of a panel's rows along D, with the rows as columns; zeros pad
  // the columns to whole vectors.
  template <class To>
  void pack_block(std::int64_t panel, std::int64_t d, typename To::Word* out) const {
    with_stored(in_.element, [&](auto stored) {
      using Stored = decltype(stored);
      const std::int64_t n = smaller(BLOCK, in_.teacher_dim - d);
      const std::int64_t stride = in_.bank_stride * Stored::SIZE;
      for (int r = 0; r < columns(panel); r += LANES) {
        const std::int64_t k = panel * PANEL + r;
        const int count = static_cast<int>(smaller(LANES, in_.bank_rows - k));
        for (int i = 0; i < LANES; ++i) ask_for<Stored>(k + i + AHEAD, d, n);
        transpose_stored<Stored>(stored_row<Stored>(k), stride, count, d, d + n, words<To>(n),
                                 out + r, PANEL);
      }
    });
  }

  // Rows [w, w + rows) of z (+)= P t over one block of D.
  void multiply_block(std::int64_t panel, std::int64_t d, std::int64_t w, std::int64_t rows,
                      const Word* block, float* z) const {
    gemm(rows, static_cast<int>(round_up(this->rows(panel), GRAIN)),
         words<Type>(smaller(BLOCK, in_.teacher_dim - d)),
         Operands<Type>{weight_ + w * weight_ld_ + d / Type::PER_WORD, weight_ld_, block, PANEL,
                        z + w * PANEL, PANEL},
         d > 0);
  }

  // Adds the bias and divides by the norms; 0 for padding and for norms below 1e-6.
  void normalise(std::int64_t panel, float* z, float* inverse) const {
    const std::int64_t dim = in_.student_dim;
    const int vectors = columns(panel) / LANES;
    constexpr std::int64_t RUN = 32;  // squares in a partial sum, which bounds the rounding
    for (int j = 0; j < PANEL / LANES; ++j) {
      float* column = z + j * LANES;
      Vec sum = {};
      for (std::int64_t w0 = 0; j < vectors && w0 < dim; w0 += RUN) {
        Vec run = {};
        for (std::int64_t w = w0; w < smaller(w0 + RUN, dim); ++w) {
          Vec x = load(column + w * PANEL);
          if (in_.bias != nullptr) x += in_.bias[w];
          store(column + w * PANEL, x);
          run += x * x;
        }
        sum += run;
      }
      float squares[LANES], norms[LANES];
      store(squares, sum);
      for (int lane = 0; lane < LANES; ++lane) {
        const bool is_row = j * LANES + lane < rows(panel);
        const Norm norm(is_row ? squares[lane] : 0);
        norms[lane] = norm.value, inverse[j * LANES + lane] = norm.inverse;
      }
      const Vec norm = load(norms), scale = load(inverse + j * LANES);
      for (std::int64_t w = 0; w < dim; ++w) {
        const Vec x = load(column + w * PANEL);
        store(column + w * PANEL, scale == 0.0f ? Vec{} : divide(x, norm, scale));
      }
    }
    const std::int64_t padded = width_ * Type::PER_WORD;
    std::memset(z + dim * PANEL, 0, static_cast<std::size_t>((padded - dim) * PANEL) * 4);
  }

  Word* cached_words(std::int64_t panel) const {
    return reinterpret_cast<Word*>(cache_) + panel * width_ * PANEL;
  }
  float* cached_inverse(std::int64_t panel) const {
    return reinterpret_cast<float*>(cached_words(cached_)) + panel * PANEL;
  }

  const Inputs& in_;
  std::int64_t width_;       // words(W)
  std::int64_t cached_ = 0;  // the number of panels that the cache has room for
  std::int64_t known_ = 0;   // the number of panels in the cache at the start of the call
  char* cache_ = nullptr;
  Lse* lse_ = nullptr;
  const Word* weight_ = nullptr;
  std::int64_t weight_ld_ = 0;
  Buffer<Word> narrow_;
  // For few panels, shared by threads: the packed bank [panels, words(D), 64]; n^T [panels, W, 64]
  // and 1 / |z|, unless they are in the cache.
  Buffer<Word> few_columns_;
  Buffer<float> few_numbers_, few_inverses_;
  float* numbers_ = nullptr;  // see `place`
};

constexpr std::int64_t TILE = 256;  // bank rows of a block of logits, which fits a CPU's cache

// Tiles of a chunk: enough panels for every thread to project some.
inline std::int64_t chunk_tiles(const Inputs& in) {
  const std::int64_t most = in.threads > 8 ? 8 : 4;
  return smaller(most, ceil_div(in.bank_rows, TILE));
}

// Consecutive projected panels, in the two layouts that a pass over the students multiplies with.
template <class Type>
class Chunk {
 public:
  using Word = typename Type::Word;
  static constexpr std::int64_t TILE_PANELS = TILE / PANEL;

  Chunk(const Bank<Type>& bank, std::int64_t student_dim, std::int64_t tiles, bool needs_rows)
      : bank_(bank),
        dim_(student_dim),
        tiles_(tiles),
        needs_rows_(needs_rows),
        rows_(needs_rows ? tiles * TILE * bank.width() : 0),
        columns_(in_place() ? 0 : tiles * TILE_PANELS * panel_size()) {}

  // Projects panel `panel` into the chunk, which begins at panel `first`; returns n^T [W, 64].
  const float* fill(std::int64_t first, std::int64_t panel, typename Bank<Type>::Scratch& scratch) {
    const std::int64_t at = panel - first;
    Word* columns = columns_ + at * panel_size();
    float* z;
    if constexpr (Type::PER_WORD == 1) {
      z = bank_.place(panel, columns);
    } else {
      z = bank_.place(panel, scratch.z);
    }
    const Panel<Type> made = bank_.make(panel, scratch, z);
    if constexpr (Type::PER_WORD > 1) {
      for (std::int64_t w = 0; w < dim_; ++w) {
        to_words(z + w * PANEL, PANEL, columns + w * PANEL_WORDS<Type>);
      }
    }
    if (needs_rows_) {
      const std::int64_t width = bank_.width();
      transpose(made.words, PANEL, width, PANEL, rows_ + at * PANEL * width, width);
    }
    return z;
  }

  // Adds the first `count` rows of a tile to sum [W]; rows past the bank are zero.
  void add_rows(std::int64_t first, std::int64_t tile, std::int64_t count, float* sum) const {
    const Word* row = columns(first, tile);
    for (std::int64_t k = 0; k < count; k += PANEL) {
      for (std::int64_t w = 0; w < dim_; ++w, row += PANEL_WORDS<Type>) {
        float numbers[PANEL];
        from_words(row, PANEL, numbers);
        Vec part = {};
        for (int j = 0; j < PANEL; j += LANES) part += load(numbers + j);
        sum[w] += sum_lanes(part);
      }
    }
  }

  std::int64_t tiles() const { return tiles_; }
  std::int64_t panels() const { return tiles_ * TILE_PANELS; }
  // The two layouts of a tile of the chunk, which begins at panel `first`.
  const Word* rows(std::int64_t tile) const { return rows_ + tile * TILE * bank_.width(); }
  const Word* columns(std::int64_t first, std::int64_t tile) const {
    if constexpr (Type::PER_WORD == 1) {
      if (in_place()) return bank_.place(first + tile * TILE_PANELS, nullptr);
    }
    return columns_ + tile * TILE_PANELS * panel_size();
  }

 private:
  bool in_place() const { return Type::PER_WORD == 1 && bank_.place(0, nullptr) != nullptr; }
  std::int64_t panel_size() const { return dim_ * PANEL_WORDS<Type>; }

  const Bank<Type>& bank_;
  std::int64_t dim_, tiles_;
  bool needs_rows_;
  Buffer<Word> rows_;  // [tiles, 256, words(W)]: n, packed along W
  // [panels, W, 64 / PER_WORD]: n^T, packed along the bank; empty if in_place().
  Buffer<Word> columns_;
};

}  // namespace ckd::cpu::CKD_TIER
