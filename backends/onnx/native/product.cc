#include "product.h"

#include <algorithm>
#include <utility>

namespace moecc {
namespace {

// So many items keep several threads busy to the end. Results do not depend on the number of
// threads.
constexpr int64_t ITEMS = 16;
constexpr int64_t LEAST_COLUMNS = 2, MOST_ROWS = 8;  // blocks per item

int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void Product::add(const Coded& matrix, const int64_t* which, int64_t count) {
  if (!count) return;
  jobs_.push_back({matrix, static_cast<int64_t>(which_.size()), count, 1, 0});
  which_.insert(which_.end(), which, which + count);
  job_of_.resize(which_.size(), static_cast<int64_t>(jobs_.size()) - 1);
}

void Product::cut() {
  int64_t lookups = 0, rows = 0;
  for (const Job& job : jobs_)
    if (by_lookup(job))
      lookups++;
    else
      rows += job.matrix.row_blocks;
  const int64_t step = std::clamp<int64_t>(rows / ITEMS, 1, MOST_ROWS);
  for (size_t j = 0; j < jobs_.size(); j++) {
    Job& job = jobs_[j];
    const int64_t id = static_cast<int64_t>(j), columns = job.matrix.column_blocks;
    if (!by_lookup(job)) {
      for (int64_t row = 0; row < job.matrix.row_blocks; row += step)
        items_.push_back({id, 0, row, std::min(row + step, job.matrix.row_blocks)});
      continue;
    }
    job.parts = std::clamp<int64_t>(quotient(ITEMS, lookups), 1, quotient(columns, LEAST_COLUMNS));
    for (int64_t part = 0; part < job.parts; part++)
      items_.push_back({id, part, columns * part / job.parts, columns * (part + 1) / job.parts});
  }
}

void Product::place_results() {
  int64_t size = 0;
  for (const Job& job : jobs_) size += job.parts * job.count * job.matrix.row_blocks * BLOCK;
  memory_ = std::make_unique<Buffer<float>>(size);
  float* next = memory_->at(0);
  for (Job& job : jobs_) {
    job.first_result = static_cast<int64_t>(results_.size());
    for (int64_t i = 0; i < job.parts * job.count; i++, next += job.matrix.row_blocks * BLOCK) results_.push_back(next);
  }
}

void Product::prepare(const Parallel& parallel) {
  for (int64_t row : which_) x_.push_back(rows_ + row * stride_);
  if (!kernels_.prepare) {
    prepared_.assign(x_.begin(), x_.end());
    return;
  }
  std::vector<int64_t> rows;  // the inputs of any job that multiplies
  std::vector<char> seen(static_cast<size_t>(row_count_), 0);
  for (const Job& job : jobs_)
    for (int64_t i = job.first; i < job.first + job.count && !by_lookup(job); i++)
      if (!std::exchange(seen[which_[i]], 1)) rows.push_back(which_[i]);
  if (rows.empty()) return;
  const int64_t bytes = kernels_.prepared_bytes(stride_ / BLOCK);
  prepared_memory_ = std::make_unique<Buffer<uint8_t>>(bytes * row_count_);
  for (int64_t row : which_) prepared_.push_back(prepared_memory_->at(row * bytes));
  parallel.each(static_cast<int64_t>(rows.size()), [&](int64_t i) noexcept {
    kernels_.prepare(rows_ + rows[i] * stride_, stride_ / BLOCK, prepared_memory_->at(rows[i] * bytes));
  });
}

void Product::run(const Parallel& parallel) {
  if (jobs_.empty()) return;
  cut();
  place_results();
  prepare(parallel);
  parallel.each(static_cast<int64_t>(items_.size()), [&](int64_t i) noexcept { run(items_[i]); });
}

void Product::run(const Item& item) const {
  const Job& job = jobs_[item.job];
  float* const* y = results_.data() + job.first_result + item.part * job.count;
  if (by_lookup(job))
    kernels_.lookup(job.matrix, x_.data() + job.first, y, job.count, item.first, item.last);
  else
    kernels_.multiply(job.matrix, prepared_.data() + job.first, y, job.count, item.first, item.last);
}

float* Product::result(int64_t entry) const {
  const Job& job = jobs_[job_of_[entry]];
  float* const* parts = results_.data() + job.first_result + (entry - job.first);
  for (int64_t part = 1; part < job.parts; part++)
    kernels_.add(parts[0], 1.0f, parts[part * job.count], job.matrix.row_blocks * BLOCK);
  return parts[0];
}

}  // namespace moecc
