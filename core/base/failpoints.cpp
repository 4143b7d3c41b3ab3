#include "failpoints.hpp"

#ifdef KVSTRATA_FAILPOINTS
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

namespace kvstrata {

void reach_failpoint(const char* name) {
    constexpr long kUnset = -1'000'000'000'000;
    static std::atomic<long> countdown{kUnset};
    const char* wanted = std::getenv("KVSTRATA_FAILPOINT");
    if (wanted == nullptr) return;
    const char* colon = std::strchr(wanted, ':');
    const bool stop = colon && std::strstr(colon, ":stop");
    const size_t length = colon ? static_cast<size_t>(colon - wanted) : std::strlen(wanted);
    if (std::strlen(name) != length || std::strncmp(name, wanted, length) != 0) return;
    long unset = kUnset;
    countdown.compare_exchange_strong(unset, colon ? std::atol(colon + 1) : 0);
    if (countdown.fetch_sub(1) == 0) {
        raise(stop ? SIGSTOP : SIGKILL);  // to this thread, which then does nothing more
        if (!stop) pause();
    }
}

}  // namespace kvstrata
#endif
