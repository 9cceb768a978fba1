// Many coded products at once: several matrices, each with its own inputs, cut into parts for the
// threads.
#pragma once
#include <memory>
#include <vector>

#include "buffer.h"
#include "layer.h"

namespace moecc {

class Product {
 public:
  // The inputs are rows of `rows` [row_count, stride], padded with zeros to whole blocks.
  Product(const Kernels& kernels, const float* rows, int64_t row_count, int64_t stride)
      : kernels_(kernels), rows_(rows), row_count_(row_count), stride_(stride) {
    which_.reserve(row_count);
    job_of_.reserve(row_count);
  }

  // Adds the products of `matrix` with rows which[0..count-1] as the next entries, in this order.
  void add(const Coded& matrix, const int64_t* which, int64_t count);
  void run(const Parallel& parallel);
  // Returns an entry's result [64 row_blocks], which the caller may write over. Call it once per
  // entry.
  float* result(int64_t entry) const;

 private:
  struct Job {
    Coded matrix;
    int64_t first, count;         // entries
    // An entry's result is the sum of its parts' results, which are [parts, count].
    int64_t parts, first_result;
  };
  // The work of one thread: blocks first..last-1 of a job, of columns for lookup, else of rows.
  struct Item {
    int64_t job, part, first, last;
  };
  bool by_lookup(const Job& job) const {
    const int64_t few = job.matrix.v == 4 ? kernels_.few_of_four : kernels_.few_of_two;
    return !job.matrix.signs && job.count <= few && job.matrix.row_blocks >= kernels_.least_row_blocks;
  }
  void cut();
  void place_results();
  void prepare(const Parallel& parallel);
  void run(const Item& item) const;

  const Kernels& kernels_;
  const float* rows_;
  int64_t row_count_, stride_;
  std::vector<Job> jobs_;
  std::vector<Item> items_;
  std::vector<int64_t> which_, job_of_;  // of an entry
  std::vector<const float*> x_;          // of an entry
  std::vector<const void*> prepared_;    // of an entry
  std::vector<float*> results_;
  std::unique_ptr<Buffer<float>> memory_;
  std::unique_ptr<Buffer<uint8_t>> prepared_memory_;
};

}  // namespace moecc
