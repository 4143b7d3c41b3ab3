// Loaded before libc (LD_PRELOAD), it writes down what a process does to the files under one directory.
//
// RECORD_ROOT is the directory, RECORD_LOG the file that the record is appended to: for each operation a head (below),
// the name, and the bytes. A file is told by its inode, so a name may be used again. What isn't under the root goes by.
// What is written is noted when the call has returned. A sync is noted twice: before the call, since it covers what had
// returned by then, and after it, since only then it has done so.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 'c', WRITE = 'w', TRUNCATE = 't', ALLOCATE = 'a', RENAME = 'r', UNLINK = 'u', SYNC = 's', SYNCED = 'S' };
struct head {
    uint64_t what, inode, offset, length, name, data;  // name and data: bytes that follow
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1;
static char root[PATH_MAX];

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void start(void) {
    const char *where = getenv("RECORD_ROOT"), *log = getenv("RECORD_LOG");
    if (!where || !log || !realpath(where, root)) return;
    log_fd = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void put(const void* bytes, size_t count) {
    while (count) {
        ssize_t done = REAL(write)(log_fd, bytes, count);
        if (done <= 0) abort();
        bytes = (const char*)bytes + done;
        count -= (size_t)done;
    }
}

static void note(int what, uint64_t inode, uint64_t offset, uint64_t length, const char* name, const struct iovec* parts,
                 int count) {
    int saved = errno;
    struct head head = {(uint64_t)what, inode, offset, length, name ? strlen(name) : 0, parts ? length : 0};
    pthread_mutex_lock(&mutex);
    put(&head, sizeof head);
    put(name, head.name);
    for (uint64_t left = head.data; left && count; ++parts, --count) {
        size_t here = parts->iov_len < left ? parts->iov_len : left;
        put(parts->iov_base, here);
        left -= here;
    }
    pthread_mutex_unlock(&mutex);
    errno = saved;
}

// The name under the root of what a path means, or NULL.
static const char* under(const char* path, char* buffer) {
    int saved = errno;
    char parent[PATH_MAX], full[PATH_MAX];
    const char* found = NULL;
    if (log_fd >= 0 && path && strlen(path) < PATH_MAX) {
        strcpy(parent, path);
        char* slash = strrchr(parent, '/');
        const char* base = slash ? path + (slash - parent) + 1 : path;
        if (slash) *slash = 0;
        size_t length = strlen(root);
        if (realpath(slash ? (slash == parent ? "/" : parent) : ".", full) && !strncmp(full, root, length) &&
            (full[length] == 0 || full[length] == '/')) {
            snprintf(buffer, PATH_MAX, "%s%s%s", full[length] ? full + length + 1 : "", full[length] ? "/" : "", base);
            found = buffer;
        }
    }
    errno = saved;
    return found;
}

// The inode of a file of the record, 0 if it is none.
static uint64_t recorded(int fd) {
    int saved = errno;
    char link[64], target[PATH_MAX];
    struct stat there;
    uint64_t inode = 0;
    if (log_fd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, target, sizeof target - 1);
        size_t prefix = strlen(root);
        if (length > 0) target[length] = 0;
        if (length >= (ssize_t)prefix && !strncmp(target, root, prefix) && (!target[prefix] || target[prefix] == '/') &&
            !fstat(fd, &there))
            inode = there.st_ino;
    }
    errno = saved;
    return inode;
}

static int after_open(int fd, const char* name, int flags, int existed) {
    struct stat there;
    if (fd >= 0 && name && !fstat(fd, &there)) {
        if ((flags & O_CREAT) && !existed) note(CREATE, there.st_ino, 0, 0, name, NULL, 0);
        else if (flags & O_TRUNC) note(TRUNCATE, there.st_ino, 0, 0, NULL, NULL, 0);
    }
    return fd;
}

static int exists(const char* path) {
    int saved = errno;
    struct stat there;
    int found = lstat(path, &there) == 0;
    errno = saved;
    return found;
}

#define OPEN(name)                                                       \
    int name(const char* path, int flags, ...) {                        \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode_t mode = flags & O_CREAT ? (mode_t)va_arg(rest, int) : 0;   \
        va_end(rest);                                                    \
        char buffer[PATH_MAX];                                           \
        const char* inside = under(path, buffer);                        \
        int existed = inside && exists(path);                            \
        return after_open(REAL(name)(path, flags, mode), inside, flags, existed); \
    }
OPEN(open)
OPEN(open64)

// Relative to a directory's descriptor nothing here opens a file of the cache.
#define OPENAT(name)                                                     \
    int name(int at, const char* path, int flags, ...) {                \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode_t mode = flags & O_CREAT ? (mode_t)va_arg(rest, int) : 0;   \
        va_end(rest);                                                    \
        char buffer[PATH_MAX];                                           \
        const char* inside = at == AT_FDCWD || *path == '/' ? under(path, buffer) : NULL; \
        int existed = inside && exists(path);                            \
        return after_open(REAL(name)(at, path, flags, mode), inside, flags, existed); \
    }
OPENAT(openat)
OPENAT(openat64)

static ssize_t written(int fd, ssize_t done, uint64_t offset, const struct iovec* parts, int count) {
    uint64_t inode = done > 0 ? recorded(fd) : 0;
    if (inode) {
        note(WRITE, inode, offset, (uint64_t)done, NULL, parts, count);
        if (fcntl(fd, F_GETFL) & O_DSYNC) {
            note(SYNC, inode, 0, 0, NULL, NULL, 0);
            note(SYNCED, inode, 0, 0, NULL, NULL, 0);
        }
    }
    return done;
}

static uint64_t position(int fd, ssize_t done) {
    off_t now = lseek(fd, 0, SEEK_CUR);
    return now < done ? 0 : (uint64_t)(now - done);
}

ssize_t write(int fd, const void* bytes, size_t count) {
    struct iovec part = {(void*)bytes, count};
    ssize_t done = REAL(write)(fd, bytes, count);
    return done > 0 && recorded(fd) ? written(fd, done, position(fd, done), &part, 1) : done;
}
ssize_t writev(int fd, const struct iovec* parts, int count) {
    ssize_t done = REAL(writev)(fd, parts, count);
    return done > 0 && recorded(fd) ? written(fd, done, position(fd, done), parts, count) : done;
}
#define PWRITE(name, type)                                               \
    ssize_t name(int fd, const void* bytes, size_t count, type offset) { \
        struct iovec part = {(void*)bytes, count};                       \
        return written(fd, REAL(name)(fd, bytes, count, offset), (uint64_t)offset, &part, 1); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
#define PWRITEV(name, type)                                              \
    ssize_t name(int fd, const struct iovec* parts, int count, type offset) { \
        return written(fd, REAL(name)(fd, parts, count, offset), (uint64_t)offset, parts, count); \
    }
PWRITEV(pwritev, off_t)
PWRITEV(pwritev64, off64_t)
#define PWRITEV2(name, type)                                             \
    ssize_t name(int fd, const struct iovec* parts, int count, type offset, int flags) { \
        return written(fd, REAL(name)(fd, parts, count, offset, flags), (uint64_t)offset, parts, count); \
    }
PWRITEV2(pwritev2, off_t)
PWRITEV2(pwritev64v2, off64_t)

static int resized(int fd, int result, int what, uint64_t offset, uint64_t length) {
    uint64_t inode = result == 0 ? recorded(fd) : 0;
    if (inode) note(what, inode, offset, length, NULL, NULL, 0);
    return result;
}
#define FTRUNCATE(name, type)                                            \
    int name(int fd, type size) { return resized(fd, REAL(name)(fd, size), TRUNCATE, (uint64_t)size, 0); }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)
#define TRUNCATE_PATH(name, type)                                        \
    int name(const char* path, type size) {                             \
        char buffer[PATH_MAX];                                           \
        struct stat there;                                               \
        int result = REAL(name)(path, size);                             \
        if (!result && under(path, buffer) && !stat(path, &there)) note(TRUNCATE, there.st_ino, (uint64_t)size, 0, NULL, NULL, 0); \
        return result;                                                   \
    }
TRUNCATE_PATH(truncate, off_t)
TRUNCATE_PATH(truncate64, off64_t)
#define ALLOCATE_(name, type)                                            \
    int name(int fd, type offset, type length) {                        \
        return resized(fd, REAL(name)(fd, offset, length), ALLOCATE, (uint64_t)offset, (uint64_t)length); \
    }
ALLOCATE_(posix_fallocate, off_t)
ALLOCATE_(posix_fallocate64, off64_t)
#define FALLOCATE(name, type)                                            \
    int name(int fd, int mode, type offset, type length) {              \
        int result = REAL(name)(fd, mode, offset, length);               \
        if (mode && !result && recorded(fd)) abort(); /* to be modelled first */ \
        return resized(fd, result, ALLOCATE, (uint64_t)offset, (uint64_t)length); \
    }
FALLOCATE(fallocate, off_t)
FALLOCATE(fallocate64, off64_t)

#define SYNC_(name)                                                      \
    int name(int fd) {                                                  \
        uint64_t inode = recorded(fd);                                   \
        if (inode) note(SYNC, inode, 0, 0, NULL, NULL, 0);               \
        int result = REAL(name)(fd);                                     \
        if (inode && result == 0) note(SYNCED, inode, 0, 0, NULL, NULL, 0); \
        return result;                                                   \
    }
SYNC_(fsync)
SYNC_(fdatasync)

static int renamed(int result, const char* from, const char* to) {
    if (result == 0 && from && to) {
        char both[2 * PATH_MAX];
        snprintf(both, sizeof both, "%s\n%s", from, to);
        note(RENAME, 0, 0, 0, both, NULL, 0);
    }
    return result;
}
int rename(const char* from, const char* to) {
    char a[PATH_MAX], b[PATH_MAX];
    const char *inside = under(from, a), *after = under(to, b);
    return renamed(REAL(rename)(from, to), inside, after);
}
int renameat(int from_at, const char* from, int to_at, const char* to) {
    char a[PATH_MAX], b[PATH_MAX];
    const char *inside = under(from, a), *after = under(to, b);
    return renamed(REAL(renameat)(from_at, from, to_at, to), inside, after);
}

static int unlinked(int result, const char* name) {
    if (result == 0 && name) note(UNLINK, 0, 0, 0, name, NULL, 0);
    return result;
}
int unlink(const char* path) {
    char buffer[PATH_MAX];
    const char* inside = under(path, buffer);
    return unlinked(REAL(unlink)(path), inside);
}
int unlinkat(int at, const char* path, int flags) {
    char buffer[PATH_MAX];
    const char* inside = at == AT_FDCWD || *path == '/' ? under(path, buffer) : NULL;
    return unlinked(REAL(unlinkat)(at, path, flags), inside);
}
