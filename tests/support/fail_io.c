// Loaded before libc (LD_PRELOAD), it lets calls on files fail: those of a kind whose path contains a text.
//
// fail_io(kinds, text, error) says which, from then on; with kinds 0 none fail. Opening for writing only counts as opening.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPENS = 1, WRITES = 2, READS = 4, SYNCS = 8, ALLOCATES = 16, NAMES = 32 };

static volatile int failing, error_number;
static volatile long failed;
static char wanted[PATH_MAX];

void fail_io(int kinds, const char* text, int error) {
    failing = 0;
    strncpy(wanted, text, sizeof wanted - 1);
    error_number = error;
    failed = 0;
    failing = kinds;
}
long failed_io(void) { return failed; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int hit(const char* path) {
    if (!strstr(path, wanted)) return 0;
    __sync_fetch_and_add(&failed, 1);
    errno = error_number;
    return 1;
}
static int path_fails(int kind, const char* path) { return (failing & kind) && path && hit(path); }
static int fd_fails(int kind, int fd) {
    if (!(failing & kind)) return 0;
    int saved = errno;
    char link[64], target[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    errno = saved;
    if (length <= 0) return 0;
    target[length] = 0;
    return hit(target);
}

#define MODE                                                             \
    va_list rest;                                                        \
    va_start(rest, flags);                                               \
    mode_t mode = flags & O_CREAT ? (mode_t)va_arg(rest, int) : 0;       \
    va_end(rest);
#define OPEN(name)                                                       \
    int name(const char* path, int flags, ...) {                        \
        MODE if (path_fails(OPENS, path)) return -1;                     \
        return REAL(name)(path, flags, mode);                            \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                     \
    int name(int at, const char* path, int flags, ...) {                \
        MODE if (path_fails(OPENS, path)) return -1;                     \
        return REAL(name)(at, path, flags, mode);                        \
    }
OPENAT(openat)
OPENAT(openat64)
#define PLAIN(name, kind, type)                                          \
    ssize_t name(int fd, type bytes, size_t count) { return fd_fails(kind, fd) ? -1 : REAL(name)(fd, bytes, count); }
PLAIN(write, WRITES, const void*)
PLAIN(read, READS, void*)
#define AT(name, kind, type, position)                                   \
    ssize_t name(int fd, type bytes, size_t count, position offset) {    \
        return fd_fails(kind, fd) ? -1 : REAL(name)(fd, bytes, count, offset); \
    }
AT(pwrite, WRITES, const void*, off_t)
AT(pwrite64, WRITES, const void*, off64_t)
AT(pread, READS, void*, off_t)
AT(pread64, READS, void*, off64_t)
#define VECTOR(name, kind, position)                                     \
    ssize_t name(int fd, const struct iovec* parts, int count, position offset) { \
        return fd_fails(kind, fd) ? -1 : REAL(name)(fd, parts, count, offset); \
    }
VECTOR(pwritev, WRITES, off_t)
VECTOR(pwritev64, WRITES, off64_t)
VECTOR(preadv, READS, off_t)
VECTOR(preadv64, READS, off64_t)
#define VECTOR2(name, kind, position)                                    \
    ssize_t name(int fd, const struct iovec* parts, int count, position offset, int flags) { \
        return fd_fails(kind, fd) ? -1 : REAL(name)(fd, parts, count, offset, flags); \
    }
VECTOR2(pwritev2, WRITES, off_t)
VECTOR2(pwritev64v2, WRITES, off64_t)
VECTOR2(preadv2, READS, off_t)
VECTOR2(preadv64v2, READS, off64_t)
#define SYNC(name)                                                       \
    int name(int fd) { return fd_fails(SYNCS, fd) ? -1 : REAL(name)(fd); }
SYNC(fsync)
SYNC(fdatasync)
#define RESIZE(name, position)                                           \
    int name(int fd, position size) { return fd_fails(ALLOCATES, fd) ? -1 : REAL(name)(fd, size); }
RESIZE(ftruncate, off_t)
RESIZE(ftruncate64, off64_t)
#define ALLOCATE(name, position) /* returns the error */                 \
    int name(int fd, position offset, position length) {                \
        return fd_fails(ALLOCATES, fd) ? error_number : REAL(name)(fd, offset, length); \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)
int unlink(const char* path) { return path_fails(NAMES, path) ? -1 : REAL(unlink)(path); }
int rename(const char* from, const char* to) { return path_fails(NAMES, from) ? -1 : REAL(rename)(from, to); }
