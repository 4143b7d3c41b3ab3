// Reading many pieces of a file in one call: for small ones, what Python does around a read costs as much as the read.
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "bindings.hpp"

using namespace kvstrata;

namespace {

constexpr size_t kMostJoined = 64;  // pieces that are read in one call

// The last errno of filling `size` bytes from `offset` on; ENODATA where the file ends before.
int fill(int fd, u8* to, size_t size, u64 offset) {
    while (size) {
        const ssize_t moved = ::pread(fd, to, size, static_cast<off_t>(offset));
        if (moved < 0) {
            if (errno == EINTR) continue;
            return errno;
        }
        if (moved == 0) return ENODATA;
        to += moved, size -= static_cast<size_t>(moved), offset += static_cast<u64>(moved);
    }
    return 0;
}

struct Piece {
    u64 offset;
    Buffer buffer;
    int error = 0;
    Piece(u64 at, nb::handle object) : offset(at), buffer(object, true) {}
};

// Fills pieces, of which each begins where the one before ends, in one read, and what that leaves one after the other.
void fill_all(int fd, std::span<Piece* const> pieces) {
    iovec parts[kMostJoined];
    for (size_t i = 0; i < pieces.size(); ++i) parts[i] = {pieces[i]->buffer.data(), pieces[i]->buffer.size()};
    const ssize_t moved =
        pieces.size() > 1 ? ::preadv(fd, parts, static_cast<int>(pieces.size()), static_cast<off_t>(pieces[0]->offset)) : 0;
    u64 there = pieces[0]->offset + static_cast<u64>(std::max<ssize_t>(moved, 0));
    for (Piece* piece : pieces)
        if (piece->offset + piece->buffer.size() > there) piece->error = fill(fd, piece->buffer.data(), piece->buffer.size(), piece->offset);
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
        for (size_t first = 0, next = 1; first < sorted.size(); first = next++) {
            while (next < sorted.size() && next - first < kMostJoined &&
                   sorted[next - 1]->offset + sorted[next - 1]->buffer.size() == sorted[next]->offset)
                ++next;
            fill_all(fd, std::span(sorted).subspan(first, next - first));
        }
    }
    nb::list errors;
    for (const auto& piece : wanted) errors.append(piece->error);
    return errors;
}

}  // namespace

void kvstrata::bind_io(nb::module_& m) {
    m.def("read_pieces", &read_pieces, nb::arg("fd"), nb::arg("pieces"),
          "Fill buffers from a file, by their offsets: `pieces` are (offset, buffer), and those that lie next to one another are\n"
          "read together. Returns an errno for each, 0 where all went well, ENODATA where the file ends before the piece does.");
}
