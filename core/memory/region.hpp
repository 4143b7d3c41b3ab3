// The mapping that is the memory tier: over a private memory file, or over a named one in /dev/shm.
#pragma once

#include <memory>
#include <string>

#include "layout.hpp"

namespace kvstrata {

struct StoreOptions {
    u64 memory;  // bytes of data
    u64 disk;    // bytes of the tier below, 0 = none; only kept for the others to compare
};

// What a file in /dev/shm says of itself.
struct RegionProbe {
    bool exists = false;
    bool ready = false;       // complete, of this format
    u32 format = 0;
    bool in_use = false;      // some process has it attached
    StoreOptions options{};
};

class Region {
public:
    static std::unique_ptr<Region> create_private(const StoreOptions& options);
    static std::unique_ptr<Region> create_shared(const std::string& file, const StoreOptions& options);
    static std::unique_ptr<Region> attach_shared(const std::string& file);
    // Promises that no other process will use it, not even a child: so debug builds may put what is free out of bounds.
    void assume_exclusive() const { exclusive_ = true; }
    bool exclusive() const { return exclusive_; }
    // Another attachment to the same memory, with locks of its own.
    std::unique_ptr<Region> reopen() const;
    static RegionProbe probe(const std::string& file);

    ~Region();
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    Header& header() const { return *reinterpret_cast<Header*>(base_); }
    u8* at(u64 offset) const { return base_ + offset; }
    u8* data() const { return data_; }              // writable: for the core only
    const u8* view() const { return view_; }        // the same bytes, mapped read-only: what readers are given

    // Puts the data into pages of 2 MiB, here and in the read-only mapping, but for its first and last part of one.
    // Throws OsError when the kernel won't. Whoever attaches later has them as well.
    void use_huge_pages() const;
    // Allocates the memory behind [offset, offset + bytes): afterwards a touch can't fail. Throws OsError(ENOSPC).
    void back(u64 offset, u64 bytes) const;
    void give_back(u64 offset, u64 bytes) const;    // the memory behind whole pages; a hint

    bool hold_client_lock(u32 slot) const;          // false when another process holds it
    void drop_client_lock(u32 slot) const;
    bool client_lock_held_elsewhere(u32 slot) const;

    void leave_locks();                             // in a forked child: they are the parent's

private:
    explicit Region(int descriptor);
    static std::unique_ptr<Region> attach(int descriptor, const std::string& name);
    static std::unique_ptr<Region> create(int descriptor, const StoreOptions& options);
    void map(u64 metadata, u64 data);
    u8* map_data(u8* reserved, int protection, u64 metadata, u64 data) const;

    int descriptor_;
    // Opened apart from what is mapped: a child that is forked keeps the mapping, and would keep the locks with it.
    int locks_;
    u8* base_ = nullptr;
    u8* data_ = nullptr;
    u8* view_ = nullptr;
    u8* view_around_ = nullptr;
    u64 reserved_ = 0, view_reserved_ = 0;  // bytes of address space
    u64 data_bytes_ = 0;
    mutable std::atomic<bool> exclusive_{false};
};

}  // namespace kvstrata
