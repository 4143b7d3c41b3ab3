// Named places at which a test build can be told to die, as if by SIGKILL, or to be stopped.
//
// KVSTRATA_COMMIT(name) stands between two stores of which the first must be in memory before the second:
// a process that dies in between leaves exactly the first. A killed thread's retired stores all become
// visible, so only the compiler has to be kept from reordering.
#pragma once

#include <atomic>

#ifdef KVSTRATA_FAILPOINTS
namespace kvstrata {
void reach_failpoint(const char* name);  // dies when $KVSTRATA_FAILPOINT is "name" or "name:countdown"; stops when "name:countdown:stop"
}
#define KVSTRATA_COMMIT(name)                                 \
    do {                                                      \
        std::atomic_signal_fence(std::memory_order_seq_cst);  \
        ::kvstrata::reach_failpoint(name);                    \
    } while (0)
#else
#define KVSTRATA_COMMIT(name) std::atomic_signal_fence(std::memory_order_seq_cst)
#endif
