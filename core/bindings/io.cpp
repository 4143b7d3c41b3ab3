// What takes many system calls, in one call without the GIL: in Python each of them lets go of it, and whoever computes waits for it
// as often. For small pieces of a file, what Python does around a read costs more than the read.
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/copying.hpp"
#include "bindings.hpp"

using namespace kvstrata;

namespace {

constexpr u64 kDirect = 4096;            // O_DIRECT wants file offset, length and address in these
constexpr size_t kMostJoined = 64;       // pieces that are read in one call
constexpr u64 kGap = 16 << 10;           // read over rather than left out, where it is by way of another buffer
constexpr u64 kMostBounced = 256 << 10;  // read so at once, unless one piece is longer

struct Piece {
    u64 offset;
    Buffer buffer;
    int error = 0;
    Piece(u64 at, nb::handle object) : offset(at), buffer(object, true) {}
    u64 end() const { return offset + buffer.size(); }
    bool aligned() const { return (offset | buffer.size() | reinterpret_cast<uintptr_t>(buffer.data())) % kDirect == 0; }
};

// Reads up to `size` bytes from `offset` on, fewer only at the end of the file; the errno is 0 where it went well.
std::pair<u64, int> read_at(int fd, u8* to, u64 size, u64 offset) {
    u64 done = 0;
    while (done < size) {
        const ssize_t moved = ::pread(fd, to + done, size - done, static_cast<off_t>(offset + done));
        if (moved < 0 && errno == EINTR) continue;
        if (moved == 0 || (moved < 0 && errno == EINVAL && done)) break;  // O_DIRECT can't go on from within the last page
        if (moved < 0) return {done, errno};
        done += static_cast<u64>(moved);
    }
    return {done, 0};
}

// Fills pieces, of which each begins where the one before ends, in one read, and what that leaves one after the other.
void fill(int fd, std::span<Piece* const> pieces) {
    iovec parts[kMostJoined];
    for (size_t i = 0; i < pieces.size(); ++i) parts[i] = {pieces[i]->buffer.data(), pieces[i]->buffer.size()};
    const ssize_t moved =
        pieces.size() > 1 ? ::preadv(fd, parts, static_cast<int>(pieces.size()), static_cast<off_t>(pieces[0]->offset)) : 0;
    const u64 there = pieces[0]->offset + static_cast<u64>(std::max<ssize_t>(moved, 0));
    for (Piece* piece : pieces) {
        if (piece->end() <= there) continue;
        const auto [done, error] = read_at(fd, piece->buffer.data(), piece->buffer.size(), piece->offset);
        piece->error = error || done == piece->buffer.size() ? error : ENODATA;
    }
}

// Fills pieces that lie near one another by way of a buffer on pages: all that there is from the first to the last.
void fill_bounced(int fd, std::span<Piece* const> pieces) {
    const u64 start = pieces.front()->offset / kDirect * kDirect;
    u64 end = 0;
    for (const Piece* piece : pieces) end = std::max(end, piece->end());
    const u64 size = align_up(end - start, kDirect);
    const std::unique_ptr<u8, decltype(&std::free)> bounce(static_cast<u8*>(std::aligned_alloc(kDirect, size)), &std::free);
    const auto [done, error] = bounce ? read_at(fd, bounce.get(), size, start) : std::pair<u64, int>{0, ENOMEM};
    for (Piece* piece : pieces) {
        if (piece->end() <= start + done)
            copy_bytes(piece->buffer.data(), bounce.get() + (piece->offset - start), piece->buffer.size());
        else
            piece->error = error ? error : ENODATA;
    }
}

// How many pieces from the first on are read at once.
size_t joined(std::span<Piece* const> pieces, bool bounced) {
    size_t count = 1;
    u64 end = pieces[0]->end();
    for (; count < pieces.size() && count < kMostJoined; ++count) {
        const Piece& next = *pieces[count];
        if (!bounced && (next.offset != end)) break;
        if (bounced && (next.offset > end + kGap || std::max(end, next.end()) - pieces[0]->offset > kMostBounced)) break;
        end = std::max(end, next.end());
    }
    return count;
}

nb::list read_pieces(int fd, nb::handle pieces) {
    std::vector<std::unique_ptr<Piece>> wanted;
    std::vector<Piece*> sorted;
    for (nb::handle piece : nb::iter(pieces)) {
        const nb::tuple fields = nb::cast<nb::tuple>(piece);
        wanted.push_back(std::make_unique<Piece>(nb::cast<u64>(fields[0]), nb::handle(fields[1])));
        sorted.push_back(wanted.back().get());
    }
    {
        const nb::gil_scoped_release free;
        std::sort(sorted.begin(), sorted.end(), [](const Piece* a, const Piece* b) { return a->offset < b->offset; });
        // Pieces that O_DIRECT takes as they are, and those that it doesn't, are joined with their likes.
        const bool direct = ::fcntl(fd, F_GETFL) & O_DIRECT;
        const auto others = std::stable_partition(sorted.begin(), sorted.end(), [&](const Piece* piece) { return !direct || piece->aligned(); });
        for (const bool bounced : {false, true}) {
            std::span<Piece* const> left(bounced ? others : sorted.begin(), bounced ? sorted.end() : others);
            while (!left.empty()) {
                const size_t count = joined(left, bounced);
                (bounced ? fill_bounced : fill)(fd, left.first(count));
                left = left.subspan(count);
            }
        }
    }
    nb::list errors;
    for (const auto& piece : wanted) errors.append(piece->error);
    return errors;
}

// Adds up what lies in an open directory; returns an errno.
int add_up(DIR* directory, u64& total) {
    struct stat found;
    if (::fstat(::dirfd(directory), &found) != 0) return errno;
    total = static_cast<u64>(found.st_blocks) * 512;
    for (;;) {
        errno = 0;
        const dirent* const entry = ::readdir(directory);
        if (!entry) return errno;
        const std::string_view name = entry->d_name;
        if (name == "." || name == "..") continue;
        if (::fstatat(::dirfd(directory), entry->d_name, &found, AT_SYMLINK_NOFOLLOW) == 0)
            total += std::max(align_up(static_cast<u64>(found.st_size), kPage), static_cast<u64>(found.st_blocks) * 512);
        else if (errno != ENOENT)
            return errno;
    }
}

u64 directory_bytes(nb::bytes path) {
    const std::string name(path.c_str(), path.size());
    u64 total = 0;
    int error = 0;
    {
        const nb::gil_scoped_release free;
        DIR* const directory = ::opendir(name.c_str());
        error = directory ? add_up(directory, total) : errno;
        if (directory) ::closedir(directory);
    }
    if (!error) return total;
    errno = error;
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, name.c_str());
    throw nb::python_error();
}

}  // namespace

void kvstrata::bind_io(nb::module_& m) {
    m.def("directory_bytes", &directory_bytes, nb::arg("path"),
          "Return how many bytes a directory and what is in it take, as du counts; of a file that is longer its length, in whole\n"
          "pages. `path` is in bytes. Raises OSError.");
    m.def("read_pieces", &read_pieces, nb::arg("fd"), nb::arg("pieces"),
          "Fill buffers from a file, by their offsets: `pieces` are (offset, buffer), and those that lie next to one another are\n"
          "read together. Where the file is open with O_DIRECT, pieces that don't lie on pages, there or here, are read by way of\n"
          "another buffer. Returns an errno for each, 0 where all went well, ENODATA where the file ends before the piece does.");
}
