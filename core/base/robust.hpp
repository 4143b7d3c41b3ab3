// A mutex between processes that survives the death of its owner.
#pragma once

#include <cerrno>
#include <cstdlib>
#include <ctime>
#include <pthread.h>

#include "errors.hpp"

namespace kvstrata {

// `broken_` stays set from the death of an owner until somebody has repaired what the mutex guards, so that
// a second death during the repair is not forgotten.
class RobustMutex {
public:
    enum class Result { locked, needs_repair, busy };

    void init() {
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
        pthread_mutex_init(&mutex_, &attributes);
        pthread_mutexattr_destroy(&attributes);
        broken_ = 0;
    }

    Result try_lock() { return locked(pthread_mutex_trylock(&mutex_)); }

    // For as long as others usually have it.
    Result try_lock_for_a_moment() {
        for (u32 tries = 0, pauses = 1; tries < kTries; ++tries, pauses = pauses < 32 ? 2 * pauses : pauses) {
            const Result result = try_lock();
            if (result != Result::busy) return result;
            for (u32 i = 0; i < pauses; ++i) pause();
        }
        return Result::busy;
    }

    // Waits for a limited time: a stopped owner makes the caller fail, never hang.
    Result lock() {
        const Result quick = try_lock_for_a_moment();  // much less than it takes to go to sleep and be woken
        if (quick != Result::busy) return quick;
        timespec until;
        clock_gettime(kClock, &until);
        const long nanoseconds = until.tv_nsec + patience_ms() * 1000000;
        until.tv_sec += nanoseconds / 1000000000;
        until.tv_nsec = nanoseconds % 1000000000;
        const Result waited = locked(lock_until(until));
        if (waited == Result::busy)
            throw TierUnavailable("another process holds a lock of the memory tier for too long; is it stopped?");
        return waited;
    }

    void repaired() { broken_ = 0; }
    void unlock() { pthread_mutex_unlock(&mutex_); }

private:
    // By a clock that nobody sets, where libc can wait by it; TSan doesn't follow that call.
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 30) && !defined(__SANITIZE_THREAD__)
    static constexpr clockid_t kClock = CLOCK_MONOTONIC;
    int lock_until(const timespec& until) { return pthread_mutex_clocklock(&mutex_, kClock, &until); }
#else
    static constexpr clockid_t kClock = CLOCK_REALTIME;
    int lock_until(const timespec& until) { return pthread_mutex_timedlock(&mutex_, &until); }
#endif
    static constexpr u32 kTries = 40;  // some 40 us at most
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    // 2 s, or what $KVSTRATA_LOCK_TIMEOUT says, in seconds.
    static long patience_ms() {
        static const long chosen = [] {
            const char* wanted = std::getenv("KVSTRATA_LOCK_TIMEOUT");
            const double seconds = wanted ? std::atof(wanted) : 0;
            return seconds > 0 && seconds < 1e6 ? static_cast<long>(seconds * 1000) : 2000L;
        }();
        return chosen;
    }

    Result locked(int code) {
        switch (code) {
            case 0: return broken_ ? Result::needs_repair : Result::locked;
            case EOWNERDEAD:
                broken_ = 1;
                pthread_mutex_consistent(&mutex_);
                return Result::needs_repair;
            case EBUSY:
            case ETIMEDOUT: return Result::busy;
            default: throw TierUnavailable("a lock of the memory tier is broken (errno " + std::to_string(code) + ")");
        }
    }

    pthread_mutex_t mutex_;
    u32 broken_;
};

// Holds a RobustMutex; `repair` mends what it guards when an owner died inside.
class RobustLock {
public:
    template <class Repair>
    RobustLock(RobustMutex& mutex, Repair&& repair) : mutex_(mutex) {
        if (mutex_.lock() == RobustMutex::Result::needs_repair) {
            try {
                repair();
            } catch (...) {
                mutex_.unlock();
                throw;
            }
            mutex_.repaired();
        }
    }
    ~RobustLock() { mutex_.unlock(); }
    RobustLock(const RobustLock&) = delete;
    RobustLock& operator=(const RobustLock&) = delete;

private:
    RobustMutex& mutex_;
};

}  // namespace kvstrata
