// Plain C interface of the VHPI embedding store. Every call locks the store, refuses to run in a
// forked child, and answers a Status (0 or a count on success, negative otherwise).
#include "fiited_round.h"
#include "fiited_rows.h"

using namespace fiited;

namespace {

struct Handle {
  Store store;
  Scratch scratch;
  Desk desk;
  i64 scratch_bytes = 0;
  Handle(const Config& c, const TableConfig* t) : store(c, t) {}
};

template <class F> i64 guarded(void* raw, F f) {
  if (!raw) return kBadHandle;
  Handle& h = *static_cast<Handle*>(raw);
  if (getpid() != h.store.owner) return kForked;
  std::lock_guard<std::mutex> lock(h.store.mutex);
  try {
    return f(h, h.store);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

bool wide_lanes(const Store& s) { return s.c.chunk % 8 == 0; }

i64 step_rows(Store& s, Batch& b, const float* grad, i64 stride, float lr, float unit) {
  return wide_lanes(s) ? update_rows<8>(s, b, grad, stride, lr, unit) : update_rows<4>(s, b, grad, stride, lr, unit);
}

void admit_missing(Store& s, Batch& b) {   // admit_after = 0: a row exists from its first lookup
  const u64 before = s.directory->version;
  for (Row& r : b.rows) {
    const int k = s.tables[r.table].chunks;
    if (!r.e && s.free_slots() >= k) s.admit(r.v, r.table, s.full_mask(r.table), 0.0f);
  }
  if (s.directory->version != before) resolve_all(s, b.rows);
}

// Which bag each value of a table goes to, and its share of the bag under mode "mean".
void place_in_bags(Batch& b, int t, const i64* starts, const i64* offsets, i64 bags, bool mean) {
  if (b.bag.empty()) return;
  if (!offsets) { for (i64 i = starts[t]; i < starts[t + 1]; ++i) b.bag[i] = u32(i - starts[t]); return; }
  for (i64 bag = 0; bag < bags; ++bag) {
    const i64 low = offsets[t * (bags + 1) + bag], high = offsets[t * (bags + 1) + bag + 1];
    for (i64 i = low; i < high; ++i) {
      b.bag[i] = u32(bag);
      if (mean) b.scale[i] /= float(high - low);
    }
  }
}

bool has_nonfinite(const Store& s, const Batch& b, const float* grad, i64 stride) {
  for (u32 i = 0; i < b.inverse.size(); ++i) {
    const Row& r = b.rows[b.inverse[i]];
    const float* g = grad + i64(b.bag_of(i, b.table_start[r.table])) * stride + b.column[r.table];
    for (int d = 0; d < s.tables[r.table].chunks * s.c.chunk; ++d) if (!(std::fabs(g[d]) < INFINITY)) return true;
  }
  return false;
}

void fill_counters(const Handle& h, Counters* out) {
  const Store& s = h.store;
  *out = s.n;
  out->steps = s.step; out->round = s.round; out->alive = s.alive; out->pinned = s.pinned;
  out->scale = s.scale; out->cut_score = s.cut.score; out->window_weight = s.window_weight;
  out->queue = i64(s.queue.size());
  out->scratch_bytes = h.scratch_bytes + h.scratch.bytes() + h.desk.bytes() + i64(s.window.size() + s.evicted_lately.size() + 1024 * s.registers.size()) * 4;
  out->mapped_peak = s.memory.peak;
  if (s.c.layout == kDense) { out->rows = i64(s.dense_entries.size()); out->pool_mapped = out->pool_live = s.dense_bytes; return; }
  out->rows = s.directory->rows();
  out->sketch_hits = s.sketch->hits_; out->sketch_misses = s.sketch->misses_;
  out->pool_mapped = s.pool->mapped_bytes(); out->pool_live = s.pool->live_bytes();
  out->directory_bytes = s.directory->mapped_bytes(); out->segments = s.directory->segments();
  out->sketch_bytes = s.sketch->bytes();
}

i64 verify(const Store& s) {   // 0, or the number of the invariant that is broken
  i64 broken = 0, rows = 0, chunks = 0, pinned = 0;
  std::vector<u64> seen;
  s.directory->for_each([&](Segment& g) {
    u32 live = 0, tombs = 0;
    for (size_t i = 0; i < s.directory->capacity(g); ++i) {
      const float* u = g.utils + i * s.c.max_chunks;
      tombs += g.tags[i] == kDeleted;
      if (g.tags[i] & 0x80) {
        for (int j = 0; j < s.c.max_chunks; ++j) if (bits_of(u[j])) broken = 6;
        continue;
      }
      ++live;
      const Entry& e = g.entries[i];
      const u16 bits = e.alive & kAliveMask;
      const int len = popcount(bits);
      pinned += (e.alive & kPinned) ? 1 : 0;
      if (s.directory->find(e.key, e.table).entry != &e) broken = 7;
      if (g.depth && (e.key ^ g.prefix) >> (64 - g.depth)) broken = 7;
      if (!len || (bits & ~s.full_mask(e.table))) broken = 3;
      for (int j = 0; j < s.c.max_chunks; ++j) if (std::signbit(u[j]) != bool(bits >> j & 1)) broken = 6;
      chunks += len;
      if (s.c.layout == kSlabs) {
        if (bits & (bits + 1)) broken = 3;
        if (!s.pool->used(e.slot, len)) broken = 1;
        seen.push_back(u64(len) << 32 | e.slot);
      } else {
        for (int j = 0; j < s.c.max_chunks; ++j) {
          const u32 slot = g.refs[i * s.c.max_chunks + j];
          if (!(bits >> j & 1)) { if (slot != s.zero_slot && slot != 0) broken = 4; continue; }
          if (!s.pool->used(slot, 1) || slot == s.zero_slot) broken = 1;
          seen.push_back(slot);
        }
      }
    }
    if (live != g.live || tombs != g.tombs) broken = 7;
    rows += live;
  });
  const i64 references = i64(seen.size()) + (s.c.layout == kChunked);
  std::sort(seen.begin(), seen.end());
  if (std::adjacent_find(seen.begin(), seen.end()) != seen.end()) broken = 1;
  if (s.pool->counted_live() != references) broken = 1;
  if (chunks != s.alive || chunks > s.c.slots || rows != s.directory->rows() || pinned != s.pinned) broken = 2;
  if (s.c.layout == kChunked) {
    const u8* zero = s.pool->at(s.zero_slot, 1);
    for (int i = 0; i < s.chunk_bytes; ++i) if (zero[i]) broken = 4;
  }
  std::vector<i64> bins(kBins, 0);
  i64 total = 0, recount = 0;
  histogram(s, {}, false, bins.data());
  for (i64 b : bins) total += b;
  float score[kMaxChunks];
  s.directory->for_each([&](Segment& g) {
    for (size_t i = 0; i < s.directory->capacity(g); ++i) {
      const float* u = g.utils + i * s.c.max_chunks;
      row_scores(s, u, 1.0f, score);
      for (int j = 0; j < s.c.max_chunks; ++j) recount += counted(u, score, j);
    }
  });
  if (total != recount) broken = 6;
  return broken;
}

}  // namespace

extern "C" {

void* fiited_create(const Config* c, const TableConfig* tables) {
  Handle* h = nullptr;
  try {
    h = new Handle(*c, tables);
    if (h->store.open()) return h;
  } catch (const std::bad_alloc&) {
  }
  delete h;
  return nullptr;
}
void fiited_destroy(void* raw) {
  Handle* h = static_cast<Handle*>(raw);
  if (h && getpid() == h->store.owner) delete h;
}
i64 fiited_max_slots(void* raw) { return guarded(raw, [](Handle&, Store& s) { return s.pool ? s.pool->max_slots() : i64(1) << 40; }); }
i64 fiited_freeze(void* raw) { return guarded(raw, [](Handle&, Store& s) { s.frozen = true; return i64(kOk); }); }

void* fiited_batch_create() { return new (std::nothrow) Batch; }
void fiited_batch_destroy(void* batch) { delete static_cast<Batch*>(batch); }
i64 fiited_batch_rows(void* batch) { return i64(static_cast<Batch*>(batch)->rows.size()); }

// ids: values of all tables in table order; starts[tables + 1]; offsets: null (one value per bag) or
// [tables][bags + 1], absolute. out[bag][stride], table t at columns[t]. weights: null or per value.
i64 fiited_lookup(void* raw, void* batch, const i64* ids, const i64* starts, const i64* offsets, i64 bags, i32 mean,
                  const float* weights, i32 train, float mask_below, float* out, i64 stride, const i64* columns) {
  return guarded(raw, [&](Handle& h, Store& s) -> i64 {
    if (train && s.frozen) return kFrozen;
    Batch& b = *static_cast<Batch*>(batch);
    const i64 n = starts[s.c.tables];
    b.rows.cut_to(0);
    b.rows.next(size_t(n));   // room: rows do not move while they are found
    b.inverse.resize(size_t(n));
    b.order.resize(size_t(n));
    b.bag.resize(offsets || weights ? size_t(n) : 0);
    b.scale.clear();
    b.table_start.assign(starts, starts + s.c.tables + 1);
    b.column.assign(columns, columns + s.c.tables);
    b.train = train; b.used = false;
    if (weights) b.scale.assign(weights, weights + n);
    else if (mean && offsets) b.scale.assign(size_t(n), 1.0f);
    const bool admitting = train && s.c.admit_after == 0 && s.c.layout != kDense;
    for (int t = 0; t < s.c.tables; ++t) {   // a table at a time: its rows stay in the cache
      place_in_bags(b, t, starts, offsets, bags, mean);
      const u32 first = u32(b.rows.size());
      find_distinct(s, b, h.scratch, ids, t);
      if (train) arrange(s, b, h.scratch, t, first);
      if (!admitting) gather(s, b, t, offsets, bags, out, stride, mask_below);
    }
    if (admitting) {   // new rows may move others: all are found before any is read
      admit_missing(s, b);
      for (int t = 0; t < s.c.tables; ++t) gather(s, b, t, offsets, bags, out, stride, mask_below);
    }
    b.version = s.directory ? s.directory->version : 0;
    h.scratch_bytes = std::max<i64>(h.scratch_bytes, b.rows.bytes() + i64(12 * b.inverse.capacity()));
    return i64(b.rows.size());
  });
}

// The fused backward pass. Returns the number of rows rejected for gradients that are not finite.
i64 fiited_update(void* raw, void* batch, const float* grad, i64 stride, float lr, float unit, i32 raise_nonfinite) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    Batch& b = *static_cast<Batch*>(batch);
    if (s.frozen || !b.train) return kFrozen;
    if (b.used) return kUsed;
    if (raise_nonfinite && has_nonfinite(s, b, grad, stride)) return kNonFinite;
    b.used = true;
    if (s.directory && b.version != s.directory->version) resolve_all(s, b.rows);
    return step_rows(s, b, grad, stride, lr, unit);
  });
}

