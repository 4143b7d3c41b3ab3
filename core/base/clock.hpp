// The time that expiry goes by: the same in every process, and comparable after a restart.
#pragma once

#include <ctime>

#include "types.hpp"

namespace kvstrata {

inline u64 now_ms() {  // since the Unix epoch, to a few milliseconds
    timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    return static_cast<u64>(now.tv_sec) * 1000 + static_cast<u64>(now.tv_nsec) / 1000000;
}

}  // namespace kvstrata
