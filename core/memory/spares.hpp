// Small blocks that this process has freed, kept for its next puts: an overwrite, or a put for which a record of the same
// size leaves, then needs neither the allocator nor its lock. They stay in their in-flight slots, so that whoever
// finds this process dead frees them.
#pragma once

#include <mutex>
#include <optional>

#include "base/spinlock.hpp"

namespace kvstrata {

class Spares {
public:
    static constexpr u32 kMost = 16;
    // Keeps the block in that slot; false when there are enough, or it is too large.
    bool keep(u32 slot, u32 units) {
        if (units > kLargest) return false;
        const std::lock_guard held(lock_);
        if (kept_ == kMost || kept_ + lent_ >= kMostSlots) return false;
        blocks_[kept_++] = {slot, units};
        return true;
    }
    // The slot of a block of just that size. It is lent until returned() says that it is free again.
    std::optional<u32> take(u32 units) {
        const std::lock_guard held(lock_);
        for (u32 i = kept_; i-- > 0;)
            if (blocks_[i].units == units) return lend(i);
        return std::nullopt;
    }
    std::optional<u32> take_any() {
        const std::lock_guard held(lock_);
        return kept_ ? std::optional(lend(kept_ - 1)) : std::nullopt;
    }
    void returned() {
        const std::lock_guard held(lock_);
        --lent_;
    }
    u32 lent() const {
        const std::lock_guard held(lock_);
        return lent_;
    }

private:
    static constexpr u32 kMostSlots = 32, kLargest = 128;
    struct Kept {
        u32 slot, units;
    };
    u32 lend(u32 i) {
        const u32 slot = blocks_[i].slot;
        blocks_[i] = blocks_[--kept_];
        ++lent_;
        return slot;
    }

    mutable SpinLock lock_;
    Kept blocks_[kMost];
    u32 kept_ = 0, lent_ = 0;
};

}  // namespace kvstrata
