// The memory at steady state: how much of it holds records under sizes from 256 B to 8 MiB, drawn log-uniformly, while
// each put makes others leave. Prints how long taking a block took, with what had to leave for it; that figure counts in
// a build without failpoints only. KVSTRATA_SOAK=1 makes it ten million operations.
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>

#include "check.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {

constexpr u64 kMemory = u64{512} << 20;
constexpr double kSmallest = 256, kLargest = 8 << 20;

// Durations, to two figures: a count for each.
class Durations {
public:
    void add(std::chrono::steady_clock::duration taken) {
        const double ns = std::max(1.0, static_cast<double>(std::chrono::nanoseconds(taken).count()));
        ++counts_[std::min<size_t>(std::size(counts_) - 1, static_cast<size_t>(std::log2(ns) * 16))];
        ++count_;
    }
    double percentile(double part) const {  // us
        u64 seen = 0;
        for (size_t i = 0; i < std::size(counts_); ++i)
            if (static_cast<double>(seen += counts_[i]) >= part * static_cast<double>(count_))
                return std::exp2((static_cast<double>(i) + 0.5) / 16) / 1000;
        return 0;
    }

private:
    u64 counts_[640] = {};
    u64 count_ = 0;
};

}  // namespace

TEST(at_least_95_percent_of_the_memory_hold_records_at_steady_state) {
    const bool soak = std::getenv("KVSTRATA_SOAK") != nullptr;
    const u64 operations = soak ? 10000000 : kDebug ? 3000 : 100000;
    auto store = Store::open_private({kMemory, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    std::mt19937_64 random(11);
    std::uniform_real_distribution<> size(std::log(kSmallest), std::log(kLargest));
    Durations durations;
    double least = 1, sum = 0;
    u64 samples = 0;
    for (u64 i = 0; i < operations; ++i) {
        const u64 number = random() % 200000;
        const Key key{reinterpret_cast<const u8*>(&number), sizeof number};
        const u64 bytes = static_cast<u64>(std::exp(size(random)));
        const auto start = std::chrono::steady_clock::now();
        auto reservation = store->reserve(space, key, bytes, {}, true);
        if (i > operations / 2) durations.add(std::chrono::steady_clock::now() - start);
        store->publish(*reservation);
        if (i > operations / 4 && i % (operations / 500) == 0) {  // full since long ago
            const double utilisation = store->stats().utilisation();
            least = std::min(least, utilisation);
            sum += utilisation;
            ++samples;
        }
    }
    const double mean = sum / static_cast<double>(samples);
    std::printf("utilisation: mean %.4f, least %.4f; to reserve took p50 %.2f us, p99 %.2f us, p99.9 %.2f us\n", mean,
                least, durations.percentile(0.5), durations.percentile(0.99), durations.percentile(0.999));
    CHECK(mean >= 0.95);
    CHECK(least >= 0.93);
    CHECK(store->stats().memory.faults == 0);
}