// Ends a step. slices > 0: one slice of the continuous mode. slices = 0: count the step only.
i64 fiited_end_step(void* raw, i64 slices, i64 compact_rows) {
  return guarded(raw, [&](Handle& h, Store& s) -> i64 {
    if (s.c.layout == kDense) { ++s.step; return kOk; }
    if (s.frozen) return kFrozen;
    if (slices > 0) {
      slice(s, h.desk, slices);
      if (compact_rows) {
        const u64 width = ~u64(0) / u64(slices), index = s.step % slices;
        compact(s, {width * index, index + 1 == u64(slices) ? ~u64(0) : width * (index + 1) - 1, -1}, compact_rows);
      }
    }
    ++s.step;
    return kOk;
  });
}
i64 fiited_round(void* raw) {
  return guarded(raw, [](Handle& h, Store& s) -> i64 {
    if (s.frozen || !s.directory) return kFrozen;
    full_round(s, h.desk);
    next_round(s);
    return kOk;
  });
}
i64 fiited_compact(void* raw, i64 limit) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    i64 moved = 0;
    for (i64 now = 1; now && moved < limit; moved += now) now = compact(s, {}, limit - moved);
    s.pool->release_empty();
    return moved;
  });
}

// The pieces of a round over several shards: histogram, members of one bin, plan, lists, apply.
i64 fiited_histogram(void* raw, i64* bins) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    unique_queue(s);
    std::fill(bins, bins + kBins, 0);
    histogram(s, {}, true, bins);
    return target_slots(s);
  });
}
i64 fiited_collect(void* raw, u32 bin, u64 salt, float* scores, u64* ties, i64 room) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    std::vector<std::pair<float, u64>> members;
    collect(s, {}, bin, salt, members);
    for (i64 i = 0; i < std::min<i64>(room, i64(members.size())); ++i) { scores[i] = members[i].first; ties[i] = members[i].second; }
    return i64(members.size());
  });
}
i64 fiited_plan(void* raw, float score, u64 tie, u64 salt, i64* sizes) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    s.growers.clear();
    s.victims.clear();
    s.cut = {score, tie};
    plan(s, s.cut, salt);
    sizes[0] = i64(s.growers.size());
    sizes[1] = i64(s.victims.size());
    return s.alive;
  });
}
i64 fiited_planned(void* raw, i32 which, float* scores, u64* ties) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    const std::vector<Item>& items = which ? s.victims : s.growers;
    for (size_t i = 0; i < items.size(); ++i) { scores[i] = items[i].score; ties[i] = items[i].tie; }
    return i64(items.size());
  });
}
// Grow the first `grow` and evict the worst `evict` of this shard's lists, then start a new round.
// `elsewhere`: chunks that will be alive on the other shards after the round.
i64 fiited_apply(void* raw, i64 grow, i64 evict, i64 elsewhere) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    s.elsewhere = elsewhere;
    keep_best(s.growers, size_t(grow));
    keep_worst(s.victims, size_t(evict));
    apply_plan(s);
    s.queue.clear();
    next_round(s);
    return kOk;
  });
}

