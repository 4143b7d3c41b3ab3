// Copying bytes.
#pragma once

#include <cstring>
#include <vector>

#include "types.hpp"

namespace kvstrata {

// memcpy. Where it is `rep movsb`, as in glibc from 2 KiB to half a MiB, AMD's processors (seen on Zen 3) take three to four times
// as long when the target lies 1 to 31 bytes behind the source within a page: just as arrays of numpy do, 16 bytes into
// one, to values that begin one. Then pieces are copied, each too small for that instruction.
inline void copy_bytes(void* to, const void* from, size_t n) {
    constexpr size_t kPiece = 1024, kLongest = 512 << 10;
    const size_t apart = (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from)) % 4096;
    if (n <= kPiece || n >= kLongest || apart == 0 || apart >= 32) {
        std::memcpy(to, from, n);
        return;
    }
    u8* target = static_cast<u8*>(to);
    const u8* source = static_cast<const u8*>(from);
    for (; n > kPiece; n -= kPiece, target += kPiece, source += kPiece) std::memcpy(target, source, kPiece);
    std::memcpy(target, source, n);
}

// One way to copy lines of 64 bytes around the processor's caches; the target is aligned.
struct StreamMethod {
    const char* name;
    void (*lines)(u8* to, const u8* from, size_t count, size_t ahead);
};

// Those that this processor can run, the best first; the last is portable.
const std::vector<StreamMethod>& stream_methods();

// memcpy around the caches, for what is more than they hold: memory that is only written is not read before, and what others compute
// with stays in them. What lies `ahead` bytes further in the source is asked for, since beyond a page the processor doesn't
// follow by itself. Other threads may look at what was copied after end_of_stream().
void stream_bytes(void* to, const void* from, size_t n, size_t ahead = 4096, const StreamMethod& method = stream_methods().front());
void end_of_stream();

}  // namespace kvstrata
