// Directory of resident rows: extendible hashing over segments of one page each. Inside a segment,
// groups of 16 seven-bit tags are compared at once; keys are compared in full, so two rows never
// share an entry by accident. A full segment splits in two, which bounds the cost of any insertion.
//
// Utilities lie beside the entries: u[j] >= 0 in size, with the sign bit set where chunk j is
// alive. A pass over utilities alone is then enough to build the histogram of a round.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cmath>
#include <vector>

#include "fiited_pool.h"
#include "fiited_types.h"

namespace fiited {

constexpr u8 kEmpty = 0x80, kDeleted = 0xfe;

inline u32 match_group(const u8* tags, u8 tag) {
#ifdef __SSE2__
  const __m128i group = _mm_load_si128(reinterpret_cast<const __m128i*>(tags));
  return u32(_mm_movemask_epi8(_mm_cmpeq_epi8(group, _mm_set1_epi8(char(tag)))));
#else
  u32 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= u32(tags[i] == tag) << i;
  return mask;
#endif
}

// Bits of the cells of a group that hold a row.
inline u32 live_group(const u8* tags) {
#ifdef __SSE2__
  return ~u32(_mm_movemask_epi8(_mm_load_si128(reinterpret_cast<const __m128i*>(tags)))) & 0xffff;
#else
  u32 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= u32(tags[i] < 0x80) << i;
  return mask;
#endif
}

struct Segment {
  u8* block;
  u8* tags;
  Entry* entries;
  float* utils;
  u32* refs;
  u32 groups, live = 0, tombs = 0;
  u32 reach = 0;   // no row lies further than this many groups behind its home
  int depth;
  u64 prefix;   // the top `depth` bits of every key, left-aligned
};

struct Found {
  Entry* entry = nullptr;
  float* util = nullptr;
  u32* refs = nullptr;
};

struct Home { const Segment* segment; const u8* tags; u32 cell, hits; };

class Directory {
 public:
  Directory(int k, bool with_refs, i64 page_bytes, Memory* memory)
      : k_(k), with_refs_(with_refs), page_bytes_(page_bytes), memory_(memory) {
    const i64 row = 1 + sizeof(Entry) + 4 * k * (with_refs ? 2 : 1);
    groups_ = u32((page_bytes - 64) / (16 * row));
  }
  ~Directory() { for_each([](Segment& s) { delete &s; }); }
  bool open() { Segment* s = make(0, 0); if (s) table_.push_back(s); return s != nullptr; }

  Segment& segment_of(u64 v) const { return *table_[depth_ ? v >> (64 - depth_) : 0]; }
  // Rises with the key inside a segment, so a range of keys is a range of groups.
  static u32 home(const Segment& s, u64 v) { return u32(((v << s.depth) >> 32) * s.groups >> 32); }
  const u8* tag_line(u64 v) const {
    const Segment& s = segment_of(v);
    return s.tags + size_t(home(s, v)) * 16;
  }

  // find() in three steps, for many rows at once: where its tags are; the first cell whose tag is its own, in
  // its home or behind it; whether that is the row. No cell, no row: then no entry is read.
  Home home_of(u64 v) const {
    const Segment& s = segment_of(v);
    const u32 g = home(s, v);
    return {&s, s.tags + size_t(g) * 16, g * 16, 0};
  }
  void look(Home& h, u64 v) const {
    const u8 tag = u8(v & 0x7f);
    h.hits = match_group(h.tags, tag);
    while (!h.hits && !match_group(h.tags, kEmpty)) {
      h.cell += 16;
      h.tags += 16;
      if (h.cell == h.segment->groups * 16) { h.cell = 0; h.tags = h.segment->tags; }
      h.hits = match_group(h.tags, tag);
    }
    if (h.hits) __builtin_prefetch(h.segment->entries + h.cell + __builtin_ctz(h.hits));
  }
  Found settle(const Home& h, u64 v, u16 table) const {
    if (!h.hits) return {};
    const u32 cell = h.cell + u32(__builtin_ctz(h.hits));
    const Entry& e = h.segment->entries[cell];
    return e.key == v && e.table == table ? at(*h.segment, cell) : find(v, table);
  }

