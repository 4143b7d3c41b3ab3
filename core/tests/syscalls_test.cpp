// Once warm, the store asks nothing of the kernel. The child that shows it has a seccomp filter kill it at its first
// system call that isn't its end. Sanitizers make calls of their own, so it isn't shown under them.
#include <csignal>
#include <cstddef>
#include <cstring>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {

constexpr u64 kSizes[] = {100, 1 << 10, 20 << 10, 1 << 20};

// Puts, overwrites, reads, removals, and evictions by them: 12 of the larger ones fill the memory.
void use(Store& store, Space space, const std::string& value, u32 rounds) {
    u8 out[4096];
    for (u32 round = 0; round < rounds; ++round) {
        const u64 number = round % 37, size = kSizes[round % std::size(kSizes)];
        const Key key{reinterpret_cast<const u8*>(&number), sizeof number};
        auto reservation = store.reserve(space, key, size, {}, true);
        reservation->header.payload_crc = copy_crc32c(reservation->payload(), value.data(), size, 0);
        store.publish(*reservation);
        Pin pin;
        Small small{out, sizeof out};
        {
            Uses uses(store, space);
            store.acquire(space, key, pin, &small, &uses);
        }
        if (round % 5 == 0) store.remove(space, key);
    }
}

// From now on any system call but the last kills this process.
bool forbid_calls() {
    sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };
    const sock_fprog program{std::size(rules), rules};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// How a child ends that makes system calls impossible, and acts then.
template <class Act>
int end_without_calls(Act&& act) {
    const pid_t child = fork();
    if (child == 0) {
        auto store = Store::open_private({8 << 20, 0});
        const Space space = store->open_namespace(0, "default", 1, {});
        const std::string value(1 << 20, 'v');
        use(*store, space, value, 3000);
        if (!forbid_calls()) _exit(2);
        act(*store, space, value);
        _exit(0);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    return status;
}

}  // namespace

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST(a_warm_store_puts_gets_removes_and_evicts_without_a_system_call) {
    const int status = end_without_calls([](Store& store, Space space, const std::string& value) {
        use(store, space, value, 3000);
    });
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(a_system_call_would_have_been_noticed) {
    const int status = end_without_calls([](Store&, Space, const std::string&) { syscall(SYS_getppid); });
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
}
#endif
