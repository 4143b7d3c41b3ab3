// Each policy by itself, over plain records: who is in the order, who is named, and what spared records and other scratch
// memory change of that.
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "policy/policy.hpp"

using namespace kvstrata;

namespace {

constexpr u32 kRecords = 300;

class Owner {
public:
    explicit Owner(const Policy& policy) : policy_(policy), records_(kRecords + 1) {
        for (u32 at = 1; at <= kRecords; ++at) {
            records_[at].hash = at * 2654435761u;
            records_[at].units = 1 + at % 7;
        }
        state_.capacity = 400;
        scratch_bytes_ = policy.scratch_for(state_, 64);
        scratch_ = room(scratch_memory_, scratch_bytes_);
        policy_.reset(order());
    }

    Order order() { return {{records_.data(), sizeof(PolicyRecord)}, state_, scratch_, scratch_bytes_}; }

    void insert(u32 at, u32 depth = 0) {
        records_[at].node = PolicyNode::fresh(++tick_, 1.0f + static_cast<float>(at % 3));
        policy_.insert(order(), at, depth);
        inside.insert(at);
    }
    void hit(u32 at) {
        records_[at].node.stamp = ++tick_;
        policy_.hit(order(), at);
    }
    void remove(u32 at, bool evicted) {
        policy_.remove(order(), at, evicted);
        inside.erase(at);
    }
    u32 victim() { return policy_.victim(order()); }
    void spare(u32 at) { policy_.spare(order(), at); }

    void move(u32 records) {
        const u64 bytes = policy_.scratch_for(state_, records);
        std::vector<u8> memory;
        u8* const scratch = room(memory, bytes);
        policy_.move(order(), scratch, bytes);
        scratch_memory_ = std::move(memory);
        scratch_ = scratch;
        scratch_bytes_ = bytes;
    }
    void rebuild() {
        policy_.reset(order());
        for (const u32 at : inside) policy_.insert(order(), at, Policy::kSameDepth);
    }

    bool counts_are_right() {
        u64 units = 0;
        for (const u32 at : inside) units += records_[at].units;
        return state_.count == inside.size() && state_.units == units;
    }
    // Everyone leaves, each once.
    bool drains() {
        while (!inside.empty()) {
            const u32 at = victim();
            if (!inside.count(at)) return false;
            remove(at, true);
        }
        return victim() == 0 && counts_are_right();
    }

    std::set<u32> inside;

private:
    static u8* room(std::vector<u8>& memory, u64 bytes) {
        memory.assign(bytes + kUnit, 0xa5);  // scratch memory may hold anything
        return reinterpret_cast<u8*>(align_up(reinterpret_cast<u64>(memory.data()), kUnit));
    }

    const Policy& policy_;
    std::vector<PolicyRecord> records_;
    PolicyState state_{};
    std::vector<u8> scratch_memory_;
    u8* scratch_ = nullptr;
    u64 scratch_bytes_ = 0;
    u32 tick_ = 0;
};

// Calls `check` with each policy's owner, and tells which policy a failed check was about.
template <class Check>
void with_each_policy(Check&& check) {
    for (u32 number = 0; number < policy_count(); ++number) {
        const int before = kvstrata::testing::failures;
        Owner owner(policy_by_number(number));
        check(owner);
        if (kvstrata::testing::failures != before) std::fprintf(stderr, "  under %s\n", policy_by_number(number).name());
    }
}

void fill(Owner& owner, u32 first, u32 last) {
    for (u32 at = first; at <= last; ++at) {
        owner.insert(at, at % 20);
        if (at % 3 == 0) owner.hit(at);
    }
}

}  // namespace

TEST(names_and_numbers_belong_together) {
    for (u32 number = 0; number < policy_count(); ++number) CHECK(policy_number(policy_by_number(number).name()) == number);
    CHECK(policy_number("no such policy") == kUnknownPolicy);
}

TEST(an_empty_order_names_no_victim) {
    with_each_policy([](Owner& owner) { CHECK(owner.victim() == 0); });
}

TEST(everything_leaves_once) {
    with_each_policy([](Owner& owner) {
        fill(owner, 1, kRecords);
        CHECK(owner.counts_are_right());
        CHECK(owner.drains());
    });
}

TEST(naming_a_victim_changes_nothing_that_a_second_call_would_see) {
    with_each_policy([](Owner& owner) {
        fill(owner, 1, 100);
        while (!owner.inside.empty()) {
            const u32 named = owner.victim();
            if (!CHECK(owner.victim() == named)) return;
            owner.remove(named, true);
        }
    });
}

TEST(a_spared_record_is_not_named_while_there_are_others) {
    with_each_policy([](Owner& owner) {
        fill(owner, 1, 100);
        std::set<u32> spared;
        for (int i = 0; i < 50; ++i) {
            const u32 named = owner.victim();
            if (!CHECK(owner.inside.count(named) && !spared.count(named))) return;
            owner.spare(named);
            spared.insert(named);
        }
        CHECK(owner.counts_are_right());
    });
}

