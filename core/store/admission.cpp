// Admission to the tier below: in a namespace with an admission of N, a record goes there when its key has been wanted N times lately:
// put, or used while a record of it was in memory. So what is wanted once, or N - 1 times, never gets there.
//
// How often is kept in two generations of a counting Bloom filter, of which the lowest counter of a key is the estimate (Fan, Cao,
// Almeida, Broder: "Summary Cache", 1998). When the younger one has all the keys that it is made for, it becomes the older one, and what
// that knew is forgotten.
#include "store.hpp"

namespace kvstrata {
namespace {
// Keys a generation is made for, by its shape.
u64 capacity_of(const BloomShape& shape) {
    return static_cast<u64>(static_cast<double>(shape.counters) / shape.hashes * 0.6931471805599453);
}
}  // namespace

bool Store::wanted_often(u32 hash, u32 times) {
    const auto generation = [this](u32 number) {
        return CountingBloom(reinterpret_cast<CountingBloom::Byte*>(region_->at(header_.seen_at + number * header_.seen.bytes())), header_.seen);
    };
    const u64 key = spread(hash);
    const u32 now = header_.seen_now.load() % 2;
    const u32 lately = generation(now).count(key);
    if (lately + 1 >= times) return true;
    const u32 before = lately + generation(1 - now).count(key);
    if (!lately && header_.seen_keys.fetch_add(1) >= capacity_of(header_.seen) &&
        header_.seen_keys.exchange(0) >= capacity_of(header_.seen)) {  // exactly one takes the number back
        generation(1 - now).clear();
        header_.seen_now.store(1 - now);
    }
    generation(header_.seen_now.load() % 2).add(key);
    return before + 1 >= times;
}

// A use of a record that the tier below was not to get. Its shard is locked.
void Store::use_unproven(u32 at) {
    Entry& entry = index_.entry(at);
    const u32 times = space(entry.ns).admission;
    if (times > 2 && !wanted_often(entry.hash, times)) return;  // its put was the first of two, however long ago
    entry.flags = static_cast<u8>((entry.flags & ~kUnproven) | kDirty);
    entry.owner = static_cast<u8>(clients_.self());
    clients_.mine().dirty_bytes.fetch_add(u64{entry.units} * kUnit);
    enqueue_dirty({at, entry.units, entry.seq});
}

}  // namespace kvstrata
