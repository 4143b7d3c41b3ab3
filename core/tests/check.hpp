// The whole of the core's test framework: CHECK counts, TEST registers, main() reports.
//
//   #include "check.hpp"
//   TEST(an_empty_index_finds_nothing) { CHECK(index.find(key) == nullptr); }
//
// A file with tests is an executable of its own, and exits with 1 when any check failed.
#pragma once

#include <cstdio>
#include <exception>
#include <vector>

namespace kvstrata::testing {

struct Test {
    const char* name;
    void (*run)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline int failures = 0;

inline bool check(bool holds, const char* what, const char* file, int line) {
    if (!holds) {
        ++failures;
        std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", file, line, what);
    }
    return holds;
}

}  // namespace kvstrata::testing

// Counts a failure and goes on; usable as a condition: `if (!CHECK(p)) return;`. Call it from the main thread only.
#define CHECK(...) ::kvstrata::testing::check(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

// The statement must throw exactly this exception, or one derived from it.
#define CHECK_THROWS(exception, ...)                                                               \
    [&] {                                                                                          \
        try {                                                                                      \
            __VA_ARGS__;                                                                           \
        } catch (const exception&) {                                                               \
            return true;                                                                           \
        }                                                                                          \
        return ::kvstrata::testing::check(false, #__VA_ARGS__ " throws " #exception, __FILE__, __LINE__); \
    }()

#define TEST(name)                                                                                          \
    static void name();                                                                                     \
    [[maybe_unused]] static const bool name##_registered =                                                  \
        (::kvstrata::testing::tests().push_back({#name, name}), true);                                      \
    static void name()

int main() {
    for (const auto& test : kvstrata::testing::tests()) {
        const int before = kvstrata::testing::failures;
        try {
            test.run();
        } catch (const std::exception& error) {
            kvstrata::testing::check(false, error.what(), test.name, 0);
        }
        std::printf("%s %s\n", kvstrata::testing::failures == before ? "ok    " : "FAILED", test.name);
    }
    return kvstrata::testing::failures == 0 ? 0 : 1;
}
