// What the core throws. Each becomes the Python exception of the same name in the bindings.
#pragma once

#include <stdexcept>
#include <string>

#include "types.hpp"

namespace kvstrata {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct TierFull : Error {
    TierFull(std::string tier_, u64 need_, u64 free_)
        : Error("tier full"), tier(std::move(tier_)), need(need_), free(free_) {}
    std::string tier;
    u64 need, free;
};
struct TierUnavailable : Error { using Error::Error; };
struct FormatError : Error { using Error::Error; };
struct ConfigError : Error { using Error::Error; };
struct ConfigMismatch : Error { using Error::Error; };
struct VersionConflict : Error { using Error::Error; };
struct CorruptRecord : Error { using Error::Error; };
struct CacheClosed : Error { using Error::Error; };
struct InvalidKey : Error { using Error::Error; };
struct InvalidValue : Error { using Error::Error; };
struct OsError : Error {
    OsError(const std::string& what, int code_) : Error(what), code(code_) {}
    int code;  // errno
};

}  // namespace kvstrata
