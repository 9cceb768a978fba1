// Memory that lives during one call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace moecc {

// Uninitialised memory that starts with a cache line. Throws std::bad_alloc if there is none.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(allocate(count)) {}
  T* at(int64_t i) const { return data_.get() + i; }

 private:
  static constexpr std::align_val_t LINE{64};
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, LINE); }
  };
  static T* allocate(int64_t count) {
    if (count < 0 || static_cast<uint64_t>(count) > UINT64_MAX / 2 / sizeof(T)) throw std::bad_alloc();
    return static_cast<T*>(::operator new[](static_cast<size_t>(count) * sizeof(T), LINE));
  }
  std::unique_ptr<T[], Free> data_;
};

}  // namespace moecc
