// Address manager: pages of a fixed size, carved into slots of one class (layout B: one class per
// row length; layout A: one class). An empty page goes back to a common list and can serve any
// class, which is how free space is merged. A bitmap per page makes a double free an error.
#pragma once

#include <algorithm>
#include <vector>

#include "fiited_memory.h"

namespace fiited {

struct Page {
  u8* base = nullptr;
  u32 cls = 0, live = 0, capacity = 0, hint = 0, level = 0, position = 0;
  u32 low = 0, high = 0;   // its level stays the same while low <= live < high
  std::vector<u64> used;
};

constexpr u32 kLevels = 16;   // fill levels 0..15 have room; 16 is full
constexpr u32 kNoSlot = 0xffffffffu;

class Pool {
 public:
  Pool(int classes, u32 chunk_bytes, i64 page_bytes, bool lifo, bool poison, Memory* memory)
      : lifo_(lifo), poison_(poison), chunk_bytes_(chunk_bytes), page_bytes_(page_bytes), memory_(memory) {
    classes_.resize(classes + 1);
    for (int m = 1; m <= classes; ++m) {
      classes_[m].bytes = u32(m) * chunk_bytes;
      classes_[m].per_page = u32(page_bytes / classes_[m].bytes);
    }
    while ((1u << index_bits_) < classes_[1].per_page) ++index_bits_;
  }

  i64 max_slots() const { return i64(classes_[1].per_page) << (32 - index_bits_); }
  u32 bytes(int m) const { return classes_[m].bytes; }
  u8* at(u32 slot, int m) const {
    const u32 page = slot >> index_bits_, index = slot & ((1u << index_bits_) - 1);
    return bases_[page] + size_t(index) * m * chunk_bytes_;
  }

  u32 alloc(int m) {
    Class& c = classes_[m];
    if (lifo_) {
      if (c.stack.empty() && carve(m) == kNoSlot) return kNoSlot;
      const u32 slot = c.stack.back();
      c.stack.pop_back();
      mark(slot);
      return slot;
    }
    if (c.open) return take(c.levels[31 - __builtin_clz(c.open)].back());
    const u32 page = carve(m);
    return page == kNoSlot ? kNoSlot : take(page);
  }

  bool free(u32 slot, int m) {
    const u32 number = slot >> index_bits_, index = slot & ((1u << index_bits_) - 1);
    if (number >= pages_.size()) return false;
    Page& page = pages_[number];
    if (!page.base || page.cls != u32(m) || index >= page.capacity) return false;
    if (!(page.used[index >> 6] >> (index & 63) & 1)) return false;   // double free
    if (poison_) std::memset(at(slot, m), 0xff, classes_[m].bytes);    // all NaN
    page.used[index >> 6] &= ~(u64(1) << (index & 63));
    if (index >> 6 < page.hint) page.hint = index >> 6;
    --page.live;
    classes_[m].live--;
    move_level(number);
    if (lifo_) classes_[m].stack.push_back(slot);
    else if (!page.live && classes_[m].free() > i64(page.capacity)) release(number);
    return true;
  }

  // The emptiest page of class m, when the class has more than a page and 3% of free room.
  u32 draining(int m) const {
    const Class& c = classes_[m];
    if (lifo_ || c.free() <= i64(c.per_page) + i64(c.live * 3 / 100)) return kNoSlot;
    for (const auto& level : c.levels) if (!level.empty()) return level.front();
    return kNoSlot;
  }
  FIITED_INLINE void prefetch_mark(u32 slot) const {   // what free() reads
    __builtin_prefetch(&pages_[slot >> index_bits_].used[(slot & ((1u << index_bits_) - 1)) >> 6], 1);
  }
  u32 page_of(u32 slot) const { return slot >> index_bits_; }
  bool fuller_page_exists(u32 page, int m) const {
    for (int level = kLevels - 1; level >= 0; --level)
      for (u32 other : classes_[m].levels[level]) if (other != page) return true;
    return false;
  }

