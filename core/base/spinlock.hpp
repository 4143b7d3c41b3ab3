// A lock within this process for what takes less time than going to sleep.
#pragma once

#include <thread>

#include "types.hpp"

namespace kvstrata {

class SpinLock {
public:
    bool try_lock() { return !taken_.test_and_set(std::memory_order_acquire); }
    void lock() {
        for (u32 tries = 0; !try_lock(); ++tries)
            if (tries > 64) std::this_thread::yield();
    }
    void unlock() { taken_.clear(std::memory_order_release); }

private:
    std::atomic_flag taken_;
};

}  // namespace kvstrata
