// Copying bytes: the same bytes wherever source and target lie, and none beside them.
#include "base/copying.hpp"

#include <algorithm>
#include <vector>

#include "check.hpp"

using namespace kvstrata;

TEST(what_is_copied_is_the_same_however_source_and_target_lie_in_their_pages) {
    constexpr size_t kRoom = 3 * 4096;
    std::vector<u8> from(kRoom), to(kRoom);
    for (size_t i = 0; i < kRoom; ++i) from[i] = static_cast<u8>(i * 131 + i / 256);
    for (const size_t n : {0, 1, 1023, 1024, 1025, 2047, 2048, 4096, 4097, 5000}) {
        for (const size_t start : {0, 5, 64}) {
            for (size_t apart = 0; apart < 80; ++apart) {  // wherever the vectors themselves lie
                std::vector<u8> expected(kRoom, 0xa5);
                std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(start), n, expected.begin() + static_cast<std::ptrdiff_t>(start + apart));
                const auto check = [&](const auto& copy) {
                    std::fill(to.begin(), to.end(), u8{0xa5});
                    copy(to.data() + start + apart, from.data() + start);
                    CHECK(to == expected);
                };
                check([&](u8* target, const u8* source) { copy_bytes(target, source, n); });
                for (const StreamMethod& method : stream_methods())
                    check([&](u8* target, const u8* source) {
                        stream_bytes(target, source, n, 4096, method);
                        end_of_stream();
                    });
            }
        }
    }
}

TEST(long_copies_that_lie_badly_are_the_same_too) {
    constexpr size_t kLongest = 600 << 10;
    std::vector<u8> from(kLongest + 4096), to(kLongest + 8192);
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<u8>(i * 2654435761U >> 13);
    // So that the target lies 16 bytes behind the source within a page.
    const size_t offset = (16 + reinterpret_cast<uintptr_t>(from.data()) - reinterpret_cast<uintptr_t>(to.data())) % 4096;
    for (const size_t n : {size_t{100'001}, size_t{512 << 10} - 1, size_t{512 << 10}, kLongest}) {
        std::fill(to.begin(), to.end(), u8{0xa5});
        copy_bytes(to.data() + offset, from.data(), n);
        CHECK(std::equal(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(n), to.begin() + static_cast<std::ptrdiff_t>(offset)));
        CHECK(std::all_of(to.begin() + static_cast<std::ptrdiff_t>(offset + n), to.end(), [](u8 byte) { return byte == 0xa5; }));
    }
}
