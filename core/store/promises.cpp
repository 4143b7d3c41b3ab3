// Who computes what isn't there, or fetches it from elsewhere: so that of all processes of the host one does it, and the
// others wait for the value.
#include "base/clock.hpp"
#include "base/siphash.hpp"
#include "store.hpp"

namespace kvstrata {
namespace {
constexpr u32 kProbes = 64;
constexpr u64 kAnybody = ~u64{0};  // a token for which nothing is written down
}  // namespace

// Two keys whose hashes are equal wait for each other, and nothing else comes of it.
u64 Store::promised(Space wanted, Key key, Promised what) const {
    const u64 domain = static_cast<u64>(what) << 32 | wanted.id;
    return siphash13(header_.secret[1] ^ domain, header_.secret[0], key.data(), key.size());
}

std::optional<u64> Store::promise(Space wanted, Key key, u64 ms, Promised what) {
    const u64 hash = promised(wanted, key, what);
    Promises& table = promises();
    const RobustLock held(table.mutex, [] {});  // each is written whole, its token last
    const u64 now = now_ms();
    Promise* free = nullptr;
    for (u32 i = 0; i < kProbes; ++i) {
        Promise& promise = table.at[(hash + i) % kPromises];
        const bool stands = promise.token && now < promise.expires && clients_[promise.client].used.load() &&
                            (promise.key != hash || !clients_.is_dead(promise.client));
        if (stands && promise.key == hash) return std::nullopt;
        if (!stands && !free) free = &promise;
    }
    if (!free) return kAnybody;
    free->token = 0;
    free->key = hash;
    free->expires = now + ms;
    free->client = clients_.self();
    return free->token = table.next_token.fetch_add(1) + 1;
}

void Store::withdraw(Space wanted, Key key, u64 token, Promised what) {
    if (token == kAnybody) return;
    const u64 hash = promised(wanted, key, what);
    Promises& table = promises();
    const RobustLock held(table.mutex, [] {});
    for (u32 i = 0; i < kProbes; ++i) {
        Promise& promise = table.at[(hash + i) % kPromises];
        if (promise.token == token) promise.token = 0;
    }
}

void Store::forget_promises(u32 client) {
    Promises& table = promises();
    const RobustLock held(table.mutex, [] {});
    for (Promise& promise : table.at)
        if (promise.token && promise.client == client) promise.token = 0;
}

}  // namespace kvstrata