  // Where insert() would most likely put a row.
  Found vacancy(u64 v) const {
    const Segment& s = segment_of(v);
    const u32 g = home(s, v);
    const u32 taken = live_group(s.tags + size_t(g) * 16);
    return at(s, size_t(g) * 16 + (taken == 0xffff ? 0 : __builtin_ctz(~taken)));
  }

  Found find(u64 v, u16 table, u32* probes = nullptr) const {
    const Segment& s = segment_of(v);
    u32 g = home(s, v), steps = 1;
    const u8 tag = u8(v & 0x7f);
    Found found;
    for (;; ++steps) {
      const u8* tags = s.tags + size_t(g) * 16;
      for (u32 hits = match_group(tags, tag); hits; hits &= hits - 1) {
        const size_t i = size_t(g) * 16 + __builtin_ctz(hits);
        if (s.entries[i].key == v && s.entries[i].table == table) {
          found = at(s, i);
          if (probes) *probes = steps;
          return found;
        }
      }
      if (match_group(tags, kEmpty) || steps > s.groups) break;
      if (++g == s.groups) g = 0;
    }
    if (probes) *probes = steps;
    return found;
  }

  Found at(const Segment& s, size_t i) const {
    Found found;
    found.entry = s.entries + i;
    found.util = s.utils + i * k_;
    if (with_refs_) found.refs = s.refs + i * k_;
    return found;
  }

  // The row must be absent. Returns a null entry when the memory limit forbids a split.
  Found insert(u64 v, u16 table) {
    while (segment_of(v).live + segment_of(v).tombs >= u64(groups_) * 16 * 13 / 16)
      if (!split(v)) {
        if (segment_of(v).live + segment_of(v).tombs >= u64(groups_) * 16 - 16) return {};
        break;   // over the usual load, but correct: one group at least stays empty
      }
    ++rows_;
    const size_t i = place(segment_of(v), v);
    Found f = at(segment_of(v), i);
    std::memset(f.entry, 0, sizeof(Entry));
    f.entry->key = v;
    f.entry->table = table;
    std::memset(f.util, 0, 4 * k_);
    if (f.refs) std::memset(f.refs, 0, 4 * k_);
    return f;
  }

  void erase(Entry* entry) {
    Segment& s = segment_of(entry->key);
    const size_t i = size_t(entry - s.entries);
    u8* group = s.tags + (i & ~size_t(15));
    const bool open_group = match_group(group, kEmpty) != 0;
    s.tags[i] = open_group ? kEmpty : kDeleted;
    s.tombs += !open_group;
    std::memset(s.utils + i * k_, 0, 4 * k_);
    --s.live;
    --rows_;
    ++version;
  }

  template <class F> void for_each(F f) const {
    for (size_t i = 0; i < table_.size();) {
      Segment* s = table_[i];
      i += size_t(1) << (depth_ - s->depth);
      f(*s);   // may free the segment
    }
  }
  // Call f(segment, begin, end, whole) for the cells that may hold keys of [low, high]; `whole`
  // tells that no key needs checking.
  template <class F> void for_range(u64 low, u64 high, F f) const {
    for_each([&](Segment& s) {
      const u64 last = s.depth ? s.prefix | (~u64(0) >> s.depth) : ~u64(0);
      if (last < low || s.prefix > high) return;
      if (s.prefix >= low && last <= high) { f(s, size_t(0), capacity(s), true); return; }
      const u32 from = s.prefix >= low ? 0 : home(s, low);
      const u32 to = (last <= high ? s.groups - 1 : home(s, high)) + s.reach;
      if (to - from >= s.groups) { f(s, size_t(0), capacity(s), false); return; }
      f(s, size_t(from) * 16, size_t(to < s.groups ? to + 1 : s.groups) * 16, false);
      if (to >= s.groups) f(s, size_t(0), size_t(to - s.groups + 1) * 16, false);
    });
  }

