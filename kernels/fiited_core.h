// The store: directory, pool, sketch and counters, and the operations on one row.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "fiited_directory.h"
#include "fiited_half.h"
#include "fiited_sketch.h"

namespace fiited {

struct Candidate { u64 key; float score; u16 table; };

struct Cut {   // a chunk is wanted iff (score, tie) > (score, tie) of the cut
  float score = -1.0f;
  u64 tie = 0;
  bool below(float s, u64 t) const { return s > score || (s == score && t > tie); }
};

struct Item {   // one chunk that a round over shards may evict or grow
  float score;
  u64 tie, key;
  u16 table, chunk;
  bool admit;
};

struct Counters {   // keep in step with raysys/training/fiited/native.py
  i64 steps, round, rows, alive, admitted, removed, grown, evicted, refused, regret, nonfinite,
      lookups, hits, sketch_hits, sketch_misses, pool_mapped, pool_live, directory_bytes,
      sketch_bytes, scratch_bytes, mapped_peak, segments, probes_total, probes_max, queue, pinned;
  double scale, cut_score, window_weight;
};

struct Row {   // a distinct row of a batch
  u64 v;
  Entry* e;
  float* u;
  u8* w;         // layout B and dense: the row's contiguous weights
  u32* refs;     // layout A
  u32 count, start;
  u16 table, alive;   // the bitmap as of the latest resolve
};

class Store {
 public:
  Config c;
  std::vector<TableConfig> tables;
  Memory memory;
  std::unique_ptr<Directory> directory;
  std::unique_ptr<Pool> pool;
  std::unique_ptr<Sketch> sketch;
  std::mutex mutex;
  std::vector<Candidate> queue;
  std::vector<float> window;          // continuous mode: decayed histogram of the latest slices
  double window_weight = 0;
  std::vector<u32> evicted_lately;    // signatures of rows that lost chunks, for the regret metric
  std::vector<std::vector<u8>> registers;   // HyperLogLog of rows seen, per table
  std::vector<Item> growers, victims;
  Counters n{};
  double scale = 1.0;                 // gamma^-round, renormalised by exact powers of two
  Cut cut;
  i64 alive = 0, pinned = 0;
  i64 elsewhere = 0;                  // chunks alive on the other shards of one budget
  u32 round = 0, step = 0;
  bool frozen = false;
  int states, weight_bytes, chunk_bytes;   // of a weight; of a chunk with its optimizer states
  pid_t owner = getpid();
  // Dense mode (the same kernels without the indirection): entries, utilities and weights by row.
  LargeVector<Entry> dense_entries;
  LargeVector<float> dense_utils;
  u8* dense_weights = nullptr;
  i64 dense_bytes = 0;
  std::vector<i64> dense_offset;

  Store(const Config& config, const TableConfig* t) : c(config), tables(t, t + config.tables), memory(config.page_bytes) {
    states = c.optimizer == kAdam ? 2 : c.optimizer == kAdagrad ? 1 : 0;
    weight_bytes = c.half ? 2 : 4;
    chunk_bytes = c.chunk * (weight_bytes + 4 * states);
    memory.limit = c.budget_bytes;
    window.assign(kBins, 0.0f);
    evicted_lately.assign(4096, 0);
    registers.assign(c.tables, std::vector<u8>(4096, 0));
  }
  ~Store() { std::free(dense_weights); }

  bool open() {
    if (c.layout == kDense) return open_dense();
    sketch = std::make_unique<Sketch>(c.sketch_cells);
    if (!memory.take(sketch->bytes())) return false;
    directory = std::make_unique<Directory>(c.max_chunks, c.layout == kChunked, c.page_bytes, &memory);
    const int classes = c.layout == kSlabs ? c.max_chunks : 1;
    pool = std::make_unique<Pool>(classes, u32(chunk_bytes), c.page_bytes, c.lifo, c.poison, &memory);
    if (c.layout == kChunked) {   // slot 0 stays all zeros and is never handed out
      zero_slot = pool->alloc(1);
      if (zero_slot == kNoSlot) return false;
      std::memset(pool->at(zero_slot, 1), 0, size_t(chunk_bytes));
    }
    return directory->open();
  }

