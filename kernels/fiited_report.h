// What a store tells about itself beside its counters: rows by length and use, single ids, history.
#pragma once

#include "fiited_rows.h"

extern "C" {

i64 fiited_rows_seen(void* raw, i32 table, u8* registers) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 { std::memcpy(registers, s.registers[table].data(), 4096); return kOk; });
}
// lengths[tables][k + 1]: rows by number of alive chunks; columns[tables][k]: alive chunks by column.
i64 fiited_shape(void* raw, i64* lengths, i64* columns) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    const int k = s.c.max_chunks;
    std::fill(lengths, lengths + s.c.tables * (k + 1), 0);
    std::fill(columns, columns + s.c.tables * k, 0);
    s.directory->for_each([&](Segment& g) {
      for (size_t i = 0; i < s.directory->capacity(g); ++i) {
        if (g.tags[i] & 0x80) continue;
        const Entry& e = g.entries[i];
        ++lengths[e.table * (k + 1) + popcount(e.alive & kAliveMask)];
        for (int j = 0; j < k; ++j) columns[e.table * k + j] += e.alive >> j & 1;
      }
    });
    return kOk;
  });
}
// counts[32][k + 1]: rows by the logarithm (base 2, rounded down) of their optimizer steps, and length.
i64 fiited_lengths_by_use(void* raw, i64* counts) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    if (!s.directory) return kBadArgument;
    const int k = s.c.max_chunks;
    std::fill(counts, counts + 32 * (k + 1), 0);
    s.directory->for_each([&](Segment& g) {
      for (size_t i = 0; i < s.directory->capacity(g); ++i) {
        if (g.tags[i] & 0x80) continue;
        const Entry& e = g.entries[i];
        ++counts[(31 - __builtin_clz(e.updates | 1)) * (k + 1) + popcount(e.alive & kAliveMask)];
      }
    });
    return kOk;
  });
}
// Per id: alive bitmap (-1: not resident) and k utilities in today's scale.
i64 fiited_inspect(void* raw, i32 table, const i64* ids, i64 n, i32* alive, float* utils, i64* touched) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    for (i64 i = 0; i < n; ++i) {
      Row r{};
      r.table = u16(table);
      r.v = s.c.layout == kDense ? u64(ids[i] + s.dense_offset[table]) : virtual_row(s.tables[table], u64(ids[i]));
      s.resolve(r);
      alive[i] = r.e ? r.e->alive & kAliveMask : -1;
      touched[i] = r.e ? r.e->touched : -1;
      for (int j = 0; j < s.c.max_chunks; ++j) utils[i * s.c.max_chunks + j] = r.e ? float(std::fabs(r.u[j]) / s.scale) : 0.0f;
    }
    return kOk;
  });
}
// What only the record needs: totals[11], HyperLogLog registers [tables][4096], signatures[4096] of
// rows that lost chunks lately. `set` = 0 reads, 1 writes.
i64 fiited_history(void* raw, i32 set, i64* totals, u8* registers, u32* signatures) {
  return guarded(raw, [&](Handle&, Store& s) -> i64 {
    if (!s.sketch) return kBadArgument;
    Counters& n = s.n;
    i64* const mine[] = {&n.admitted, &n.removed, &n.grown, &n.evicted, &n.refused, &n.regret, &n.nonfinite,
                         &n.lookups, &n.hits, &s.sketch->hits_, &s.sketch->misses_};
    for (i64* one : mine) {
      if (set) *one = *totals++;
      else *totals++ = *one;
    }
    for (std::vector<u8>& table : s.registers) {
      if (set) std::copy(registers, registers + table.size(), table.begin());
      else std::copy(table.begin(), table.end(), registers);
      registers += table.size();
    }
    if (set) std::copy(signatures, signatures + s.evicted_lately.size(), s.evicted_lately.begin());
    else std::copy(s.evicted_lately.begin(), s.evicted_lately.end(), signatures);
    return kOk;
  });
}

}  // extern "C"