  i64 mapped_bytes() const { return mapped_pages_ * page_bytes_; }
  i64 live_bytes() const {
    i64 sum = 0;
    for (const Class& c : classes_) sum += c.live * c.bytes;
    return sum;
  }
  i64 live(int m) const { return classes_[m].live; }
  bool used(u32 slot, int m) const {
    const u32 number = slot >> index_bits_, index = slot & ((1u << index_bits_) - 1);
    return number < pages_.size() && pages_[number].base && pages_[number].cls == u32(m) &&
           index < pages_[number].capacity && (pages_[number].used[index >> 6] >> (index & 63) & 1);
  }
  i64 counted_live() const {   // recount from the bitmaps
    i64 sum = 0;
    for (const Page& p : pages_) {
      if (!p.base) continue;
      for (u64 word : p.used) sum += __builtin_popcountll(word);
      sum -= i64(p.used.size()) * 64 - p.capacity;   // padding bits are always set
    }
    return sum;
  }
  void release_empty() {
    for (u32 i = 0; i < pages_.size(); ++i)
      if (pages_[i].base && !pages_[i].live && !lifo_) release(i);
  }

 private:
  struct Class {
    u32 bytes = 0, per_page = 0;
    i64 live = 0, capacity = 0;
    std::vector<u32> levels[kLevels + 1], stack;
    u32 open = 0;   // bits of the levels below kLevels that have a page
    i64 free() const { return capacity - live; }
  };

  u32 take(u32 number) {
    Page& page = pages_[number];
    u32 word = page.hint;
    while (page.used[word] == ~u64(0)) ++word;
    page.hint = word;
    const u32 index = word * 64 + __builtin_ctzll(~page.used[word]);
    const u32 slot = number << index_bits_ | index;
    mark(slot);
    return slot;
  }
  void mark(u32 slot) {
    const u32 number = slot >> index_bits_, index = slot & ((1u << index_bits_) - 1);
    Page& page = pages_[number];
    page.used[index >> 6] |= u64(1) << (index & 63);
    ++page.live;
    classes_[page.cls].live++;
    move_level(number);
  }
  void move_level(u32 number) {
    Page& page = pages_[number];
    if (page.live - page.low < page.high - page.low) return;
    unlist(number);
    list(number, page.live == page.capacity ? kLevels : page.live * kLevels / page.capacity);
  }
  void unlist(u32 number) {
    Page& page = pages_[number];
    auto& from = classes_[page.cls].levels[page.level];
    from[page.position] = from.back();
    pages_[from[page.position]].position = page.position;
    from.pop_back();
    if (from.empty()) classes_[page.cls].open &= ~(1u << page.level);
  }
  void list(u32 number, u32 level) {
    Page& page = pages_[number];
    auto& to = classes_[page.cls].levels[level];
    page.level = level;
    page.low = level == kLevels ? page.capacity : (level * page.capacity + kLevels - 1) / kLevels;
    page.high = level == kLevels ? page.capacity + 1
                                 : std::min(page.capacity, ((level + 1) * page.capacity + kLevels - 1) / kLevels);
    page.position = u32(to.size());
    to.push_back(number);
    if (level < kLevels) classes_[page.cls].open |= 1u << level;
  }
  u32 carve(int m) {
    u32 number = vacant_.empty() ? u32(pages_.size()) : vacant_.back();
    if (number >> (32 - index_bits_)) return kNoSlot;   // beyond the width of a reference
    u8* base = memory_->map_page();
    if (!base) return kNoSlot;
    if (!vacant_.empty()) vacant_.pop_back();
    else {
      pages_.emplace_back();
      bases_.push_back(nullptr);
    }
    Page& page = pages_[number];
    page.base = bases_[number] = base;
    page.cls = m; page.live = 0; page.capacity = classes_[m].per_page; page.hint = 0;
    page.used.assign((page.capacity + 63) / 64, 0);
    for (u32 i = page.capacity; i < page.used.size() * 64; ++i) page.used[i >> 6] |= u64(1) << (i & 63);
    classes_[m].capacity += page.capacity;
    ++mapped_pages_;
    list(number, 0);
    for (u32 i = lifo_ ? page.capacity : 0; i-- > 0;)
      classes_[m].stack.push_back(number << index_bits_ | i);
    return number;
  }
  void release(u32 number) {
    Page& page = pages_[number];
    unlist(number);
    classes_[page.cls].capacity -= page.capacity;
    memory_->unmap_page(page.base);
    page.base = bases_[number] = nullptr;
    page.used.clear();
    vacant_.push_back(number);
    --mapped_pages_;
  }

  bool lifo_, poison_;
  u32 chunk_bytes_;
  int index_bits_ = 0;
  i64 page_bytes_, mapped_pages_ = 0;
  Memory* memory_;
  std::vector<Class> classes_;
  std::vector<Page> pages_;
  std::vector<u8*> bases_;
  std::vector<u32> vacant_;
};

}  // namespace fiited
