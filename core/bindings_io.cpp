// Reading many pieces of a file in one call: for small ones, what Python does around a read costs as much as the read.
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "bindings.hpp"

using namespace kvstrata;

namespace {

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

nb::list read_pieces(int fd, nb::handle pieces) {
    struct Piece {
        u64 offset;
        Buffer buffer;
        int error = 0;
        Piece(u64 at, nb::handle object) : offset(at), buffer(object, true) {}
    };
    std::vector<std::unique_ptr<Piece>> wanted;
    for (nb::handle piece : nb::iter(pieces)) {
        const nb::tuple fields = nb::cast<nb::tuple>(piece);
        wanted.push_back(std::make_unique<Piece>(nb::cast<u64>(fields[0]), nb::handle(fields[1])));
    }
    {
        const nb::gil_scoped_release free;
        for (auto& piece : wanted) piece->error = fill(fd, piece->buffer.data(), piece->buffer.size(), piece->offset);
    }
    nb::list errors;
    for (const auto& piece : wanted) errors.append(piece->error);
    return errors;
}

}  // namespace

void kvstrata::bind_io(nb::module_& m) {
    m.def("read_pieces", &read_pieces, nb::arg("fd"), nb::arg("pieces"),
          "Fill buffers from a file, one after the other: `pieces` are (offset, buffer). Returns an errno for each, 0\n"
          "where all went well, ENODATA where the file ends before the piece does.");
}
