// What is learned about when records are used again: for each class of them and each octave of age, how many were used again
// per access that they spent at that age. From that, how much a record is worth keeping.
//
// Ages are counted in accesses since the last use. Exposure is sampled: whoever sweeps over the history counts what he
// sees, so records that are never used again weigh in from the start, and it doesn't matter when they are forgotten.
#pragma once

#include <algorithm>
#include <cmath>

#include "policy.hpp"

namespace kvstrata {

class Reuse {
public:
    static constexpr u32 kClasses = 11;

    void used_again(u32 record_class, u32 age) { ++new_uses_[record_class][octave(age)]; }
    void seen(u32 record_class, u32 age) { ++new_sightings_[record_class][octave(age)]; }

    // The Gittins index (Gittins: "Bandit Processes and Dynamic Allocation Indices", 1979) of keeping a record of that class
    // and age: the most uses per access that it may be kept for, over all times at which to give it up.
    float worth(u32 record_class, u32 age) const { return worth_[record_class][octave(age)]; }

    // Takes in what was counted since the last time. Each sighting stands for `interval` accesses. What was known before
    // counts `memory` as much as it did. `in_prefixes`: records are blocks of prefixes.
    void learn(float interval, float memory, bool in_prefixes) {
        for (u32 c = 0; c < kClasses; ++c) {
            for (u32 o = 0; o < kOctaves; ++o) {
                uses_[c][o] = uses_[c][o] * memory + static_cast<float>(new_uses_[c][o]);
                exposure_[c][o] = exposure_[c][o] * memory + static_cast<float>(new_sightings_[c][o]) * interval;
                new_uses_[c][o] = new_sightings_[c][o] = 0;
            }
        }
        judge();
        if (in_prefixes) close();
    }

    void reset() {
        *this = {};
        judge();
    }

private:
    // Ages up to 15 are one; an octave each from there on.
    static constexpr u32 kOctaves = 29;
    static u32 octave(u32 age) { return static_cast<u32>(std::bit_width(age >> 4)); }
    static float length(u32 octave) { return static_cast<float>(octave ? 8u << octave : 16u); }

    // Before anything is known, the rate at which records are used falls with their age: LRU. The chance of a use in an
    // octave is taken for 1/64, with the weight of 4 uses seen; and for a class it is taken for that of all classes
    // together, with the weight of 8.
    static constexpr float kChance = 1.0f / 64, kPrior = 4, kClassPrior = 8;

    void judge() {
        float all_uses[kOctaves] = {}, all_exposure[kOctaves] = {};
        for (u32 c = 0; c < kClasses; ++c)
            for (u32 o = 0; o < kOctaves; ++o) all_uses[o] += uses_[c][o], all_exposure[o] += exposure_[c][o];
        for (u32 c = 0; c < kClasses; ++c) {
            struct Stretch {
                float uses, time;  // expected of a record that gets as far as the start of it
            };
            Stretch stretches[kOctaves];
            float left = 1;  // of the records that began, those that get as far as this octave unused
            for (u32 o = 0; o < kOctaves; ++o) {
                const float of_any = (all_uses[o] + kPrior) / (all_exposure[o] + kPrior * length(o) / kChance);
                const float rate = (uses_[c][o] + kClassPrior) / (exposure_[c][o] + kClassPrior / of_any);
                const float used = left * -std::expm1(-rate * length(o));
                stretches[o] = {used, used / rate};
                left = std::max(left - used, 1e-9f);
            }
            // From old to young: as long as what follows is worth more per access than what is at hand, one has to get
            // through the one to reach the other.
            Stretch ahead[kOctaves];
            u32 count = 0;
            for (u32 o = kOctaves; o-- > 0;) {
                Stretch here = stretches[o];
                for (; count && ahead[count - 1].uses * here.time > here.uses * ahead[count - 1].time; --count) {
                    here.uses += ahead[count - 1].uses;
                    here.time += ahead[count - 1].time;
                }
                ahead[count++] = here;
                worth_[c][o] = here.uses / here.time;
            }
        }
    }

    // A block is worth at least as much as what follows it in its prefix, which is nothing without it. What follows has the
    // same age if it came in the same run, and its class is lower: the last of what is new, then what is new, then
    // what was known, the less often used the later.
    void close() {
        for (u32 o = 0; o < kOctaves; ++o) {
            worth_[2][o] = std::max(worth_[2][o], worth_[0][o]);
            for (const u32 c : {3u, 4u}) worth_[c][o] = std::max(worth_[c][o], worth_[c == 3 ? 1 : 3][o]);
            for (u32 c = 5; c < kClasses; ++c) worth_[c][o] = std::max(worth_[c][o], worth_[c - 1][o]);
        }
    }

    float uses_[kClasses][kOctaves], exposure_[kClasses][kOctaves], worth_[kClasses][kOctaves];
    u32 new_uses_[kClasses][kOctaves], new_sightings_[kClasses][kOctaves];
};

}  // namespace kvstrata
