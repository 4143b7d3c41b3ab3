// What a file has to be before its memory is used: its name can be foreseen, and its directory may be everybody's.
#include <sys/stat.h>
#include <unistd.h>

#include "check.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {

// A file of a cache that is ready, and open.
struct Shared {
    std::string file = "/tmp/kvstrata-region-test-" + std::to_string(getpid());
    std::shared_ptr<Store> store = Store::create_shared(file, {1 << 20, 0});
    Shared() { store->mark_ready(); }
    ~Shared() { unlink(file.c_str()); }
};

// Changes what the header of the file says.
template <class Change>
void change(const std::string& file, Change&& how) {
    FILE* const opened = std::fopen(file.c_str(), "r+");
    alignas(Header) unsigned char bytes[sizeof(Header)];
    CHECK(opened && std::fread(bytes, sizeof bytes, 1, opened) == 1);
    how(reinterpret_cast<Header&>(bytes));
    std::rewind(opened);
    CHECK(std::fwrite(bytes, sizeof bytes, 1, opened) == 1 && std::fclose(opened) == 0);
}

}  // namespace

TEST(a_file_of_this_user_alone_is_attached) {
    const Shared shared;
    CHECK(Region::probe(shared.file).ready);
    CHECK(Store::attach_shared(shared.file)->stats().clients == 2);
    CHECK(!Region::probe(shared.file + "-absent").exists);
    CHECK_THROWS(OsError, Store::attach_shared(shared.file + "-absent"));
}

TEST(a_file_that_others_may_write_to_is_refused_by_its_name) {
    const Shared shared;
    for (const mode_t mode : {0666, 0620, 0602}) {
        CHECK(chmod(shared.file.c_str(), mode) == 0);
        CHECK_THROWS(ConfigError, Region::probe(shared.file));
        try {
            Store::attach_shared(shared.file);
            CHECK(!"attached");
        } catch (const ConfigError& refused) {
            CHECK(std::string(refused.what()).find(shared.file) == 0);
        }
    }
}

TEST(a_file_of_another_user_is_refused) {
    if (geteuid() != 0) return;  // only root can give one away
    const Shared shared;
    CHECK(chown(shared.file.c_str(), 12345, 12345) == 0);
    CHECK_THROWS(ConfigError, Region::probe(shared.file));
    CHECK_THROWS(ConfigError, Store::attach_shared(shared.file));
}

TEST(what_is_no_plain_file_is_refused) {
    const std::string pipe = "/tmp/kvstrata-region-test-pipe-" + std::to_string(getpid());
    CHECK(mkfifo(pipe.c_str(), 0600) == 0);
    CHECK_THROWS(ConfigError, Region::probe(pipe));
    unlink(pipe.c_str());
}

TEST(a_file_is_refused_that_is_not_as_long_as_it_says) {
    const Shared shared;
    struct stat status{};
    CHECK(stat(shared.file.c_str(), &status) == 0 && truncate(shared.file.c_str(), status.st_size + 4096) == 0);
    CHECK_THROWS(FormatError, Store::attach_shared(shared.file));
}

TEST(a_file_is_refused_in_which_anything_lies_elsewhere) {
    for (u64 Header::* const offset : {&Header::clients_at, &Header::namespaces_at, &Header::pages_at, &Header::data_at}) {
        const Shared shared;
        change(shared.file, [&](Header& header) { header.*offset += kPage; });
        CHECK_THROWS(FormatError, Store::attach_shared(shared.file));
        change(shared.file, [&](Header& header) { header.*offset -= kPage; });  // it is open here
    }
}