  bool open_dense() {
    i64 rows = 0;
    for (const TableConfig& t : tables) { dense_offset.push_back(rows); rows += t.dense_rows; }
    dense_bytes = rows * c.max_chunks * chunk_bytes;
    dense_weights = static_cast<u8*>(allocate(size_t(dense_bytes)));
    dense_entries.assign(rows, Entry{});
    dense_utils.assign(size_t(rows) * c.max_chunks, -0.0f);
    for (int t = 0; t < c.tables; ++t)
      for (i64 i = 0; i < tables[t].dense_rows; ++i) {
        Entry& e = dense_entries[dense_offset[t] + i];
        e.key = virtual_row(tables[t], u64(i));
        e.table = u16(t);
        e.alive = full_mask(t);
        e.acc = c.acc0;
        u8* w = dense_row(dense_offset[t] + i);
        for (int j = 0; j < tables[t].chunks; ++j) init_chunk(e.key, t, j, w + j * c.chunk * weight_bytes);
      }
    return true;
  }
  u8* dense_row(i64 i) const { return dense_weights + size_t(i) * c.max_chunks * chunk_bytes; }

  u16 full_mask(int t) const { return u16((1u << tables[t].chunks) - 1); }
  i64 free_slots() const { return c.slots - alive - elsewhere; }
  bool roomy() const { return free_slots() * 5 > c.slots; }

  void read_weights(float* out, const u8* w, int n) const {
    if (c.half) widen(out, reinterpret_cast<const u16*>(w), n);
    else std::memcpy(out, w, size_t(n) * 4);
  }
  void write_weights(u8* w, const float* from, int n) const {
    if (c.half) narrow_nearest(reinterpret_cast<u16*>(w), from, n);
    else std::memcpy(w, from, size_t(n) * 4);
  }

  void init_chunk(u64 v, int t, int j, u8* w) const {
    alignas(64) float out[4096];
    const int D = tables[t].chunks * c.chunk;
    const float bound = c.init_scale / std::sqrt(float(D));
    const u64 seed = mix(v ^ mix(c.seed + u64(t) * 0x51ed2701ull));
    for (int i = 0; i < c.chunk; ++i) {
      if (c.init == 0) out[i] = (2.0f * unit_uniform(seed, u32(j * c.chunk + i)) - 1.0f) * bound;
      else if (c.init == 1) out[i] = c.init_scale;
      else if (c.init == 2) {   // sum of four uniforms, scaled to unit variance: close to normal
        float sum = 0;
        for (u32 r = 0; r < 4; ++r) sum += unit_uniform(seed, u32(j * c.chunk + i) * 4 + r);
        out[i] = (sum - 2.0f) * 1.7320508f * bound;
      } else out[i] = 0.0f;
    }
    write_weights(w, out, c.chunk);
  }

  // Give the row exactly the chunks of `want`. New chunks are zero unless `fresh` (then random). `slot`: one
  // of that length that the caller has taken for it.
  bool set_alive(Found f, u16 want, bool fresh, u32 slot = kNoSlot) {
    const u16 have = f.entry->alive & kAliveMask;
    if (want == have) return true;
    const bool done = c.layout == kSlabs ? move_slab(f, have, want, fresh, slot) : swap_chunks(f, have, want, fresh);
    if (!done) { ++n.refused; return false; }
    const int more = popcount(want & ~have), fewer = popcount(have & ~want);
    alive += more - fewer;
    n.grown += more;
    n.evicted += fewer;
    f.entry->alive = u16((f.entry->alive & kPinned) | want);
    ++directory->version;   // open batches hold addresses: they look their rows up again
    for (int j = 0; j < c.max_chunks; ++j)
      f.util[j] = want >> j & 1 ? -std::fabs(f.util[j]) : std::fabs(f.util[j]);
    if (more) {
      f.entry->grown = u16(round);
      n.regret += evicted_lately[f.entry->key >> 52] == u32(f.entry->key);
    } else evicted_lately[f.entry->key >> 52] = u32(f.entry->key);
    return true;
  }

  Found admit(u64 v, u16 t, u16 want, float utility, u32 slot = kNoSlot) {
    Found f = directory->insert(v, t);
    if (!f.entry) { if (slot != kNoSlot) pool->free(slot, popcount(want)); ++n.refused; return f; }
    f.entry->acc = c.acc0;
    f.entry->touched = step;
    for (int j = 0; j < tables[t].chunks; ++j) f.util[j] = utility;
    if (!set_alive(f, want, true, slot)) { directory->erase(f.entry); return {}; }
    sketch->erase(v);
    ++n.admitted;
    return f;
  }

  void remove(Found f) {   // the caller has freed the chunks: hand the utility to the sketch
    float best = 0;
    for (int j = 0; j < c.max_chunks; ++j) best = std::max(best, std::fabs(f.util[j]));
    sketch->add(f.entry->key, best, u32(mix(f.entry->key + step)));
    directory->erase(f.entry);
    ++n.removed;
  }