  i64 rows() const { return rows_; }
  i64 mapped_bytes() const { return segments_ * page_bytes_; }
  i64 segments() const { return segments_; }
  size_t capacity(const Segment& s) const { return size_t(s.groups) * 16; }
  u64 version = 1;   // changes whenever an entry may have moved or gone

 private:
  Segment* make(int depth, u64 prefix) {
    u8* block = memory_->map_page();
    if (!block) return nullptr;
    const size_t n = size_t(groups_) * 16;
    Segment* s = new Segment{};
    s->block = block;
    s->groups = groups_;
    s->depth = depth;
    s->prefix = prefix;
    s->tags = block;
    s->entries = reinterpret_cast<Entry*>(block + ((n + 63) & ~size_t(63)));
    s->utils = reinterpret_cast<float*>(s->entries + n);
    s->refs = with_refs_ ? reinterpret_cast<u32*>(s->utils + n * k_) : nullptr;
    std::memset(s->tags, kEmpty, n);
    ++segments_;
    return s;
  }

  void drop(Segment* s) {
    memory_->unmap_page(s->block);
    --segments_;
    delete s;
  }

  size_t place(Segment& s, u64 v) {
    u32 g = home(s, v), room, steps = 0;
    for (;; ++steps) {   // an empty or a deleted cell: both have the top bit of the tag set
      const u8* tags = s.tags + size_t(g) * 16;
      room = match_group(tags, kEmpty) | match_group(tags, kDeleted);
      if (room) break;
      if (++g == s.groups) g = 0;
    }
    if (steps > s.reach) s.reach = steps;
    const size_t i = size_t(g) * 16 + __builtin_ctz(room);
    s.tombs -= s.tags[i] == kDeleted;
    s.tags[i] = u8(v & 0x7f);
    ++s.live;
    return i;
  }

  void copy(const Segment& from, size_t i, Segment& to) {
    const size_t j = place(to, from.entries[i].key);
    to.entries[j] = from.entries[i];
    std::memcpy(to.utils + j * k_, from.utils + i * k_, 4 * k_);
    if (with_refs_) std::memcpy(to.refs + j * k_, from.refs + i * k_, 4 * k_);
  }

  // Replace the segment of v by two (or by one clean copy where tombstones are what fills it).
  bool split(u64 v) {
    Segment* old = &segment_of(v);
    const size_t n = capacity(*old);
    const bool clean = old->tombs > n / 8 && old->live < n * 11 / 16;
    if (!clean && old->depth == depth_) {
      if (depth_ >= 40) return false;
      std::vector<Segment*> wide(table_.size() * 2);
      for (size_t i = 0; i < table_.size(); ++i) wide[2 * i] = wide[2 * i + 1] = table_[i];
      table_.swap(wide);
      ++depth_;
    }
    const int depth = old->depth + !clean;
    const u64 bit = clean ? 0 : u64(1) << (64 - depth);
    Segment* low = make(depth, old->prefix);
    if (!low) return false;
    Segment* high = clean ? low : make(depth, old->prefix | bit);
    if (!high) { drop(low); return false; }
    for (size_t i = 0; i < n; ++i)
      if (!(old->tags[i] & 0x80)) copy(*old, i, old->entries[i].key & bit ? *high : *low);
    for (size_t i = 0; i < table_.size(); ++i)
      if (table_[i] == old) table_[i] = bit && (i >> (depth_ - depth) & 1) ? high : low;
    drop(old);
    ++version;
    return true;
  }

  int k_;
  bool with_refs_;
  int depth_ = 0;
  i64 page_bytes_, rows_ = 0, segments_ = 0;
  u32 groups_;
  Memory* memory_;
  std::vector<Segment*> table_;
};

}  // namespace fiited
