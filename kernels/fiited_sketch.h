// Candidate sketch: what is known about rows that own no memory. Four cells of 32 bits per bucket:
// 14-bit tag, 2-bit count of sightings, bf16 utility; replacement is space-saving with decay.
// The bucket depends on the top 12 bits of the row first, so collisions in the sketch do not
// depend on how many shards share the rows.
#pragma once

#include "fiited_memory.h"

namespace fiited {

struct Sighting { float utility; u32 count; };

class Sketch {
 public:
  explicit Sketch(i64 cells) : per_bucket_(cells > 4096 * 4 ? u64(cells + 4096 * 4 - 1) / (4096 * 4) : 1),
                               cells_(4096 * 4 * per_bucket_, 0) {}

  // Add to the row's utility and count; returns the estimate after the addition.
  Sighting add(u64 v, float utility, u32 noise) {
    u32* cell = cells_.data() + 4 * index(v);
    const u32 tag = u32(v >> 20) & 0x3fff;
    int weakest = 0;
    for (int i = 0; i < 4; ++i) {
      if (cell[i] && cell[i] >> 18 == tag) {
        const float sum = bfloat_to_float(u16(cell[i])) + utility;
        const u32 seen = cell[i] >> 16 & 3, count = seen < 3 ? seen + 1 : 3;
        cell[i] = tag << 18 | count << 16 | float_to_bfloat(sum, noise);
        ++hits_;
        return {sum, count};
      }
      if (u16(cell[i]) < u16(cell[weakest]) || !cell[i]) weakest = i;
      if (!cell[weakest]) break;
    }
    ++misses_;
    const float smallest = bfloat_to_float(u16(cell[weakest])) * 0.5f;
    if (cell[weakest] && smallest > utility)
      cell[weakest] = (cell[weakest] & 0xffff0000u) | u16(bits_of(smallest) >> 16);
    else
      cell[weakest] = tag << 18 | 1u << 16 | float_to_bfloat(utility, noise);
    return {utility, 1};
  }

  FIITED_INLINE void prefetch(u64 v) const { __builtin_prefetch(cells_.data() + 4 * index(v), 1); }

  void erase(u64 v) {   // the row has become resident
    u32* cell = cells_.data() + 4 * index(v);
    const u32 tag = u32(v >> 20) & 0x3fff;
    for (int i = 0; i < 4; ++i) if (cell[i] >> 18 == tag) cell[i] = 0;
  }

  void rescale(float factor) {
    for (u32& cell : cells_)
      if (cell) cell = (cell & 0xffff0000u) | u16(bits_of(bfloat_to_float(u16(cell)) * factor) >> 16);
  }

  LargeVector<u32>& cells() { return cells_; }
  i64 bytes() const { return i64(cells_.size()) * 4; }
  i64 hits_ = 0, misses_ = 0;

 private:
  size_t index(u64 v) const { return size_t((v >> 52) * per_bucket_ + ((v & 0xfffff) * per_bucket_ >> 20)); }
  u64 per_bucket_;
  LargeVector<u32> cells_;
};

}  // namespace fiited
