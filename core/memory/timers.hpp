// When records expire: a hierarchical timing wheel (Varghese, Lauck: "Hashed and Hierarchical Timing Wheels", SOSP 1987), so
// that what has expired is found without looking at the rest.
//
// Six levels of 64 slots; a slot of the lowest is 64 ms, and each level's slot is a turn of the level below. A timer lies on
// the level of the highest digit in which its time differs from now, and comes down as that digit is reached: six times
// at most. Slots are lists linked through the entries; what has run out gathers in a list of its own.
#pragma once

#include <algorithm>
#include <bit>

#include "base/types.hpp"

namespace kvstrata {

// In every entry. Numbers of entries are below kHead.
struct TimerLinks {
    u32 prev, next;  // prev: kHead + the slot when it is the first there, 0 when it is in no slot
};

struct Timers {
    static constexpr u32 kLevels = 6, kSlots = 64, kDigit = 6;
    static constexpr u32 kDue = kLevels * kSlots;  // the slot of what has run out
    static constexpr u32 kHead = 1u << 31;
    static constexpr u64 kTickMs = 64;

    u64 now;  // ticks since the Unix epoch
    u64 occupied[kLevels];
    u32 heads[kDue + 1];

    u32 first_due() const { return heads[kDue]; }

    // `links(number)` gives the links of an entry, `expires(number)` when it expires, in ms since the Unix epoch.
    template <class Links>
    void add(u32 number, u64 expires, Links&& links) {
        const u64 when = std::min(expires / kTickMs + 1, now + (u64{kSlots - 1} << kDigit * (kLevels - 1)));
        u32 slot = kDue;
        if (when > now) {
            const u32 level = static_cast<u32>(std::bit_width((now ^ when) | (kSlots - 1)) - 1) / kDigit;
            const u32 on_top = std::min(level, kLevels - 1);
            const u32 digit = static_cast<u32>(when >> kDigit * on_top) % kSlots;
            occupied[on_top] |= u64{1} << digit;
            slot = on_top * kSlots + digit;
        }
        links(number) = {kHead + slot, heads[slot]};
        if (heads[slot]) links(heads[slot]).prev = number;
        heads[slot] = number;
    }

    template <class Links>
    void remove(u32 number, Links&& links) {
        const TimerLinks at = links(number);
        if (!at.prev) return;
        if (at.next) links(at.next).prev = at.prev;
        if (at.prev < kHead) {
            links(at.prev).next = at.next;
        } else {
            const u32 slot = at.prev - kHead;
            heads[slot] = at.next;
            if (!at.next && slot < kDue) occupied[slot / kSlots] &= ~(u64{1} << slot % kSlots);
        }
        links(number) = {0, 0};
    }

    // Moves what has run out by then to the list of what is due.
    template <class Links, class Expires>
    void advance(u64 now_ms, Links&& links, Expires&& expires) {
        const u64 until = now_ms / kTickMs;
        for (;;) {
            u64 deadline = ~u64{0};
            u32 slot = 0;
            for (u32 level = 0; level < kLevels; ++level) {  // lower levels run out first
                if (!occupied[level]) continue;
                const u64 position = now >> kDigit * level;
                const u32 ahead = static_cast<u32>(std::countr_zero(std::rotr(occupied[level], static_cast<int>(position % kSlots))));
                deadline = (position + ahead) << kDigit * level;
                slot = level * kSlots + static_cast<u32>((position + ahead) % kSlots);
                break;
            }
            if (deadline > until) break;
            now = std::max(now, deadline);
            u32 next = heads[slot];
            heads[slot] = 0;
            occupied[slot / kSlots] &= ~(u64{1} << slot % kSlots);
            while (next) {
                const u32 number = next;
                next = links(number).next;
                add(number, expires(number), links);
            }
        }
        now = std::max(now, until);
    }
};

}  // namespace kvstrata
