// Admission to the tier below: in a namespace with proven_only, a record goes there when it has been used since it came, or when
// its key was put before (then it was wanted again after it had gone). So what is wanted once never gets there.
//
// Which keys were put is kept in two generations of a Bloom filter; when the younger one is full, it becomes the older one.
#include "store.hpp"

namespace kvstrata {
namespace {
// Keys a generation is made for, by its shape.
u64 capacity_of(const BloomShape& shape) {
    return static_cast<u64>(static_cast<double>(shape.counters) / shape.hashes * 0.6931471805599453);
}
}  // namespace

bool Store::seen_before(u32 hash) {
    const auto generation = [this](u32 number) {
        return CountingBloom(reinterpret_cast<CountingBloom::Byte*>(region_->at(header_.seen_at + number * header_.seen.bytes())), header_.seen);
    };
    const u64 key = spread(hash);
    const u32 now = header_.seen_now.load() % 2;
    if (generation(now).contains(key)) return true;
    const bool earlier = generation(1 - now).contains(key);
    if (header_.seen_keys.fetch_add(1) == capacity_of(header_.seen)) {  // exactly one sees this number
        generation(1 - now).clear();
        header_.seen_keys.store(0);
        header_.seen_now.store(1 - now);
    }
    generation(header_.seen_now.load() % 2).add(key);
    return earlier;
}

// A use of a record that the tier below was not to get. Its shard is locked.
void Store::prove(u32 at) {
    Entry& entry = index_.entry(at);
    entry.flags = static_cast<u8>((entry.flags & ~kUnproven) | kDirty);
    entry.owner = static_cast<u8>(clients_.self());
    clients_.mine().dirty_bytes.fetch_add(u64{entry.units} * kUnit);
    enqueue_dirty({at, entry.units, entry.seq});
}

}  // namespace kvstrata