  u8* chunk_at(const Row& r, int j) const {
    return c.layout == kChunked ? pool->at(r.refs[j], 1) : r.w + j * c.chunk * weight_bytes;
  }
  // Optimizer state `which` of an alive chunk: behind all weights of the slot.
  float* state_at(const Row& r, int j, int which) const {
    if (c.layout == kChunked) return reinterpret_cast<float*>(pool->at(r.refs[j], 1) + c.chunk * weight_bytes) + which * c.chunk;
    const int k = c.layout == kDense ? c.max_chunks : popcount(r.e->alive & kAliveMask);
    return reinterpret_cast<float*>(r.w + k * c.chunk * weight_bytes) + (which * k + j) * c.chunk;
  }
  void resolve(Row& r) const {
    if (c.layout == kDense) {
      const i64 i = i64(r.v);
      r.e = const_cast<Entry*>(&dense_entries[i]);
      r.u = const_cast<float*>(&dense_utils[size_t(i) * c.max_chunks]);
      r.w = dense_row(i);
      r.alive = r.e->alive;
      return;
    }
    take(r, directory->find(r.v, r.table));
  }
  void take(Row& r, const Found& f) const {
    r.e = f.entry; r.u = f.util; r.refs = f.refs;
    r.w = nullptr; r.alive = 0;
    if (!f.entry) return;
    r.alive = f.entry->alive & kAliveMask;
    if (c.layout == kSlabs) r.w = pool->at(f.entry->slot, popcount(r.alive));
  }

  void saw_row(u64 v, u16 t) {   // HyperLogLog over rows that were not resident when seen
    const u64 h = mix(v ^ 0x5bd1e995u);
    u8& reg = registers[t][h >> 52];
    const u8 rank = u8(__builtin_clzll((h << 12) | (1ull << 11)) + 1);
    if (rank > reg) reg = rank;
  }

  u32 zero_slot = kNoSlot;

 private:
  // Slots are multiples of 8 bytes, and most are too short for a call of memcpy to pay.
  static void copy_words(u8* to, const u8* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 8) std::memcpy(to + i, from + i, 8);
  }
  static void zero_words(u8* to, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 8) std::memset(to + i, 0, 8);
  }

  bool move_slab(Found f, u16 have, u16 want, bool fresh, u32 slot) {
    const int from = popcount(have), to = popcount(want), C = c.chunk;
    if (!to) slot = 0;
    else {
      if (slot == kNoSlot) slot = pool->alloc(to);
      if (slot == kNoSlot) return false;
      u8* const target = pool->at(slot, to);
      const int keep = std::min(from, to);
      for (int s = 0; s <= states; ++s) {   // the weights, then each state
        const size_t width = size_t(C) * (s ? 4 : weight_bytes);
        const size_t before = s ? size_t(C) * (weight_bytes + 4 * (s - 1)) : 0;
        u8* part = target + before * to;
        if (keep) copy_words(part, pool->at(f.entry->slot, from) + before * from, width * keep);
        zero_words(part + width * keep, width * (to - keep));
      }
      for (int j = keep; fresh && j < to; ++j)
        init_chunk(f.entry->key, f.entry->table, j, target + j * C * weight_bytes);
    }
    if (from && !pool->free(f.entry->slot, from)) return false;
    f.entry->slot = slot;
    return true;
  }

  bool swap_chunks(Found f, u16 have, u16 want, bool fresh) {
    u32 got[kMaxChunks];
    for (int j = 0; j < c.max_chunks; ++j) {
      if (!((want & ~have) >> j & 1)) continue;
      got[j] = pool->alloc(1);
      if (got[j] == kNoSlot) {
        while (j-- > 0) if ((want & ~have) >> j & 1) pool->free(got[j], 1);
        return false;
      }
    }
    for (int j = 0; j < c.max_chunks; ++j) {
      if ((have & ~want) >> j & 1) { if (!pool->free(f.refs[j], 1)) return false; f.refs[j] = zero_slot; }
      if (!((want & ~have) >> j & 1)) { if (!(have >> j & 1)) f.refs[j] = zero_slot; continue; }
      f.refs[j] = got[j];
      u8* w = pool->at(got[j], 1);
      std::memset(w, 0, size_t(chunk_bytes));
      if (fresh) init_chunk(f.entry->key, f.entry->table, j, w);
    }
    return true;
  }
};

}  // namespace fiited
