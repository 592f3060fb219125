// The shift of weighted targets (TargetShift of arguments.h), sorted by bank rows.
//
// Only entries that are not at the student's target are stored: the shift of a student sums to 0,
// so the target's share is minus that of the others. With it, an entry at the target contributes
// exactly nothing, to the loss and to its gradients.
//
// A stable counting sort by one thread. Memory: at most 16 bytes for each entry, 8 for each
// student.

#pragma once

#include "rows.h"

namespace ckd::cpu::CKD_TIER {

class ShiftEntries {
 public:
  ShiftEntries(const Inputs& in, const std::int64_t* target, const TargetShift& shift)
      : bank_rows_(in.bank_rows), target_(target), shift_(shift) {
    const std::int64_t most = in.batch * shift.count;
    if (!exist() || most == 0) return;
    // A bucket is a panel, or more: no more buckets than entries, so that memory does not grow with
    // the bank.
    while ((bank_rows_ - 1) >> log2_rows_ >= most) ++log2_rows_;
    const std::int64_t buckets = ((bank_rows_ - 1) >> log2_rows_) + 1;
    sums_ = Buffer<double>(in.batch);
    sorted_ = Buffer<std::int64_t>(most);
    begins_ = Buffer<std::int64_t>(buckets + 2);
    begins_.zero();
    const int log2 = log2_rows_;
    const std::int64_t* rows = shift.rows;
    std::int64_t *sorted = sorted_, *count = begins_ + 2, *end = begins_ + 1;
    for (std::int64_t i = 0; i < in.batch; ++i) {
      double sum = 0;
      of_student(i, [&](std::int64_t entry) {
        ++count[rows[entry] >> log2];
        sum += static_cast<double>(shift_.values[entry]);
      });
      sums_[i] = sum;
    }
    for (std::int64_t b = 1; b < buckets; ++b) count[b] += count[b - 1];
    // end[b] is now where bucket b begins. Filling the bucket moves that to its end, which is where
    // the next one begins.
    for (std::int64_t i = 0; i < in.batch; ++i) {
      of_student(i, [&](std::int64_t entry) { sorted[end[rows[entry] >> log2]++] = entry; });
    }
  }

  bool exist() const { return shift_.rows != nullptr; }
  // The sum of the student's entries: the target's shift is minus that.
  double sum(std::int64_t i) const { return sums_[i]; }
  float value(std::int64_t entry) const { return shift_.values[entry]; }

  // f(entry) for a student's entries; they are numbered by student.
  template <class F>
  void of_student(std::int64_t i, const F& f) const {
    const std::int64_t own = target_[i], end = (i + 1) * shift_.count;
    for (std::int64_t entry = i * shift_.count; entry < end; ++entry) {
      const std::int64_t k = shift_.rows[entry];
      if (k >= 0 && k < bank_rows_ && k != own && shift_.values[entry] != 0) f(entry);
    }
  }

  // f(student, entry, row - k0) for the entries of students [i0, i1) in bank rows [k0, k1): by
  // buckets of rows, then by student.
  template <class F>
  void visit(std::int64_t k0, std::int64_t k1, std::int64_t i0, std::int64_t i1, const F& f) const {
    k1 = smaller(k1, bank_rows_);
    for (std::int64_t bucket = k0 >> log2_rows_; bucket << log2_rows_ < k1; ++bucket) {
      std::int64_t at = begins_[bucket];
      const std::int64_t end = begins_[bucket + 1];
      for (std::int64_t left = end - at; left > 0;) {  // bisection: the first of students i0..
        const std::int64_t half = left / 2;
        const bool before = sorted_[at + half] < i0 * shift_.count;
        at += before ? half + 1 : 0;
        left = before ? left - half - 1 : half;
      }
      for (; at < end && sorted_[at] < i1 * shift_.count; ++at) {
        const std::int64_t entry = sorted_[at], k = shift_.rows[entry];
        if (k >= k0 && k < k1) f(entry / shift_.count, entry, k - k0);
      }
    }
  }

 private:
  std::int64_t bank_rows_;
  const std::int64_t* target_;
  TargetShift shift_;
  int log2_rows_ = 6;  // of the bank rows of a bucket
  Buffer<double> sums_;
  Buffer<std::int64_t> sorted_;  // entries by bucket, then in order
  Buffer<std::int64_t> begins_;  // where each bucket begins in it, and the end
};

}  // namespace ckd::cpu::CKD_TIER
