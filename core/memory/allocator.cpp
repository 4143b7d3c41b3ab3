#include "allocator.hpp"

#include <bit>
#include <cstring>

#include "base/failpoints.hpp"

namespace kvstrata {
namespace {

constexpr u32 kOwnBinTries = 8;

struct Bin {
    u32 row, column;
};

Bin bin_of(u32 length) {
    const u32 row = static_cast<u32>(std::bit_width(length)) - 1;
    return {row, static_cast<u32>((u64{length} << 3 >> row) & 7)};
}

// Writes what counts of a first page in one store, so that a walk sees the old run or the new one.
void store_head(PageDescriptor& head, u32 length, PageKind kind, u8 size_class = 0) {
    using Word [[gnu::may_alias]] = u64;
    const PageDescriptor wanted{length, kind, size_class, 0, kNone, kNone};
    Word word;
    std::memcpy(&word, &wanted, sizeof word);
    __atomic_store_n(reinterpret_cast<Word*>(&head), word, __ATOMIC_RELAXED);
}

}  // namespace

Allocator::Allocator(Region& region)
    : region_(region),
      state_(region.header().allocator),
      pages_(reinterpret_cast<PageDescriptor*>(region.at(region.header().pages_at))),
      back_(region.at(region.header().pages_at) +
            (region.header().end - region.header().data_at) / kPage * sizeof(PageDescriptor)) {}

void Allocator::init() {
    state_.mutex.init();
    state_.pages = static_cast<u32>((region_.header().end - region_.header().data_at) / kPage);
    state_.free_pages = state_.pages - 1;
    pages_[0].kind = PageKind::run;  // never handed out
    pages_[0].length = 1;
    bin_run(1, state_.free_pages);
    if constexpr (kDebug) mark_free(kUnitsPerPage, state_.free_pages * kUnitsPerPage);
}

RobustLock Allocator::lock() {
    return RobustLock(state_.mutex, [this] { repair(); });
}

InFlight& Allocator::in_flight(u32 client, u32 slot) const {
    const u64 stride = align_up(sizeof(Client), kPage);
    auto* const owner = reinterpret_cast<Client*>(region_.at(region_.header().clients_at + client * stride));
    return owner->in_flight[slot];
}

// Steps of one unit up to 32 units, then eight steps an octave.
u32 Allocator::class_of(u32 units) {
    if (units <= 32) return units - 1;
    if (units <= 64) return 32 + (units - 32 + 3) / 4 - 1;
    return 40 + (units - 64 + 7) / 8 - 1;
}

u32 Allocator::class_units(u32 size_class) {
    if (size_class < 32) return size_class + 1;
    if (size_class < 40) return 32 + (size_class - 31) * 4;
    return 64 + (size_class - 39) * 8;
}

bool Allocator::owners_inside(u32 size_class) {
    // Between the first descriptor and the last: a word of bits, and four bytes a block.
    return kSlabUnits / class_units(size_class) > ((kSlabPages - 2) * sizeof(PageDescriptor) - sizeof(u64)) / sizeof(u32);
}

u32 Allocator::first_block(u32 size_class) {
    if (!owners_inside(size_class)) return 0;
    return static_cast<u32>(align_up(kSlabUnits / class_units(size_class) * sizeof(u32), kUnit) / kUnit);
}

u32 Allocator::blocks_of(u32 size_class) { return (kSlabUnits - first_block(size_class)) / class_units(size_class); }

u32* Allocator::owners(u32 slab) const {
    if (owners_inside(page(slab).size_class)) return reinterpret_cast<u32*>(region_.data() + u64{slab} * kPage);
    return reinterpret_cast<u32*>(&pages_[slab + 1]) + sizeof(u64) / sizeof(u32);
}

u32 Allocator::slab_of(u32 block) const { return block / kUnitsPerPage - back_[block / kUnitsPerPage]; }

u32 Allocator::index_in(u32 slab, u32 block) const {
    const u32 size_class = page(slab).size_class;
    return (block - slab * kUnitsPerPage - first_block(size_class)) / class_units(size_class);
}

// ---- Runs of pages ------------------------------------------------------------------------------

// Makes [first, first + length) a free run and puts it in its bin. Until its first page says so, its last one may be a run
// of its own, which counts.
void Allocator::bin_run(u32 first, u32 length) {
    PageDescriptor& head = page(first);
    store_head(head, length, PageKind::free);
    KVSTRATA_COMMIT("allocator.tail");
    if (length > 1) {
        page(first + length - 1).kind = PageKind::free_tail;
        page(first + length - 1).length = length;
    }
    const auto [row, column] = bin_of(length);
    head.prev = kNone;
    head.next = state_.bins[row][column];
    if (head.next) page(head.next).prev = first;
    state_.bins[row][column] = first;
    state_.first_level |= 1u << row;
    state_.second_level[row] |= 1u << column;
}

void Allocator::unbin_run(u32 first) {
    const PageDescriptor& head = page(first);
    const auto [row, column] = bin_of(head.length);
    if (head.next) page(head.next).prev = head.prev;
    if (head.prev) {
        page(head.prev).next = head.next;
    } else {
        state_.bins[row][column] = head.next;
        if (!head.next) {
            state_.second_level[row] &= ~(1u << column);
            if (!state_.second_level[row]) state_.first_level &= ~(1u << row);
        }
    }
}

// A free run of at least `length` pages, kNone if there is none (or only in its own bin, beyond the first few).
u32 Allocator::find_run(u32 length) const {
    const auto [row, column] = bin_of(length);
    u32 candidate = state_.bins[row][column];
    for (u32 tries = 0; candidate && tries < kOwnBinTries; ++tries) {
        if (page(candidate).length >= length) return candidate;
        candidate = page(candidate).next;
    }
    const u32 columns = state_.second_level[row] & (~0u << column << 1);
    if (columns) return state_.bins[row][std::countr_zero(columns)];
    const u32 rows = row < 31 ? state_.first_level & (~0u << row << 1) : 0;
    if (!rows) return kNone;
    const u32 upper = static_cast<u32>(std::countr_zero(rows));
    return state_.bins[upper][std::countr_zero(state_.second_level[upper])];
}

// Turns the first `length` pages of a free run into a used run; the last store makes it so.
void Allocator::take_pages(u32 first, u32 length, PageKind kind, u8 size_class) {
    const u32 rest = page(first).length - length;
    unbin_run(first);
    if (rest) bin_run(first + length, rest);
    KVSTRATA_COMMIT("allocator.split");
    if (length > 1) {
        page(first + length - 1).kind = PageKind::interior;
        page(first + length - 1).length = length;
    }
    if (kind == PageKind::slab) {
        std::memset(&pages_[first + 1], 0, (kSlabPages - 2) * sizeof(PageDescriptor));
        for (u32 i = 0; i < kSlabPages; ++i) back_[first + i] = static_cast<u8>(i);
        if constexpr (kDebug) allow_access(region_.data() + u64{first} * kPage, u64{first_block(size_class)} * kUnit);
    }
    KVSTRATA_COMMIT("allocator.take");
    __atomic_store_n(&page(first).next, kNone, __ATOMIC_RELAXED);
    page(first).prev = kNone;
    store_head(page(first), length, kind, size_class);
    state_.free_pages -= length;
}

// Frees a used run and merges it with free neighbours; the store of the merged length makes it so.
void Allocator::free_pages(u32 first) {
    u32 start = first, length = page(first).length;
    state_.free_pages += length;
    const u32 after = first + length;
    if (after < state_.pages && page(after).kind == PageKind::free) {
        unbin_run(after);
        length += page(after).length;
    }
    const PageDescriptor& before = page(first - 1);
    if (before.kind == PageKind::free_tail || before.kind == PageKind::free) {
        start = first - before.length;
        unbin_run(start);
        length += page(start).length;
    }
    KVSTRATA_COMMIT("allocator.merge");
    bin_run(start, length);
    if (start != first) page(first).kind = PageKind::interior;  // so that a second free of it is seen
}

// ---- Slabs --------------------------------------------------------------------------------------

void Allocator::link_slab(u32 slab) {
    PageDescriptor& head = page(slab);
    head.prev = kNone;
    head.next = state_.slabs[head.size_class];
    if (head.next) page(head.next).prev = slab;
    state_.slabs[head.size_class] = slab;
}

void Allocator::unlink_slab(u32 slab) {
    const PageDescriptor& head = page(slab);
    if (head.next) page(head.next).prev = head.prev;
    (head.prev ? page(head.prev).next : state_.slabs[head.size_class]) = head.next;
}

// A free block of the class, as an offset in units; opens a new slab when there is none.
u32 Allocator::find_block(u32 size_class) {
    u32 slab = state_.slabs[size_class];
    if (!slab) {
        slab = find_run(kSlabPages);
        if (!slab) return kNone;
        take_pages(slab, kSlabPages, PageKind::slab, static_cast<u8>(size_class));
        link_slab(slab);
    }
    const u32 units = class_units(size_class), blocks = blocks_of(size_class);
    const Word* const bits = bitmap(slab);
    for (u32 word = 0; word * 64 < blocks; ++word) {
        const u32 bit = static_cast<u32>(std::countr_one(bits[word]));
        if (bit < 64 && word * 64 + bit < blocks)
            return slab * kUnitsPerPage + first_block(size_class) + (word * 64 + bit) * units;
    }
    return kNone;  // not reached: a slab in the list has room
}

// ---- Blocks -------------------------------------------------------------------------------------

// Says for repair() what is being done, and to the block in which slot: never an operation with another's slot.
void Allocator::begin(u32 operation, u32 client, u32 slot) {
    state_.client = client;
    state_.slot = slot;
    KVSTRATA_COMMIT("allocator.slot");
    state_.operation = operation;
}

bool Allocator::allocate(u32 units, u32 client, u32 slot) {
    const RobustLock held = lock();
    InFlight& flight = in_flight(client, slot);
    const u32 whole = extent(units);
    const bool small = whole <= kSmallUnits;
    const u32 block = small ? find_block(class_of(whole)) : find_run(pages_for(whole)) * kUnitsPerPage;
    if (!block) return false;
    begin(kAllocating, client, slot);
    KVSTRATA_COMMIT("allocator.begin");
    flight.units = units;
    flight.entry = kNone;
    flight.block = block;
    KVSTRATA_COMMIT("allocator.announced");
    if (small) {
        const u32 slab = slab_of(block), index = index_in(slab, block);
        __atomic_store_n(&owners(slab)[index], kNone, __ATOMIC_RELAXED);
        bitmap(slab)[index / 64] |= u64{1} << (index % 64);
        if (++page(slab).used == blocks_of(page(slab).size_class)) unlink_slab(slab);
    } else {
        take_pages(block / kUnitsPerPage, pages_for(whole), PageKind::run, 0);
    }
    if constexpr (kDebug) hand_out(block, units, true);
    KVSTRATA_COMMIT("allocator.done");
    state_.operation = kNothing;
    return true;
}

bool Allocator::is_allocated(u32 block, u32 asked) const {
    const u32 units = extent(asked);
    const u32 number = block / kUnitsPerPage;
    if (!number || number >= state_.pages) return false;
    if (units > kSmallUnits)
        return block % kUnitsPerPage == 0 && page(number).kind == PageKind::run && page(number).length == pages_for(units);
    if (back_[number] > number) return false;
    const u32 slab = slab_of(block);
    if (page(slab).kind != PageKind::slab || page(slab).size_class != class_of(units)) return false;
    if (block - slab * kUnitsPerPage < first_block(page(slab).size_class)) return false;
    const u32 index = index_in(slab, block);
    return bitmap(slab)[index / 64] >> (index % 64) & 1;
}

void Allocator::free_block(u32 block, u32 units) {
    const u32 number = block / kUnitsPerPage;
    if constexpr (kDebug) take_back(block, units);
    if (!is_small(units)) return free_pages(number);
    const u32 slab = slab_of(block), index = index_in(slab, block);
    if (page(slab).used == blocks_of(page(slab).size_class)) link_slab(slab);
    bitmap(slab)[index / 64] &= ~(u64{1} << (index % 64));
    KVSTRATA_COMMIT("allocator.freed");
    if (--page(slab).used == 0) {
        if constexpr (kDebug) mark_free(slab * kUnitsPerPage, kSlabUnits);
        unlink_slab(slab);
        free_pages(slab);
    }
}

void Allocator::release(u32 client, u32 slot) {
    const RobustLock held = lock();
    InFlight& flight = in_flight(client, slot);
    if (!is_allocated(flight.block, flight.units)) {
        ++state_.faults;  // a double free, refused
    } else {
        begin(kFreeing, client, slot);
        KVSTRATA_COMMIT("allocator.freeing");
        free_block(flight.block, flight.units);
        KVSTRATA_COMMIT("allocator.released");
    }
    flight.block = kNone;
    KVSTRATA_COMMIT("allocator.forgotten");
    state_.operation = kNothing;
}

void Allocator::set_owner(u32 block, u32 units, u32 entry) {
    u32* at = &page(block / kUnitsPerPage).next;
    if (is_small(units)) {
        const u32 slab = slab_of(block);
        at = &owners(slab)[index_in(slab, block)];
    }
    __atomic_store_n(at, entry, __ATOMIC_RELAXED);
}

void Allocator::describe(u32 first, Neighbourhood& found) const {
    const PageDescriptor& head = page(first);
    Neighbour run{first, head.length, static_cast<u32>(found.residents.size()), 0};
    auto add = [&](u32 entry, u32 block) {
        found.residents.push_back(entry ? Resident{entry, block} : Resident{kNone, kNone});
    };
    if (head.kind == PageKind::run) add(__atomic_load_n(&head.next, __ATOMIC_RELAXED), first * kUnitsPerPage);
    if (head.kind == PageKind::slab)
        for (u32 index = 0; index < blocks_of(head.size_class); ++index)
            if (bitmap(first)[index / 64] >> (index % 64) & 1)
                add(__atomic_load_n(&owners(first)[index], __ATOMIC_RELAXED),
                    first * kUnitsPerPage + first_block(head.size_class) + index * class_units(head.size_class));
    run.to = static_cast<u32>(found.residents.size());
    found.runs.push_back(run);
}

u32 Allocator::pages_wanted(u32 units) {
    return is_small(units) ? kSlabPages : pages_for(extent(units));
}

bool Allocator::is_small(u32 units) { return extent(units) <= kSmallUnits; }

bool Allocator::has_room(u32 units) {
    const RobustLock held = lock();
    return find_run(pages_wanted(units)) != kNone;
}

void Allocator::find_neighbours(u32 block, u32 block_units, u32 units, Neighbourhood& found) {
    found.runs.clear();
    found.residents.clear();
    const RobustLock held = lock();
    if (!is_allocated(block, block_units)) return;
    const u32 whole = extent(units), block_whole = extent(block_units);
    if (whole <= kSmallUnits && block_whole <= kSmallUnits && class_of(whole) == class_of(block_whole)) return;
    const u32 wanted = pages_wanted(units);
    const u32 first = block_whole <= kSmallUnits ? slab_of(block) : block / kUnitsPerPage;
    u32 start = first;
    for (u32 reach = page(first).length; start > 1 && reach < wanted;) {
        const u32 length = page(start - 1).length;
        start -= length;
        reach += length;
    }
    const u32 stop = std::min(state_.pages, first + std::max(wanted, page(first).length));
    for (u32 at = start; at < stop; at += page(at).length) describe(at, found);
}

// ---- Entries and figures ------------------------------------------------------------------------

u32 Allocator::take_chunk(u32 shard) {
    const RobustLock held = lock();
    Header& header = region_.header();
    const u32 chunk = header.chunks.load();
    if (chunk >= header.max_entries / kChunk) return kNone;
    const u64 end = align_up(u64{chunk + 1} * kChunk * sizeof(Entry), kPage);
    if (end > header.entries_backed.load()) {
        const u64 limit = header.scratch_at - header.entries_at;
        const u64 more = std::min(limit, end + 64 * kPage);
        try {
            region_.back(header.entries_at + header.entries_backed.load(), more - header.entries_backed.load());
        } catch (const OsError&) {
            return kNone;
        }
        header.entries_backed.store(more);
    }
    region_.at(header.owners_at)[chunk] = static_cast<u8>(shard + 1);
    KVSTRATA_COMMIT("allocator.chunk");
    header.chunks.store(chunk + 1);
    return chunk + 1;
}

Allocator::Usage Allocator::usage() {
    const RobustLock held = lock();
    Usage usage{};
    usage.total = u64{state_.pages - 1} * kPage;
    usage.free = u64{state_.free_pages} * kPage;
    usage.faults = state_.faults;
    usage.overruns = state_.overruns;
    usage.late_writes = state_.late_writes;
    for (u32 number = 1; number < state_.pages; number += page(number).length) {
        const PageDescriptor& head = page(number);
        if (head.kind == PageKind::free) {
            ++usage.free_runs;
            usage.largest_free = std::max(usage.largest_free, u64{head.length} * kPage);
        } else if (head.kind == PageKind::slab) {
            usage.free += (blocks_of(head.size_class) - head.used) * u64{class_units(head.size_class)} * kUnit;
        }
    }
    usage.used = usage.total - usage.free;
    return usage;
}

}  // namespace kvstrata
