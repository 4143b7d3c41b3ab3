// The allocator of the data region: O(1), with all of its bookkeeping outside the data.
//
// Blocks up to 8 KiB come from slabs of 64 KiB; larger ones are runs of 4 KiB pages, kept by size in a two-level table
// of bins (after TLSF: Masmano, Ripoll, Crespo, Real, "TLSF: a new dynamic memory allocator for real-time systems",
// 2004). Each step is ordered so that the page table can be walked after a death at any point; `repair` does that.
#pragma once

#include <vector>

#include "region.hpp"

namespace kvstrata {

class Allocator {
public:
    explicit Allocator(Region& region);

    void init();  // once, by the creator

    // Takes a block of `units` for in-flight slot `slot` of `client`; false when no free run is long enough.
    bool allocate(u32 units, u32 client, u32 slot);
    // Gives back the block in that in-flight slot, and empties the slot.
    void release(u32 client, u32 slot);

    // Says which entry a block belongs to, from now on: whoever needs its place asks that entry to leave.
    void set_owner(u32 block, u32 units, u32 entry);

    // Needs no lock: asks for what set_owner() and release() of a block will touch.
    void prefetch(u32 block) const {
        __builtin_prefetch(&back_[block / (kPage / kUnit)]);
        __builtin_prefetch(&pages_[block / (kPage / kUnit)]);
    }

    struct Resident {
        u32 entry, block;  // kNone and kNone: a block that nobody can be asked to leave
    };
    // A run of pages near a block, with what lives in it; free when there are no residents.
    struct Neighbour {
        u32 first, length;
        u32 from, to;  // of the residents
    };
    struct Neighbourhood {
        std::vector<Neighbour> runs;  // in order of address
        std::vector<Resident> residents;
    };
    // How many pages in one piece have to be free before a block of `units` fits for sure.
    static u32 pages_wanted(u32 units);
    // The runs around `block`, as far as a block of `units` that needs its place could reach.
    // None when the block is in a slab that takes blocks of this size: its own place will do.
    void find_neighbours(u32 block, u32 block_units, u32 units, Neighbourhood& found);

    static bool is_small(u32 units);  // whether blocks of `units` come from slabs
    // Whether pages for a block of `units` are free in one piece.
    bool has_room(u32 units);

    // Takes the next chunk of entries for `shard`; kNone when all are taken or memory is short.
    u32 take_chunk(u32 shard);

    struct Usage {
        u64 total, used, free, largest_free;  // bytes; free includes room in slabs
        u64 faults;                           // double frees that were refused
        u64 overruns, late_writes;            // blocks that were written to beyond their end, or when free (debug builds)
        u32 free_runs;

        // The part of the free memory that isn't in one piece; 0 when none is free.
        double fragmentation() const {
            return free ? 1 - static_cast<double>(largest_free) / static_cast<double>(free) : 0;
        }
    };
    Usage usage();

private:
    static constexpr u32 kUnitsPerPage = kPage / kUnit;
    static constexpr u32 kSlabUnits = kSlabPages * kUnitsPerPage;
    enum Operation : u32 { kNothing = 0, kAllocating = 1, kFreeing = 2 };
    // What a block of `units` takes.
    static u32 extent(u32 units) { return units + kCanaryUnits; }
    static u32 pages_for(u32 units) { return (units + kUnitsPerPage - 1) / kUnitsPerPage; }

    RobustLock lock();
    void begin(u32 operation, u32 client, u32 slot);
    InFlight& in_flight(u32 client, u32 slot) const;
    PageDescriptor& page(u32 number) const { return pages_[number]; }
    using Word [[gnu::may_alias]] = u64;
    Word* bitmap(u32 slab) const { return reinterpret_cast<Word*>(&pages_[slab + 1]); }
    static u32 class_of(u32 units);
    static u32 class_units(u32 size_class);
    // A slab of many small blocks has the list of their owners in itself, before the blocks; others in the page table.
    static bool owners_inside(u32 size_class);
    static u32 first_block(u32 size_class);    // in units from the start of the slab
    static u32 blocks_of(u32 size_class);
    u32* owners(u32 slab) const;
    u32 slab_of(u32 block) const;
    u32 index_in(u32 slab, u32 block) const;
    void describe(u32 first, Neighbourhood& found) const;

    u32 find_run(u32 length) const;
    void bin_run(u32 first, u32 length);
    void unbin_run(u32 first);
    void take_pages(u32 first, u32 length, PageKind kind, u8 size_class);
    void free_pages(u32 first);
    u32 find_block(u32 size_class);
    void link_slab(u32 slab);
    void unlink_slab(u32 slab);
    bool is_allocated(u32 block, u32 units) const;
    void hand_out(u32 block, u32 units, bool was_free);
    void take_back(u32 block, u32 units);
    void mark_free(u32 block, u32 units);
    void free_block(u32 block, u32 units);
    void repair();

    Region& region_;
    AllocatorState& state_;
    PageDescriptor* pages_;
    u8* back_;  // for a page of a slab: how many pages behind it the slab starts
};

}  // namespace kvstrata
