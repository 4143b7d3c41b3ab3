// The policies by name and number. Numbers lie in mappings: add at the end only.
#include <cstring>
#include <iterator>

#include "lru.hpp"

namespace kvstrata {
namespace {
const Lru lru;
const Policy* const kPolicies[] = {&lru};
}  // namespace

u32 policy_count() { return static_cast<u32>(std::size(kPolicies)); }

u32 policy_number(const char* name) {
    for (u32 number = 0; number < policy_count(); ++number)
        if (std::strcmp(kPolicies[number]->name(), name) == 0) return number;
    return kUnknownPolicy;
}

const Policy& policy_by_number(u32 number) { return *kPolicies[number]; }

}  // namespace kvstrata
