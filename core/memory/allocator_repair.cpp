// What becomes of the allocator after a death inside, and what debug builds do to tell of misuse.
#include <bit>
#include <cstdio>
#include <cstring>

#include "allocator.hpp"

namespace kvstrata {

// After a death inside: rebuilds all lists from a walk over the page table, then finishes or undoes the operation.
void Allocator::repair() {
    region_.header().rebuilt_allocators.fetch_add(1);
    std::memset(state_.bins, 0, sizeof state_.bins);
    std::memset(state_.second_level, 0, sizeof state_.second_level);
    std::memset(state_.slabs, 0, sizeof state_.slabs);
    state_.first_level = 0;
    state_.free_pages = 0;
    const InFlight pending = in_flight(state_.client, state_.slot);
    bool pending_run_seen = false;
    u32 run = kNone;  // start of the free pages just walked over
    auto close_run = [&](u32 end) {
        if (run) {
            bin_run(run, end - run);
            state_.free_pages += end - run;
        }
        run = kNone;
    };
    for (u32 number = 1; number < state_.pages;) {
        PageDescriptor& head = page(number);
        const u32 length = head.length;
        if (length == 0 || length > state_.pages - number) {
            throw TierUnavailable("the memory tier's page table is damaged; close the cache everywhere and open it again");
        }
        if (head.kind == PageKind::slab) {
            head.used = 0;
            for (u32 word = 0; word * 64 < blocks_of(head.size_class); ++word)
                head.used = static_cast<u16>(head.used + std::popcount(bitmap(number)[word]));
            if (head.used == 0) {
                if constexpr (kDebug) mark_free(number * kUnitsPerPage, kSlabUnits);
                head.kind = PageKind::free;
            }
        }
        if (head.kind == PageKind::free) {
            if (!run) run = number;
        } else {
            close_run(number);
            if (head.kind == PageKind::slab && head.used < blocks_of(head.size_class)) link_slab(number);
            if (length > 1) {
                page(number + length - 1).kind = PageKind::interior;
                page(number + length - 1).length = length;
            }
            if (number * kUnitsPerPage == pending.block) pending_run_seen = true;
        }
        number += length;
    }
    close_run(state_.pages);

    if (state_.operation != kNothing) {
        InFlight& flight = in_flight(state_.client, state_.slot);
        // A page table entry inside a free run may still look like the run that it once headed.
        const bool allocated = flight.block && is_allocated(flight.block, flight.units) &&
                               (is_small(flight.units) || pending_run_seen);
        if (kDebug && state_.operation == kAllocating && allocated) hand_out(flight.block, flight.units, false);
        if (state_.operation == kFreeing && allocated) free_block(flight.block, flight.units);
        if (state_.operation == kFreeing || !allocated) flight.block = kNone;
        state_.operation = kNothing;
    }
}

// ---- Debug builds -------------------------------------------------------------------------------

// Shuts free memory off, and leaves the pattern in it that tells of late writes.
void Allocator::mark_free(u32 block, u32 units) {
    u8* const bytes = region_.data() + u64{block} * kUnit;
    allow_access(bytes, u64{units} * kUnit);
    std::memset(bytes, kFreed, u64{units} * kUnit);
    if (!region_.exclusive()) return;
    forbid_access(bytes, u64{units} * kUnit);
    forbid_access(region_.view() + u64{block} * kUnit, u64{units} * kUnit);
}

void Allocator::hand_out(u32 block, u32 units, bool was_free) {
    u8* const bytes = region_.data() + u64{block} * kUnit;
    const u64 length = u64{units} * kUnit;
    allow_access(bytes, u64{extent(units)} * kUnit);
    allow_access(region_.view() + u64{block} * kUnit, length);
    if (was_free && !all_are(bytes, u64{extent(units)} * kUnit, kFreed)) {
        ++state_.late_writes;
        std::fprintf(stderr, "kvstrata: block %u of %u units was written to after it had been freed\n", block, units);
    }
    std::memset(bytes + length, kCanary, u64{kCanaryUnits} * kUnit);
}

void Allocator::take_back(u32 block, u32 units) {
    if (!all_are(region_.data() + u64{block + units} * kUnit, u64{kCanaryUnits} * kUnit, kCanary)) {
        ++state_.overruns;
        std::fprintf(stderr, "kvstrata: block %u was written to beyond its end, which is after %u units\n", block, units);
    }
    mark_free(block, extent(units));
}

}  // namespace kvstrata
