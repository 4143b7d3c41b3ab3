// The timing wheel against a list of all times.
#include "memory/timers.hpp"

#include <map>
#include <memory>
#include <random>
#include <vector>

#include "check.hpp"

using namespace kvstrata;

namespace {

constexpr u32 kTimers = 400;

struct Wheel {
    std::unique_ptr<Timers> timers = std::make_unique<Timers>();
    std::vector<TimerLinks> links = std::vector<TimerLinks>(kTimers);
    std::vector<u64> expires = std::vector<u64>(kTimers);

    explicit Wheel(u64 now_ms) { timers->now = now_ms / Timers::kTickMs; }
    auto link() {
        return [this](u32 number) -> TimerLinks& { return links[number]; };
    }
    void add(u32 number, u64 when) {
        expires[number] = when;
        timers->add(number, when, link());
    }
    void remove(u32 number) { timers->remove(number, link()); }
    std::vector<u32> due(u64 now_ms) {
        timers->advance(now_ms, link(), [this](u32 number) { return expires[number]; });
        std::vector<u32> found;
        for (u32 at = timers->first_due(); at; at = links[at].next) found.push_back(at);
        return found;
    }
};

// Spreads over all levels of the wheel, and beyond the last.
u64 a_while(std::mt19937_64& random) { return random() % (u64{1} << random() % 45) + 1; }

}  // namespace

TEST(what_has_run_out_is_due_and_nothing_else) {
    for (u32 seed = 0; seed < 60; ++seed) {
        std::mt19937_64 random(seed);
        u64 now = 1'700'000'000'000 + a_while(random);
        Wheel wheel(now);
        std::map<u32, u64> model;
        for (u32 step = 0; step < 3000; ++step) {
            const u32 number = 1 + static_cast<u32>(random() % (kTimers - 1));
            switch (random() % 4) {
                case 0:
                case 1:
                    if (model.contains(number)) break;
                    model[number] = now + a_while(random);
                    wheel.add(number, model[number]);
                    break;
                case 2:
                    if (!model.erase(number)) break;
                    wheel.remove(number);
                    break;
                default: {
                    now += a_while(random) >> random() % 20;
                    for (const u32 at : wheel.due(now)) {
                        CHECK(model.contains(at) && model[at] <= now);
                        model.erase(at);
                        wheel.remove(at);
                    }
                    for (const auto& [at, when] : model) CHECK(when + Timers::kTickMs > now);
                }
            }
        }
        for (const auto& [at, when] : model) wheel.remove(at);
        for (const u64 level : wheel.timers->occupied) CHECK(level == 0);
        for (const u32 head : wheel.timers->heads) CHECK(head == 0);
    }
}

TEST(a_timer_beyond_the_last_level_comes_round_until_its_time) {
    constexpr u64 kCentury = u64{100} * 365 * 24 * 3600 * 1000;
    u64 now = 1'700'000'000'000;
    Wheel wheel(now);
    wheel.add(1, now + 3 * kCentury);
    for (int i = 0; i < 300; ++i) {
        now += kCentury / 100;
        CHECK(wheel.due(now).empty());
    }
    CHECK(wheel.due(now + 2 * Timers::kTickMs) == std::vector<u32>{1});
}

TEST(a_clock_that_is_set_back_makes_nothing_due) {
    Wheel wheel(1'700'000'000'000);
    wheel.add(1, 1'700'000'100'000);
    CHECK(wheel.due(1'600'000'000'000).empty());
    CHECK(wheel.due(1'700'000'099'000).empty());
    CHECK(wheel.due(1'700'000'100'064).size() == 1);
}