i64 fiited_set_budget(void* raw, i64 slots, i64 bytes) {
  return guarded(raw, [&](Handle& h, Store& s) -> i64 {
    i64 held = 0;
    s.directory->for_each([&](Segment& g) {
      for (size_t i = 0; i < s.directory->capacity(g); ++i)
        if (!(g.tags[i] & 0x80) && (g.entries[i].alive & kPinned)) held += popcount(g.entries[i].alive & kAliveMask);
    });
    if (held > slots) return kPinnedOverBudget;
    const int min_alive = s.c.min_alive;
    s.c.slots = slots;
    s.c.budget_bytes = bytes;
    s.memory.limit = 0;
    if (s.alive > slots || (bytes && s.memory.mapped > bytes)) {
      s.c.min_alive = -1;
      full_round(s, h.desk);
      s.c.min_alive = min_alive;
      for (i64 now = 1; now;) now = compact(s, {}, i64(1) << 40);
      s.pool->release_empty();
      s.memory.release_spare();
    }
    s.memory.limit = bytes;
    return s.alive;
  });
}

i64 fiited_counters(void* raw, Counters* out) {
  return guarded(raw, [&](Handle& h, Store&) -> i64 { fill_counters(h, out); return kOk; });
}
i64 fiited_verify(void* raw) { return guarded(raw, [](Handle&, Store& s) { return s.directory ? verify(s) : i64(kOk); }); }
i64 fiited_pin(void* raw, i32 table, const i64* ids, i64 n, i32 pin) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    i64 fresh = 0;
    for (i64 i = 0; i < n; ++i) fresh += !s.directory->find(virtual_row(s.tables[table], u64(ids[i])), u16(table)).entry;
    if (pin && s.pinned + n > s.c.slots) return kPinnedOverBudget;
    if (pin && fresh > s.free_slots()) return kNoMemory;
    for (i64 i = 0; i < n; ++i) {
      const u64 v = virtual_row(s.tables[table], u64(ids[i]));
      Found f = s.directory->find(v, u16(table));
      if (!f.entry && pin) f = s.admit(v, u16(table), 1, 0.0f);
      if (!f.entry) { if (pin) return kNoMemory; continue; }
      s.pinned += (pin ? 1 : 0) - ((f.entry->alive & kPinned) ? 1 : 0);
      f.entry->alive = u16(pin ? f.entry->alive | kPinned : f.entry->alive & kAliveMask);
    }
    return kOk;
  });
}

}  // extern "C"

#include "fiited_report.h"
#include "fiited_transfer.h"
