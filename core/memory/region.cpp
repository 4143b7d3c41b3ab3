#include "region.hpp"

#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <tuple>

namespace kvstrata {
namespace {

constexpr u64 kGuard = 64 * 1024;
constexpr u64 kPiece = 64 << 20;  // allocated at once
constexpr u64 kHuge = 2 << 20;    // bytes of a huge page
constexpr int kPopulateRead = 22, kPopulateWrite = 23, kCollapse = 25;  // MADV_*, newer than some headers

[[noreturn]] void fail(const std::string& what, int code = errno) {
    throw OsError(what + ": " + std::strerror(code), code);
}

// Where everything lies, for these options.
void lay_out(Header& header, const StoreOptions& options) {
    const u64 data = align_up(options.memory, kPage) + kPage;  // page 0 is never handed out
    if (data / kUnit > ~u32{0}) throw InvalidValue("memory is limited to 256 GiB a cache");
    const u64 wanted = options.memory / 256 + options.disk / 4096 + 4096;
    header.max_entries = static_cast<u32>(std::min<u64>(align_up(wanted, kChunk), u64{1} << 31));
    header.max_buckets = std::bit_ceil(std::max<u32>(1024, header.max_entries / kShards));
    u64 at = kPage;
    auto place = [&](u64 bytes) {
        const u64 here = at;
        at = align_up(at + bytes, kPage);
        return here;
    };
    static_assert(sizeof(Header) <= kPage);
    header.clients_at = place(align_up(sizeof(Client), kPage) * kMaxClients);
    header.namespaces_at = place(sizeof(Namespace) * kMaxNamespaces);
    header.shards_at = place(sizeof(Shard) * kShards);
    header.owners_at = place(header.max_entries / kChunk);
    // Room for one forgotten record to 64 that are in the index. Without a disk nobody owes anything.
    header.debts = BloomShape::of(options.disk ? std::max<u64>(16384, header.max_entries / 64) : 64, kDebtsForNothing);
    header.debts_at = place(header.debts.bytes());
    // As many keys as the tier below would have records of 64 KiB. What wasn't seen is seldom taken for seen.
    header.seen = BloomShape::of(options.disk ? std::clamp<u64>(options.disk / 65536, 4096, 1 << 20) : 64, 0.01);
    header.seen_at = place(2 * header.seen.bytes());
    header.holders_at = place(kHolders * sizeof(Holder));
    header.promises_at = place(sizeof(Promises));
    header.tags_at = place(kTagSlots * sizeof(u64));  // memory comes as tags are used
    header.changes_at = place(kChangeSlots * sizeof(Changes));  // memory comes when somebody watches
    header.buckets_at = place(u64{header.max_buckets} * kShards * sizeof(u32));
    header.entries_at = place(u64{header.max_entries} * sizeof(Entry));
    // Of address space; how much memory is behind it depends on the policies (core/scratch.cpp).
    header.scratch_at = place(u64{header.max_entries} * 64 + options.memory / 64 + kMaxNamespaces * u64{65536});
    header.pages_at = place(data / kPage * sizeof(PageDescriptor) + data / kPage);
    header.data_at = at;
    header.end = at + data;
}

// Bytes of memory that can be had without anybody being killed for it; 0 when that can't be told.
u64 memory_available() {
    std::ifstream info("/proc/meminfo");
    u64 available = 0, kilobytes;
    for (std::string name, unit; info >> name >> kilobytes; std::getline(info, unit))
        if (name == "MemAvailable:" || name == "SwapFree:") available += kilobytes * 1024;
    return available;
}

// Refuses what can't be had before any of it is taken: the kernel would kill some process when memory runs out.
void require_memory(int descriptor, u64 bytes) {
    struct statvfs place{};
    if (fstatvfs(descriptor, &place) == 0 && place.f_blocks && bytes > u64{place.f_bavail} * place.f_frsize)
        fail("no room for the cache's memory", ENOSPC);
    const u64 available = memory_available();
    if (available && bytes > available) fail("not enough memory for the cache", ENOMEM);
}

u8* reserve_addresses(u64 bytes) {
    void* where = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (where == MAP_FAILED) fail("no address space for the cache");
    return static_cast<u8*>(where);
}

void map_over(u8* where, u64 bytes, int protection, int descriptor, u64 offset) {
    if (mmap(where, bytes, protection, MAP_SHARED | MAP_FIXED, descriptor, static_cast<off_t>(offset)) == MAP_FAILED)
        fail("can't map the cache");
}

struct flock client_range(short type, u32 slot, u32 count) {
    struct flock range{};
    range.l_type = type;
    range.l_whence = SEEK_SET;
    range.l_start = static_cast<off_t>(kClientLock + slot);
    range.l_len = count;
    return range;
}

// An allocation that a signal interrupts is undone by some kernels; a profiler's timer would never let it end.
class SignalsHeldBack {
public:
    SignalsHeldBack() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsHeldBack() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsHeldBack(const SignalsHeldBack&) = delete;
    SignalsHeldBack& operator=(const SignalsHeldBack&) = delete;

private:
    sigset_t before_;
};

// Opens one's own file, which nobody else can have written; -1 where there is none. In a directory that is everybody's, others
// may have put one there.
int open_own(const std::string& file) {
    const int descriptor = open(file.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (descriptor < 0) {
        if (errno == ENOENT) return -1;
        fail("can't open " + file);
    }
    struct stat status{};
    if (fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == geteuid() && !(status.st_mode & 022))
        return descriptor;
    close(descriptor);
    throw ConfigError(file + " is no file that only this user (" + std::to_string(geteuid()) + ") can write to, so it can't be trusted; "
                      "remove it, or let $KVSTRATA_SHM_DIR name a directory of this user's own");
}

u64 size_of(int descriptor) {
    struct stat status{};
    return fstat(descriptor, &status) == 0 ? static_cast<u64>(status.st_size) : 0;
}

// Whether everything lies where this build would put it, for the options that the header tells of.
bool is_laid_out(const Header& header) {
    Header plan{};
    try {
        lay_out(plan, {header.memory, header.disk});
    } catch (const InvalidValue&) {
        return false;
    }
    const auto offsets = [](const Header& of) {
        return std::tie(of.max_entries, of.max_buckets, of.debts.counters, of.debts.hashes, of.seen.counters, of.seen.hashes, of.clients_at,
                        of.namespaces_at, of.shards_at, of.owners_at, of.debts_at, of.seen_at, of.holders_at, of.promises_at, of.tags_at,
                        of.changes_at, of.buckets_at, of.entries_at, of.scratch_at, of.pages_at, of.data_at, of.end);
    };
    return offsets(plan) == offsets(header);
}

bool anybody_holds(int descriptor, u32 slot, u32 count) {
    struct flock range = client_range(F_WRLCK, slot, count);
    if (fcntl(descriptor, F_OFD_GETLK, &range) != 0) fail("can't ask for the cache's locks");
    return range.l_type != F_UNLCK;
}

}  // namespace

// Maps the data after a guard, at an address that a huge page of the file can have, too.
u8* Region::map_data(u8* reserved, int protection, u64 metadata, u64 data) const {
    const u64 first = reinterpret_cast<u64>(reserved) + kGuard;
    u8* const at = reserved + kGuard + (metadata - first) % kHuge;
    map_over(at, data, protection, descriptor_, metadata);
    return at;
}

void Region::map(u64 metadata, u64 data) {
    data_bytes_ = data;
    view_reserved_ = kGuard + kHuge + data + kGuard;
    reserved_ = metadata + view_reserved_;
    base_ = reserve_addresses(reserved_);
    map_over(base_, metadata, PROT_READ | PROT_WRITE, descriptor_, 0);
    data_ = map_data(base_ + metadata, PROT_READ | PROT_WRITE, metadata, data);
    view_around_ = reserve_addresses(view_reserved_);
    view_ = map_data(view_around_, PROT_READ, metadata, data);
}

// The memory is there already, in small pages: allocated ones are collapsed, whatever shmem_enabled says short of "deny".
void Region::use_huge_pages() const {
    for (u8* const start : {data_, view_}) {
        const u64 first = reinterpret_cast<u64>(start), from = align_up(first, kHuge);
        const u64 to = (first + data_bytes_) / kHuge * kHuge;
        if (from >= to) throw OsError("the memory is smaller than a huge page", EINVAL);
        u8* const at = start + (from - first);
        if (madvise(at, to - from, MADV_HUGEPAGE) != 0 || madvise(at, to - from, kCollapse) != 0) fail("no huge pages");
    }
}

std::unique_ptr<Region> Region::create(int descriptor, const StoreOptions& options) {
    std::unique_ptr<Region> region(new Region(descriptor));
    Header plan{};
    lay_out(plan, options);
    require_memory(descriptor, plan.end - plan.pages_at + plan.tags_at - plan.namespaces_at);
    if (ftruncate(descriptor, static_cast<off_t>(plan.end)) != 0) fail("can't size the cache's memory");
    region->back(0, kPage);
    region->back(plan.namespaces_at, plan.tags_at - plan.namespaces_at);
    region->back(plan.pages_at, plan.end - plan.pages_at);
    region->map(plan.data_at, plan.end - plan.data_at);
    // Touch it all now, in one call each: a first touch later would cost a fault per page on the hot path.
    madvise(region->data_, region->data_bytes_, kPopulateWrite);
    madvise(region->view_, region->data_bytes_, kPopulateRead);
    Header& header = region->header();
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    header.format = kFormat;
    header.memory = options.memory;
    header.disk = options.disk;
    header.max_entries = plan.max_entries;
    header.max_buckets = plan.max_buckets;
    header.clients_at = plan.clients_at;
    header.namespaces_at = plan.namespaces_at;
    header.shards_at = plan.shards_at;
    header.owners_at = plan.owners_at;
    header.debts = plan.debts;
    header.debts_at = plan.debts_at;
    header.seen = plan.seen;
    header.seen_at = plan.seen_at;
    header.holders_at = plan.holders_at;
    header.promises_at = plan.promises_at;
    header.tags_at = plan.tags_at;
    header.changes_at = plan.changes_at;
    header.buckets_at = plan.buckets_at;
    header.entries_at = plan.entries_at;
    header.scratch_at = plan.scratch_at;
    header.pages_at = plan.pages_at;
    header.data_at = plan.data_at;
    header.end = plan.end;
    if (getrandom(header.secret, sizeof header.secret, 0) != static_cast<ssize_t>(sizeof header.secret))
        fail("no random numbers");
    return region;
}

std::unique_ptr<Region> Region::create_private(const StoreOptions& options) {
    const int descriptor = memfd_create("kvstrata", MFD_CLOEXEC);
    if (descriptor < 0) fail("can't create the cache's memory");
    return create(descriptor, options);
}

std::unique_ptr<Region> Region::create_shared(const std::string& file, const StoreOptions& options) {
    const int descriptor = open(file.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (descriptor < 0) fail("can't create " + file);
    try {
        return create(descriptor, options);
    } catch (...) {
        unlink(file.c_str());
        throw;
    }
}

RegionProbe Region::probe(const std::string& file) {
    RegionProbe found;
    const int descriptor = open_own(file);
    if (descriptor < 0) return found;
    found.exists = true;
    alignas(Header) unsigned char bytes[sizeof(Header)] = {};
    const ssize_t got = pread(descriptor, bytes, sizeof bytes, 0);
    const auto& header = reinterpret_cast<const Header&>(bytes);
    if (got == static_cast<ssize_t>(sizeof bytes) && std::memcmp(header.magic, kMagic, sizeof kMagic) == 0) {
        found.format = header.format;
        found.ready = header.format == kFormat && header.ready.load() == 1 && is_laid_out(header) && size_of(descriptor) == header.end;
        found.options = {header.memory, header.disk};
    }
    found.in_use = anybody_holds(descriptor, 0, kMaxClients);
    close(descriptor);
    return found;
}

std::unique_ptr<Region> Region::attach_shared(const std::string& file) {
    const int descriptor = open_own(file);
    if (descriptor < 0) fail("can't open " + file, ENOENT);
    return attach(descriptor, file);
}

namespace {
int open_again(int descriptor) {
    const int another = open(("/proc/self/fd/" + std::to_string(descriptor)).c_str(), O_RDWR | O_CLOEXEC);
    if (another < 0) fail("can't open the cache's memory again");
    return another;
}
}  // namespace

std::unique_ptr<Region> Region::reopen() const {
    if (exclusive_.exchange(false)) {
        allow_access(data_, data_bytes_);
        allow_access(view_, data_bytes_);
    }
    return attach(open_again(descriptor_), "this");
}

Region::Region(int descriptor) : descriptor_(descriptor) {
    try {
        locks_ = open_again(descriptor);
    } catch (const OsError&) {
        locks_ = descriptor;  // without /proc; then the death of a parent is not seen while its children live
    }
}

void Region::leave_locks() {
    if (locks_ != descriptor_) close(locks_);
    locks_ = -1;
}

std::unique_ptr<Region> Region::attach(int descriptor, const std::string& file) {
    std::unique_ptr<Region> region(new Region(descriptor));
    alignas(Header) unsigned char bytes[sizeof(Header)] = {};
    if (pread(descriptor, bytes, sizeof bytes, 0) != static_cast<ssize_t>(sizeof bytes))
        throw FormatError(file + " is no kvstrata memory tier");
    const auto& header = reinterpret_cast<const Header&>(bytes);
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0)
        throw FormatError(file + " is no kvstrata memory tier");
    if (header.format != kFormat)
        throw FormatError(file + " has format " + std::to_string(header.format) + ", this release reads format " +
                          std::to_string(kFormat));
    if (!is_laid_out(header) || size_of(descriptor) != header.end)
        throw FormatError(file + " is damaged, or of another build; close the cache everywhere and remove that file");
    region->map(header.data_at, header.end - header.data_at);
    madvise(region->data_, region->data_bytes_, kPopulateWrite);
    madvise(region->view_, region->data_bytes_, kPopulateRead);
    return region;
}

Region::~Region() {
    if (exclusive_) {  // whatever comes to lie there next
        allow_access(data_, data_bytes_);
        allow_access(view_, data_bytes_);
    }
    if (base_) munmap(base_, reserved_);
    if (view_around_) munmap(view_around_, view_reserved_);
    if (locks_ >= 0 && locks_ != descriptor_) close(locks_);
    close(descriptor_);
}

void Region::back(u64 offset, u64 bytes) const {
    for (u64 done = 0; done < bytes;) {
        const u64 piece = std::min(bytes - done, kPiece);
        const SignalsHeldBack held;
        const int code = posix_fallocate(descriptor_, static_cast<off_t>(offset + done), static_cast<off_t>(piece));
        if (code == EINTR) continue;
        if (code != 0) fail("no memory for the cache (" + std::to_string(bytes) + " bytes)", code);
        done += piece;
    }
}

void Region::give_back(u64 offset, u64 bytes) const {
    fallocate(descriptor_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset), static_cast<off_t>(bytes));
}

bool Region::hold_client_lock(u32 slot) const {
    struct flock range = client_range(F_WRLCK, slot, 1);
    return fcntl(locks_, F_OFD_SETLK, &range) == 0;
}

void Region::drop_client_lock(u32 slot) const {
    struct flock range = client_range(F_UNLCK, slot, 1);
    fcntl(locks_, F_OFD_SETLK, &range);
}

bool Region::client_lock_held_elsewhere(u32 slot) const { return anybody_holds(locks_, slot, 1); }

}  // namespace kvstrata
