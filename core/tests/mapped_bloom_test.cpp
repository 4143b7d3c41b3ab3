// The Bloom filter of engines: what it finds, and that one that is begun anew denies nothing to those who look meanwhile.
#include "base/mapped_bloom.hpp"

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {

constexpr u64 kSecret[2] = {1, 2};

struct Filter {
    u64 bytes;
    std::unique_ptr<u64[]> memory;
    MappedBloom bloom;
    Filter(u64 capacity, double fp_rate)
        : bytes(MappedBloom::bytes_for(capacity, fp_rate)), memory(new u64[bytes / 8]()), bloom(memory.get(), bytes) {}
};

}  // namespace

TEST(a_mapped_filter_finds_all_and_takes_as_many_others_for_its_own_as_theory_says) {
    Filter filter(20000, 0.01);
    const u64 phase = filter.bloom.begin(20000, 0.01, kSecret);
    for (int i = 0; i < 20000; ++i) filter.bloom.add("name" + std::to_string(i));
    CHECK(!filter.bloom.lacks("other"));  // not complete
    CHECK(filter.bloom.complete(phase));
    int denied = 0, taken = 0;
    for (int i = 0; i < 20000; ++i) denied += filter.bloom.lacks("name" + std::to_string(i));
    for (int i = 0; i < 100000; ++i) taken += !filter.bloom.lacks("other" + std::to_string(i));
    CHECK(denied == 0);
    CHECK(taken > 800 && taken < 1200);  // 1000, +- 6 standard deviations
    CHECK(filter.bloom.count() > 19800 && filter.bloom.count() <= 20000);
}

TEST(a_mapped_filter_denies_nothing_unless_it_is_complete_and_sound) {
    Filter filter(1000, 0.01);
    CHECK(!filter.bloom.lacks("a") && !filter.bloom.is_complete());  // nobody began it
    const u64 first = filter.bloom.begin(100, 0.01, kSecret);
    CHECK(!filter.bloom.lacks("a") && !filter.bloom.is_complete());
    const u64 second = filter.bloom.begin(1000, 0.01, kSecret);  // the first one died
    CHECK(!filter.bloom.complete(first) && !filter.bloom.is_complete());
    CHECK(filter.bloom.complete(second) && filter.bloom.is_complete() && filter.bloom.lacks("a"));
    MappedBloom again(filter.memory.get(), filter.bytes);  // as another process has it
    CHECK(again.lacks("a"));
    again.add("a");
    CHECK(!filter.bloom.lacks("a"));
    for (u64 at = 0; at < 4; ++at) {  // magic, phase, bits, hashes
        if (at == 1) continue;
        const u64 kept = filter.memory[at];
        filter.memory[at] = ~u64{0};
        CHECK(!filter.bloom.lacks("b") && !filter.bloom.is_complete());
        filter.memory[at] = kept;
    }
    CHECK_THROWS(InvalidValue, filter.bloom.begin(100000, 0.01, kSecret));
    CHECK_THROWS(InvalidValue, MappedBloom{filter.memory.get(), 64});
}

TEST(nothing_is_denied_while_a_mapped_filter_is_begun_anew_again_and_again) {
    Filter filter(4000, 0.01);
    filter.bloom.complete(filter.bloom.begin(1000, 0.01, kSecret));
    std::vector<std::string> names;
    for (int i = 0; i < 500; ++i) names.push_back("name" + std::to_string(i));
    for (const std::string& name : names) filter.bloom.add(name);
    std::atomic<bool> stop{false};
    std::atomic<int> denied{0}, spared{0};
    std::vector<std::thread> readers;
    for (int n = 0; n < 2; ++n)
        readers.emplace_back([&] {
            while (!stop.load())
                for (const std::string& name : names) {
                    denied += filter.bloom.lacks(name);
                    spared += filter.bloom.lacks("other");
                }
        });
    for (u64 turn = 0; turn < 300 || !spared; ++turn) {
        const u64 secret[2] = {turn, ~turn};
        const u64 phase = filter.bloom.begin(turn % 2 ? 1000 : 4000, 0.01, secret);
        for (const std::string& name : names) filter.bloom.add(name);
        CHECK(filter.bloom.complete(phase));
    }
    stop = true;
    for (std::thread& reader : readers) reader.join();
    CHECK(denied == 0);
    CHECK(spared > 0);
}
