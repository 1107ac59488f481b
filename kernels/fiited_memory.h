// Where memory comes from: pages of pool and directory, large arrays; all on huge pages where there are any.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "fiited_types.h"

namespace fiited {

constexpr i64 kHuge = i64(2) << 20;

// Memory to be freed with std::free.
inline void* allocate(size_t bytes) {
  const size_t rounded = (bytes + size_t(kHuge) - 1) / size_t(kHuge) * size_t(kHuge);
  const bool large = bytes >= size_t(kHuge);
  void* const p = large ? std::aligned_alloc(size_t(kHuge), rounded) : std::malloc(bytes);
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (large) madvise(p, rounded, MADV_HUGEPAGE);   // a hint: 4 KiB pages work too, only slower
#endif
  return p;
}

// For vectors whose cells are read in no order.
template <class T> struct Large {
  using value_type = T;
  Large() = default;
  template <class U> Large(const Large<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(fiited::allocate(n * sizeof(T))); }
  void deallocate(T* p, size_t) { std::free(p); }
  template <class U> bool operator==(const Large<U>&) const { return true; }
  template <class U> bool operator!=(const Large<U>&) const { return false; }
};
template <class T> using LargeVector = std::vector<T, Large<T>>;

// An array for plain values that grows without setting what it adds. Large ones lie on huge pages.
template <class T> class Pile {
 public:
  size_t size() const { return n_; }
  i64 bytes() const { return i64(room_ * sizeof(T)); }
  T* begin() { return data_.get(); }
  T* end() { return data_.get() + n_; }
  const T* begin() const { return data_.get(); }
  const T* end() const { return data_.get() + n_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  // Room for `more` values at the end, to be written before grow() takes some of them in.
  T* next(size_t more = 1) {
    if (n_ + more > room_) enlarge(n_ + more + n_ / 2);
    return data_.get() + n_;
  }
  void grow(size_t more) { n_ += more; }
  void push(const T& value) { *next() = value; ++n_; }
  void cut_to(size_t n) { n_ = n; }
  template <class F> void drop_if(F f) { n_ = size_t(std::remove_if(begin(), end(), f) - begin()); }

 private:
  void enlarge(size_t room) {
    std::unique_ptr<T[], Free> wider(static_cast<T*>(allocate(room * sizeof(T))));
    std::copy(begin(), end(), wider.get());
    data_ = std::move(wider);
    room_ = room;
  }
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T[], Free> data_;
  size_t n_ = 0, room_ = 0;
};

// Pages of one size, cut from large regions so that small pages too can lie on huge pages. Counts
// the real bytes of pool, directory and sketch together against one limit.
class Memory {
 public:
  i64 limit = 0, mapped = 0, peak = 0;
  explicit Memory(i64 page_bytes) : page_bytes_(page_bytes) {}
  ~Memory() { for (u8* region : regions_) munmap(region, kRegion); }

  bool take(i64 bytes) {
    if (limit && mapped + bytes > limit) return false;
    mapped += bytes;
    if (mapped > peak) peak = mapped;
    return true;
  }
  u8* map_page() {   // zeroed, or null where the limit or the system forbids it
    if (!spare_.empty()) {
      u8* page = spare_.back();
      spare_.pop_back();
      std::memset(page, 0, size_t(page_bytes_));
      return page;
    }
    if (!take(page_bytes_)) return nullptr;
    if (!vacant_.empty()) {
      u8* page = vacant_.back();
      vacant_.pop_back();
      return page;
    }
    if (regions_.empty() || used_ + page_bytes_ > kRegion) {
      u8* region = map_region();
      if (!region) { mapped -= page_bytes_; return nullptr; }
      regions_.push_back(region);
      used_ = 0;
    }
    u8* page = regions_.back() + used_;
    used_ += page_bytes_;
    return page;
  }
  void unmap_page(u8* page) {
    // Part of a huge page that goes back comes again as small pages: a few are kept as they are.
    if (page_bytes_ % kHuge && spare_.size() < kSpare) {
      spare_.push_back(page);
      return;
    }
    give_back(page);
  }
  void release_spare() {
    for (u8* page : spare_) give_back(page);
    spare_.clear();
  }

 private:
  void give_back(u8* page) {
    madvise(page, page_bytes_, MADV_DONTNEED);   // the bytes go back to the system at once
    vacant_.push_back(page);
    mapped -= page_bytes_;
  }
  static constexpr i64 kRegion = i64(64) << 20;
  static u8* map_region() {
    void* p = mmap(nullptr, kRegion + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    u8* raw = static_cast<u8*>(p);
    u8* start = reinterpret_cast<u8*>((reinterpret_cast<size_t>(raw) + kHuge - 1) & ~size_t(kHuge - 1));
    if (start > raw) munmap(raw, start - raw);
    if (start + kRegion < raw + kRegion + kHuge) munmap(start + kRegion, raw + kHuge - start);
#ifdef MADV_HUGEPAGE
    madvise(start, kRegion, MADV_HUGEPAGE);   // a hint: 4 KiB pages work too, only slower
#endif
    return start;
  }
  i64 page_bytes_, used_ = 0;
  static constexpr size_t kSpare = 2;
  std::vector<u8*> regions_, vacant_, spare_;
};

}  // namespace fiited
