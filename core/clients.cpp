#include "clients.hpp"

#include <chrono>
#include <unistd.h>

namespace kvstrata {

SlotPool::SlotPool(u32 first, u32 count, const char* what) : count_(count), what_(what) {
    free_.reserve(count);
    for (u32 i = count; i > 0; --i) free_.push_back(first + i - 1);
}

std::optional<u32> SlotPool::try_take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::nullopt;
    const u32 slot = free_.back();
    free_.pop_back();
    return slot;
}

u32 SlotPool::take() {
    std::unique_lock lock(mutex_);
    if (free_.empty() && !returned_.wait_for(lock, std::chrono::seconds(1), [this] { return !free_.empty(); }))
        throw TierUnavailable("this process holds " + std::to_string(count_) + " " + what_ +
                              " of the cache at once, which is the limit; release some");
    const u32 slot = free_.back();
    free_.pop_back();
    return slot;
}

void SlotPool::give_back(u32 slot) {
    {
        const std::lock_guard lock(mutex_);
        free_.push_back(slot);
    }
    returned_.notify_one();
}

u32 SlotPool::in_use() const {
    const std::lock_guard lock(mutex_);
    return count_ - static_cast<u32>(free_.size());
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

void Clients::settle_counts(Client& client) {
    region_.header().past_hits.fetch_add(client.hits.exchange(0));
    region_.header().past_misses.fetch_add(client.misses.exchange(0));
}

void Clients::detach() {
    settle_counts(mine());
    mine().used.store(0);
    region_.drop_client_lock(self_);
    self_ = ~0u;
}

bool Clients::is_dead(u32 slot) const {
    return slot != self_ && (*this)[slot].used.load() && !region_.client_lock_held_elsewhere(slot);
}

}  // namespace kvstrata
