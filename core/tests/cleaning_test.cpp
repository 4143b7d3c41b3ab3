// What is still wanted of a segment below, and where it has been moved.
#include <algorithm>

#include "check.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {
// A store whose records "0", "1", ... lie in segment 1, one unit apart.
struct Filled {
    std::shared_ptr<Store> store = Store::open_private({4 << 20, 64 << 20});
    Space space = store->open_namespace(0, "default", 1, {});
    explicit Filled(int count, u64 expires = 0) {
        store->assume_exclusive();
        for (int i = 0; i < count; ++i) put(*store, space, std::to_string(i), "value", expires);
        u64 offset = kPage;
        for (auto& dirty : store->take_dirty(1000, 1 << 20, 0)) store->settle(dirty, 1, offset += kUnit);
    }
    SegmentUse use(u32 segment) {
        for (const auto& found : store->segments_in_use())
            if (found.segment == segment) return found;
        return {};
    }
    KeptRow row(const std::string& key) {
        for (auto& found : store->rows_of(1, false))
            if (std::equal(found.key.begin(), found.key.end(), key.begin(), key.end())) return found;
        return {};
    }
};
}  // namespace

TEST(what_counts_of_a_segment_is_what_was_not_removed_overwritten_or_cleared) {
    Filled filled(10);
    const u64 each = filled.use(1).bytes / 10;
    CHECK(filled.use(1).records == 10 && each == 128 && filled.use(1).last_expiry == ~u64{0});
    filled.store->remove(filled.space, bytes_of("0"));
    put(*filled.store, filled.space, "1", "another");
    CHECK(filled.use(1).records == 8 && filled.use(1).bytes == 8 * each);
    filled.store->clear(filled.space);
    CHECK(filled.use(1).records == 0 && filled.store->rows_of(1, false).empty());
}

TEST(what_has_expired_does_not_count) {
    Filled filled(3, 1);  // in 1970
    CHECK(filled.use(1).records == 0);
    Filled later(3, u64{1} << 60);
    CHECK(later.use(1).records == 3 && later.use(1).last_expiry == u64{1} << 60);
}

TEST(used_is_what_somebody_got_since_it_was_written) {
    Filled filled(4);
    CHECK(filled.store->rows_of(1, true).empty());
    CHECK(get(*filled.store, filled.space, "2") == "value");
    const auto used = filled.store->rows_of(1, true);
    CHECK(used.size() == 1 && used[0].key == std::vector<u8>{'2'});
    CHECK(filled.use(1).used_bytes == used[0].length);
}

TEST(a_moved_record_is_found_in_its_new_place_and_has_to_be_used_again) {
    Filled filled(4);
    get(*filled.store, filled.space, "2");
    CHECK(filled.store->move_on_disk(filled.row("2"), 1, 7, 8192));
    CHECK(filled.use(1).records == 3 && filled.use(7).records == 1 && filled.use(7).used_bytes == 0);
    filled.store->demote_all();
    const auto found = filled.store->locate(filled.space, bytes_of("2"));
    CHECK(found && found->segment == 7 && found->offset == 8192);
}

TEST(what_was_overwritten_or_removed_meanwhile_is_not_moved) {
    Filled filled(4);
    const KeptRow overwritten = filled.row("0"), removed = filled.row("1"), moved = filled.row("2");
    put(*filled.store, filled.space, "0", "new");
    filled.store->remove(filled.space, bytes_of("1"));
    CHECK(!filled.store->move_on_disk(overwritten, 1, 7, 8192));
    CHECK(!filled.store->move_on_disk(removed, 1, 7, 8192));
    CHECK(filled.store->move_on_disk(moved, 1, 7, 8192));
    CHECK(!filled.store->move_on_disk(moved, 1, 8, 8192));
    CHECK(get(*filled.store, filled.space, "0") == "new");
}
