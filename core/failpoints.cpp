#include "failpoints.hpp"

#ifdef KVSTRATA_FAILPOINTS
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

namespace kvstrata {

void reach_failpoint(const char* name) {
    static std::atomic<long> countdown{-1};
    const char* wanted = std::getenv("KVSTRATA_FAILPOINT");
    if (wanted == nullptr) return;
    const char* colon = std::strchr(wanted, ':');
    const size_t length = colon ? static_cast<size_t>(colon - wanted) : std::strlen(wanted);
    if (std::strlen(name) != length || std::strncmp(name, wanted, length) != 0) return;
    long unset = -1;
    countdown.compare_exchange_strong(unset, colon ? std::atol(colon + 1) : 0);
    if (countdown.fetch_sub(1) == 0) {
        kill(getpid(), SIGKILL);
        pause();
    }
}

}  // namespace kvstrata
#endif
