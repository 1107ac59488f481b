// Rows on the move: ragged pull and push between trainers and shards, export and import of state.
#pragma once

#include "fiited_rows.h"

extern "C" {

// Virtual rows of ids, so that a trainer can route without holding a store.
void fiited_virtual_rows(const fiited::TableConfig* table, const fiited::i64* ids, fiited::i64 n, fiited::u64* out) {
  for (fiited::i64 i = 0; i < n; ++i) out[i] = fiited::virtual_row(*table, fiited::u64(ids[i]));
}
void fiited_raw_ids(const fiited::TableConfig* table, const fiited::u64* keys, fiited::i64 n, fiited::i64* out) {
  for (fiited::i64 i = 0; i < n; ++i) out[i] = fiited::i64(fiited::unmix(keys[i]) ^ table->seed);
}

// lens[n]: bitmap of alive chunks; values: the alive chunks, one row after the other. Returns floats written.
fiited::i64 fiited_pull(void* raw, const fiited::u64* keys, const fiited::u16* tables, fiited::i64 n, fiited::i32 train,
                        fiited::u16* alive, float* values) {
  using namespace fiited;
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    if (train && s.frozen) return kFrozen;
    if (train && s.c.admit_after == 0)
      for (i64 i = 0; i < n; ++i)
        if (!s.directory->find(keys[i], tables[i]).entry && s.free_slots() >= s.tables[tables[i]].chunks)
          s.admit(keys[i], tables[i], s.full_mask(tables[i]), 0.0f);
    float* out = values;
    for (i64 i = 0; i < n; ++i) {
      Row r{};
      r.v = keys[i]; r.table = tables[i];
      s.resolve(r);
      if (train) { ++s.n.lookups; if (r.e) ++s.n.hits; else s.saw_row(r.v, r.table); }
      alive[i] = r.alive;
      if (!r.e) continue;
      each_chunk(s, r, [&](int, const u8* w) { s.read_weights(out, w, s.c.chunk); out += s.c.chunk; });
    }
    return out - values;
  });
}

// One optimizer step per row. alive[n]: chunks whose gradients are in `grads`; `norms` holds the
// gradient norms of the row's other chunks, in order. Returns the number of rejected rows.
fiited::i64 fiited_push(void* raw, const fiited::u64* keys, const fiited::u16* tables, const fiited::u32* counts,
                        const fiited::u16* alive, const float* grads, const float* norms, fiited::i64 n, float lr, float unit) {
  using namespace fiited;
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    if (s.frozen) return kFrozen;
    alignas(64) float g[4096];
    float missing[kMaxChunks];
    i64 rejected = 0;
    const int C = s.c.chunk;
    for (i64 i = 0; i < n; ++i) {
      Row r{};
      r.v = keys[i]; r.table = tables[i]; r.count = counts[i];
      s.resolve(r);
      const int k = s.tables[r.table].chunks;
      for (int j = 0; j < k; ++j) {
        if (alive[i] >> j & 1) {
          std::memcpy(g + j * C, grads, size_t(C) * 4);
          grads += C;
          missing[j] = std::sqrt(dot_chunk<4>(g + j * C, g + j * C, C));
        } else {
          std::memset(g + j * C, 0, size_t(C) * 4);
          missing[j] = *norms++;
        }
      }
      rejected += !(wide_lanes(s) ? apply_row<8>(s, r, g, missing, lr, unit) : apply_row<4>(s, r, g, missing, lr, unit));
    }
    return rejected;
  });
}

// Number of rows and of floats of rows whose key is in [low, high].
fiited::i64 fiited_count(void* raw, fiited::u64 low, fiited::u64 high, fiited::i64* floats) {
  using namespace fiited;
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    i64 rows = 0;
    *floats = 0;
    s.directory->for_range(low, high, [&](Segment& g, size_t begin, size_t end, bool) {
      for (size_t i = begin; i < end; ++i) {
        if (g.tags[i] & 0x80 || g.entries[i].key < low || g.entries[i].key > high) continue;
        ++rows;
        *floats += i64(popcount(g.entries[i].alive & kAliveMask)) * s.c.chunk * (1 + s.states);
      }
    });
    return rows;
  });
}

// Rows of a key range: entries as they are, k utilities each, and per alive chunk weights then states.
fiited::i64 fiited_export(void* raw, fiited::u64 low, fiited::u64 high, fiited::Entry* entries, float* utils, float* values,
                          fiited::i64 room) {
  using namespace fiited;
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    i64 rows = 0;
    const int k = s.c.max_chunks, C = s.c.chunk;
    s.directory->for_range(low, high, [&](Segment& g, size_t begin, size_t end, bool) {
      for (size_t i = begin; i < end; ++i) {
        if (g.tags[i] & 0x80 || g.entries[i].key < low || g.entries[i].key > high || rows >= room) continue;
        Found f = s.directory->at(g, i);
        Row r{f.entry->key, f.entry, f.util, nullptr, f.refs, 0, 0, f.entry->table, u16(f.entry->alive & kAliveMask)};
        if (s.c.layout == kSlabs) r.w = s.pool->at(f.entry->slot, popcount(f.entry->alive & kAliveMask));
        entries[rows] = *f.entry;
        entries[rows].slot = 0;
        for (int j = 0; j < k; ++j) utils[rows * k + j] = std::fabs(f.util[j]);
        each_chunk(s, r, [&](int j, const u8* w) {
          s.read_weights(values, w, C);
          values += C;
          for (int part = 0; part < s.states; ++part, values += C) std::memcpy(values, s.state_at(r, j, part), size_t(C) * 4);
        });
        ++rows;
      }
    });
    return rows;
  });
}

