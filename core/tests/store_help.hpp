// Short forms of the store's verbs, for tests.
#pragma once

#include <string>

#include "base/crc32c.hpp"
#include "store/store.hpp"

namespace kvstrata::testing {

inline Key bytes_of(const std::string& text) { return {reinterpret_cast<const u8*>(text.data()), text.size()}; }

inline Published put(Store& store, Space space, const std::string& key, const std::string& value, u64 expires = 0) {
    auto reservation = store.reserve(space, bytes_of(key), value.size(), {.expires = expires}, true);
    reservation->header.payload_crc = copy_crc32c(reservation->payload(), value.data(), value.size(), 0);
    return store.publish(*reservation);
}

inline std::string get(Store& store, Space space, const std::string& key, const std::string& absent = "(absent)") {
    Pin pin;
    Uses uses(store, space);
    if (store.acquire(space, bytes_of(key), pin, nullptr, &uses) != Lookup::hit) return absent;
    return {reinterpret_cast<const char*>(pin.value()), pin.size()};
}

}  // namespace kvstrata::testing
