// The policies by name and number. Numbers lie in mappings: add at the end only.
#include <cstring>
#include <iterator>

#include "auto.hpp"
#include "fifo.hpp"
#include "gdsf.hpp"
#include "lfu.hpp"
#include "lru.hpp"
#include "s3_fifo.hpp"
#include "sieve.hpp"
#include "slru.hpp"
#include "w_tinylfu.hpp"

namespace kvstrata {
namespace {
const Lru lru;
const Lfu lfu;
const Fifo fifo;
const Slru slru;
const WTinyLfu w_tinylfu;
const S3Fifo s3_fifo;
const Sieve sieve;
const Gdsf gdsf;
const Auto auto_policy;
const Policy* const kPolicies[] = {&lru, &lfu, &fifo, &slru, &w_tinylfu, &s3_fifo, &sieve, &gdsf, &auto_policy};
}  // namespace

u32 policy_count() { return static_cast<u32>(std::size(kPolicies)); }

u32 policy_number(const char* name) {
    for (u32 number = 0; number < policy_count(); ++number)
        if (std::strcmp(kPolicies[number]->name(), name) == 0) return number;
    return kUnknownPolicy;
}

const Policy& policy_by_number(u32 number) { return *kPolicies[number]; }

}  // namespace kvstrata