// Adds exported rows whose bucket (top 12 bits) is owned. Rows must be absent; chunks that do not fit
// the budget are left out (the caller passes the most useful rows first).
fiited::i64 fiited_import(void* raw, const fiited::Entry* entries, const float* utils, const float* values, fiited::i64 n,
                          const fiited::u8* owned) {
  using namespace fiited;
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    i64 rows = 0;
    const int k = s.c.max_chunks, C = s.c.chunk;
    for (i64 i = 0; i < n; ++i) {
      const Entry& from = entries[i];
      const u16 bits = from.alive & kAliveMask;
      const float* row_values = values;
      values += i64(popcount(bits)) * C * (1 + s.states);
      if (!owned[from.key >> 52]) continue;
      if (s.directory->find(from.key, from.table).entry) return kDuplicate;
      u16 want = closed(s, bits);
      while (popcount(want) > s.free_slots()) want = u16(want & ~(1u << (31 - __builtin_clz(want))));
      if (!want) continue;
      Found f = s.directory->insert(from.key, from.table);
      if (!f.entry) continue;
      std::memcpy(f.util, utils + i * k, 4 * size_t(k));
      f.entry->alive = from.alive & kPinned;
      f.entry->acc = from.acc; f.entry->touched = from.touched; f.entry->updates = from.updates;
      if (!s.set_alive(f, want, false)) { s.directory->erase(f.entry); continue; }
      f.entry->grown = from.grown;
      s.pinned += (from.alive & kPinned) ? 1 : 0;
      Row r{f.entry->key, f.entry, f.util, nullptr, f.refs, 0, 0, f.entry->table, u16(f.entry->alive & kAliveMask)};
      if (s.c.layout == kSlabs) r.w = s.pool->at(f.entry->slot, popcount(want));
      int at = 0;
      for (u32 m = bits; m; m &= m - 1, ++at) {
        const int j = __builtin_ctz(m);
        if (!(want >> j & 1)) continue;
        const float* from_chunk = row_values + i64(at) * (1 + s.states) * C;
        s.write_weights(s.chunk_at(r, j), from_chunk, C);
        for (int part = 0; part < s.states; ++part)
          std::memcpy(s.state_at(r, j, part), from_chunk + (part + 1) * C, size_t(C) * 4);
      }
      ++rows;
    }
    return rows;
  });
}

// Clock, scale and sketch: what a checkpoint needs beside the rows. `set` = 0 reads, 1 writes.
fiited::i64 fiited_clock(void* raw, fiited::i32 set, fiited::i64* integers, double* reals, float* window) {
  using namespace fiited;
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    if (set) {
      s.step = u32(integers[0]); s.round = u32(integers[1]);
      s.scale = reals[0]; s.window_weight = reals[1]; s.cut = {float(reals[2]), u64(integers[2])};
      std::copy(window, window + kBins, s.window.begin());
    } else {
      integers[0] = s.step; integers[1] = s.round; integers[2] = i64(s.cut.tie);
      reals[0] = s.scale; reals[1] = s.window_weight; reals[2] = s.cut.score;
      std::copy(s.window.begin(), s.window.end(), window);
    }
    return kOk;
  });
}
fiited::i64 fiited_sketch(void* raw, fiited::i32 set, fiited::u32* cells, fiited::i64 n) {
  using namespace fiited;
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    LargeVector<u32>& mine = s.sketch->cells();
    if (cells && n != i64(mine.size())) return kBadArgument;
    if (cells && set) std::copy(cells, cells + n, mine.begin());
    else if (cells) std::copy(mine.begin(), mine.end(), cells);
    return i64(mine.size());
  });
}
// Candidates that wait for the next round, 16 bytes each. `set` = 0 reads (null: the number only).
fiited::i64 fiited_queue(void* raw, fiited::i32 set, fiited::Candidate* items, fiited::i64 n) {
  using namespace fiited;
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    if (items && set) s.queue.assign(items, items + n);
    else if (items) std::copy(s.queue.begin(), s.queue.end(), items);
    return i64(s.queue.size());
  });
}
// Chunks alive on other shards, at load time.
fiited::i64 fiited_elsewhere(void* raw, fiited::i64 chunks) {
  using namespace fiited;
  return guarded(raw, [&](Handle&, Store& s) -> i64 { s.elsewhere = chunks; return s.alive; });
}

}  // extern "C"