TEST(spared_records_come_back_when_nothing_else_is_left) {
    with_each_policy([](Owner& owner) {
        fill(owner, 1, 30);
        for (int i = 0; i < 30; ++i) owner.spare(owner.victim());
        CHECK(owner.inside.count(owner.victim()));
        CHECK(owner.drains());
    });
}

TEST(spared_records_can_be_hit_and_removed) {
    with_each_policy([](Owner& owner) {
        fill(owner, 1, 60);
        for (int i = 0; i < 20; ++i) {
            const u32 named = owner.victim();
            owner.spare(named);
            if (i % 2) owner.hit(named);
            if (i % 3 == 0) owner.remove(named, i % 2);
        }
        CHECK(owner.counts_are_right());
        CHECK(owner.drains());
    });
}

TEST(records_that_come_bring_spared_ones_back_to_be_named_again) {
    with_each_policy([](Owner& owner) {
        fill(owner, 1, 50);
        const u32 spared = owner.victim();
        owner.spare(spared);
        fill(owner, 51, 60);
        bool named = false;
        while (!owner.inside.empty() && !named) {
            const u32 at = owner.victim();
            named = at == spared;
            owner.remove(at, true);
        }
        CHECK(named);
        CHECK(owner.drains());
    });
}

// What is left of the first `count` records when all have been evicted that came later, in the order in which they leave.
std::vector<u32> leaving(Owner& owner, u32 count) {
    std::vector<u32> left;
    while (!owner.inside.empty()) {
        const u32 at = owner.victim();
        owner.remove(at, true);
        if (at <= count) left.push_back(at);
    }
    return left;
}

TEST(spared_records_come_back_to_their_places_where_age_decides) {
    for (const char* name : {"lru", "auto"}) {
        for (const u32 spared : {1u, 3u, 9u}) {
            std::vector<u32> orders[2];
            for (const bool sparing : {false, true}) {
                Owner owner(policy_by_number(policy_number(name)));
                for (u32 at = 1; at <= 20; ++at) owner.insert(at, 1 + (at - 1) % 5);  // four prefixes
                for (u32 i = 0; sparing && i < spared; ++i) owner.spare(owner.victim());
                for (u32 at = 21; at <= 40; ++at) owner.insert(at, 1 + (at - 1) % 5);
                orders[sparing] = leaving(owner, 20);
            }
            if (!CHECK(orders[0] == orders[1])) std::fprintf(stderr, "  %u spared under %s\n", spared, name);
        }
    }
}

TEST(a_prefix_that_comes_in_while_its_blocks_are_spared_still_leaves_from_its_tail) {
    Owner owner(policy_by_number(policy_number("auto")));
    for (u32 at = 1; at <= 4; ++at) {
        owner.insert(at, at);
        owner.spare(at);  // the writer still has it pinned
    }
    owner.insert(5, 5);
    owner.insert(6, 6);
    for (u32 at = 11; at <= 20; ++at) owner.insert(at, at - 10);
    CHECK(leaving(owner, 6) == (std::vector<u32>{6, 5, 4, 3, 2, 1}));
}

TEST(more_scratch_memory_loses_nobody) {
    with_each_policy([](Owner& owner) {
        fill(owner, 1, 60);
        owner.spare(owner.victim());
        owner.move(512);
        fill(owner, 61, kRecords);
        CHECK(owner.counts_are_right());
        CHECK(owner.drains());
    });
}

TEST(an_order_that_outgrows_its_scratch_memory_still_works) {
    with_each_policy([](Owner& owner) {
        for (u32 round = 0; round < 20; ++round) {
            fill(owner, 1, kRecords);
            if (!CHECK(owner.drains())) return;
        }
    });
}

TEST(an_order_is_built_again_from_its_records) {
    with_each_policy([](Owner& owner) {
        fill(owner, 1, 200);
        for (int i = 0; i < 10; ++i) owner.spare(owner.victim());
        owner.rebuild();
        CHECK(owner.counts_are_right());
        fill(owner, 201, kRecords);
        CHECK(owner.drains());
    });
}

TEST(any_sequence_of_calls_keeps_the_order_whole) {
    with_each_policy([](Owner& owner) {
        u32 random = 1;
        const auto next = [&](u32 below) {
            random = random * 1664525u + 1013904223u;
            return (random >> 8) % below;
        };
        for (int step = 0; step < 20'000; ++step) {
            const u32 at = 1 + next(kRecords);
            switch (next(8)) {
                case 0: case 1: case 2:
                    if (owner.inside.count(at)) owner.hit(at);
                    else owner.insert(at, next(40));
                    break;
                case 3: case 4:
                    if (owner.inside.count(at)) owner.hit(at);
                    break;
                case 5:
                    if (owner.inside.count(at)) owner.remove(at, next(2));
                    break;
                case 6:
                    if (const u32 named = owner.victim()) owner.remove(named, true);
                    break;
                default:
                    if (const u32 named = owner.victim()) owner.spare(named);
                    if (step % 501 == 0) owner.move(64 + static_cast<u32>(step) / 50);
                    if (step % 997 == 0) owner.rebuild();
            }
            if (!CHECK(owner.counts_are_right())) return;
        }
        CHECK(owner.drains());
    });
}
