#include "clients.hpp"

#include <bit>
#include <chrono>
#include <unistd.h>

namespace kvstrata {

SlotPool::SlotPool(u32 first, u32 count, const char* what, bool full)
    : free_((count + 63) / 64), first_(first), count_(count), what_(what) {
    for (u32 i = 0; full && i < count; ++i) free_[i / 64].fetch_or(u64{1} << i % 64, std::memory_order_relaxed);
}

std::optional<u32> SlotPool::try_take() {
    const u32 words = static_cast<u32>(free_.size()), start = next_.load(std::memory_order_relaxed);
    for (u32 i = 0; i < words; ++i) {
        const u32 word = (start + i) % words;
        u64 free = free_[word].load();
        while (free) {
            const u64 lowest = free & (~free + 1);
            if (!free_[word].compare_exchange_weak(free, free & ~lowest, std::memory_order_acquire, std::memory_order_relaxed)) continue;
            if (i) next_.store(word, std::memory_order_relaxed);
            return first_ + word * 64 + static_cast<u32>(std::countr_zero(lowest));
        }
    }
    return std::nullopt;
}

u32 SlotPool::take() {
    if (const auto slot = try_take()) return *slot;
    std::unique_lock lock(mutex_);
    std::optional<u32> slot;
    waiting_.fetch_add(1);  // before it looks again: who gives one back after that, wakes it
    const bool got = returned_.wait_for(lock, std::chrono::seconds(1), [&] { return (slot = try_take()).has_value(); });
    waiting_.fetch_sub(1);
    if (!got)
        throw TierUnavailable("this process holds " + std::to_string(count_) + " " + what_ +
                              " of the cache at once, which is the limit; release some");
    return *slot;
}

void SlotPool::give_back(u32 slot) {
    free_[(slot - first_) / 64].fetch_or(u64{1} << (slot - first_) % 64);
    if (!waiting_.load()) return;
    { const std::lock_guard lock(mutex_); }  // not between its look and its sleep
    returned_.notify_one();
}

u32 SlotPool::in_use() const {
    u32 free = 0;
    for (const auto& word : free_) free += static_cast<u32>(std::popcount(word.load()));
    return count_ - free;
}

Clients::Clients(Region& region) : region_(region) {}

Client& Clients::operator[](u32 slot) const {
    const u64 stride = align_up(sizeof(Client), kPage);
    return *reinterpret_cast<Client*>(region_.at(region_.header().clients_at + slot * stride));
}

void Clients::init(Region& region) {
    // `used` of every slot is read by everybody: its page has to be there. The rest follows when a slot is taken.
    const u64 stride = align_up(sizeof(Client), kPage);
    for (u32 slot = 0; slot < kMaxClients; ++slot) region.back(region.header().clients_at + slot * stride, kPage);
}

void Clients::attach() {
    for (u32 slot = 0; slot < kMaxClients; ++slot) {
        if ((*this)[slot].used.load() || !region_.hold_client_lock(slot)) continue;
        claim(slot);
        return;
    }
    throw TierUnavailable("the cache is open in " + std::to_string(kMaxClients) + " places already, which is the limit");
}

void Clients::claim(u32 slot) {
    const u64 stride = align_up(sizeof(Client), kPage);
    region_.back(region_.header().clients_at + slot * stride, stride);
    self_ = slot;
    Client& client = mine();
    client.pid = static_cast<u32>(getpid());
    client.dirty_bytes.store(0);
    client.unsent.store(0);
    client.used.store(1);
}

void Clients::end_arrival(u32 slot) {
    give_back(slot);
    no_spare_any_more(slot);
}

void Clients::settle_counts(Client& client) {
    region_.header().past_hits.fetch_add(client.hits.exchange(0));
    region_.header().past_misses.fetch_add(client.misses.exchange(0));
}

void Clients::detach() {
    if (!pins.in_use() && !arrivals.in_use() && !departures.in_use()) {
        settle_counts(mine());
        mine().used.store(0);
    }
    region_.drop_client_lock(self_);
    self_ = ~0u;
}

bool Clients::is_dead(u32 slot) const {
    return slot != self_ && (*this)[slot].used.load() && !region_.client_lock_held_elsewhere(slot);
}

}  // namespace kvstrata
