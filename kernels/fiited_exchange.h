// The exchange at the end of an adjustment: rows that lose chunks, then rows that gain some, in the
// order of their keys. Both walk a list whose rows are known ahead, so that what a row needs (its
// entry, its old and its new slot) is on its way before its turn.
#pragma once

#include "fiited_adjust.h"

namespace fiited {

struct Move {   // one row, and the chunks that it gains or loses
  u64 key;
  Segment* segment;   // with `index` where the row is, until the next insertion; null: look it up
  u32 index;
  u32 from;           // what its scores are found by
  float score;        // of a row that is admitted
  u16 table, bits;    // bit kAdmit: the row comes from the queue
};
static_assert(sizeof(Move) == 32, "two per cache line");
constexpr u16 kAdmit = 0x8000;

// Where a move's row is known, no search; a row that has gone in the meantime is none.
inline Found row_of(const Store& s, const Move& m) {
  if (!m.segment) return s.directory->find(m.key, m.table);
  return m.segment->tags[m.index] & 0x80 ? Found{} : s.directory->at(*m.segment, m.index);
}

// Largest prefix inside a bitmap (layout B), or the bitmap itself.
inline u16 closed(const Store& s, u16 bits) { return s.c.layout == kChunked ? bits : u16(bits & ~(bits + 1)); }

struct Ready { Found found; u16 want = 0; u32 slot = kNoSlot; };

// First step of a move, long before its turn: its entry and utilities.
FIITED_INLINE void touch(const Store& s, const Move& m) {
  if (m.segment) {
    __builtin_prefetch(m.segment->entries + m.index, 1);
    __builtin_prefetch(m.segment->utils + size_t(m.index) * s.c.max_chunks, 1);
  } else __builtin_prefetch(s.directory->tag_line(m.key));
}

// Second step: what the row will have and its slot of that length, taken now so that it loads.
inline Ready prepare(Store& s, const Move& m, bool grows) {
  Ready r;
  if (m.bits & kAdmit) {   // an admission may still move rows: found at its turn
    const Found cell = s.directory->vacancy(m.key);
    __builtin_prefetch(cell.entry, 1);
    __builtin_prefetch(cell.util, 1);
    s.sketch->prefetch(m.key);
    r.want = 1;
  } else {
    r.found = row_of(s, m);
    if (!r.found.entry) return r;
    const u16 have = r.found.entry->alive & kAliveMask;
    r.want = closed(s, grows ? u16(have | m.bits) : u16(have & ~m.bits));
    if (!r.want) s.sketch->prefetch(m.key);   // that is where it goes
    if (r.want == have || s.c.layout != kSlabs) return r;
    const u8* const old = s.pool->at(r.found.entry->slot, popcount(have));
    const int bytes = s.pool->bytes(std::min(popcount(have), popcount(r.want)));
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(old + at);
    s.pool->prefetch_mark(r.found.entry->slot);
  }
  if (r.want && s.c.layout == kSlabs && (r.slot = s.pool->alloc(popcount(r.want))) != kNoSlot) {
    u8* const fresh = s.pool->at(r.slot, popcount(r.want));
    const int bytes = s.pool->bytes(popcount(r.want));
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(fresh + at, 1);
  }
  return r;
}

// Calls f(move, ready) for all moves in turn, each prepared kAhead moves before.
template <class F> inline void each_move(Store& s, const Pile<Move>& moves, bool grows, F f) {
  constexpr size_t kAhead = 16;
  Ready ready[kAhead];
  const size_t n = moves.size();
  for (size_t i = 0; i < n + kAhead; ++i) {
    if (i + kAhead < n) touch(s, moves[i + kAhead]);
    Ready& r = ready[i % kAhead];
    if (i >= kAhead) f(moves[i - kAhead], r);
    if (i < n) r = prepare(s, moves[i], grows);
  }
}

inline void evict_rows(Store& s, const Pile<Move>& moves) {
  each_move(s, moves, false, [&](const Move&, const Ready& r) {
    if (!r.found.entry) return;
    s.set_alive(r.found, r.want, false, r.slot);
    if (!r.want) s.remove(r.found);
  });
}

// Rows of the directory come first: an admission may move the entries that moves point to.
inline void grow_rows(Store& s, const Pile<Move>& moves) {
  each_move(s, moves, true, [&](const Move& m, const Ready& r) {
    if (r.found.entry) { s.set_alive(r.found, r.want, false, r.slot); return; }
    if (!(m.bits & kAdmit)) return;
    Found f = s.directory->find(m.key, m.table);
    if (!f.entry) { s.admit(m.key, m.table, 1, m.score / s.tables[m.table].weight, r.slot); return; }
    if (r.slot != kNoSlot) s.pool->free(r.slot, 1);
    s.set_alive(f, closed(s, u16((f.entry->alive | 1) & kAliveMask)), false);
  });
}

inline void by_row(Pile<Move>& moves, size_t first, size_t end) {
  sort_nearly(moves.begin() + first, moves.begin() + end, [](const Move& a, const Move& b) {
    return a.key != b.key ? a.key < b.key : a.table < b.table;
  });
}

// One move per row, those of the directory first.
inline Pile<Move> moves_of(const std::vector<Item>& items) {
  Pile<Move> moves;
  for (const bool admit : {false, true}) {
    const size_t first = moves.size();
    for (const Item& item : items) {
      if (item.admit != admit) continue;
      Move* const last = moves.size() > first ? moves.end() - 1 : nullptr;
      const u16 bit = u16(1u << item.chunk);
      if (last && last->key == item.key && last->table == item.table) last->bits |= bit;
      else moves.push({item.key, nullptr, 0, 0, item.score, item.table, u16(admit ? bit | kAdmit : bit)});
    }
    by_row(moves, first, moves.size());
  }
  return moves;
}

// Evict s.victims, then grow s.growers, within the pool's bound. Both lists are consumed.
inline void apply_plan(Store& s) {
  evict_rows(s, moves_of(s.victims));
  const i64 room = std::max<i64>(0, s.free_slots());
  if (i64(s.growers.size()) > room) { s.n.refused += i64(s.growers.size()) - room; keep_best(s.growers, size_t(room)); }
  grow_rows(s, moves_of(s.growers));
  s.growers.clear();
  s.victims.clear();
}

}  // namespace fiited
