/* Faults under the calls with which a process changes files and reads the clock; loaded with LD_PRELOAD.
 *
 * Nothing happens until the process arms a fault: `torture_arm`, from Python through ctypes. The n-th call that
 * touches a path with the given part in it then fails, is cut short, waits, or ends the process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NOTHING, FAIL, SHORTEN, DELAY, KILL, STOP, JUMP };
enum { RENAMES = 1, OTHERS = 2 };

static _Atomic int action, calls, times;
static int first, kinds, number; /* number: an errno, milliseconds, or hours */
static char part[PATH_MAX], fired[PATH_MAX];
static _Atomic long jumped; /* seconds */

/* From the nth call of these kinds on a path with this part in it, `how_often` calls; `mark` is made then. */
void torture_arm(int what, const char *path_part, int which, int nth, int how_often, int value,
                 const char *mark) {
    snprintf(part, sizeof part, "%s", path_part);
    snprintf(fired, sizeof fired, "%s", mark);
    kinds = which;
    first = nth;
    number = value;
    times = how_often;
    calls = 0;
    action = what;
}

static void *next_of(const char *name) { return dlsym(RTLD_NEXT, name); }

/* What to do with this call on a path: FAIL or SHORTEN, else NOTHING. */
static int happens(const char *path, int kind) {
    if (!action || !path || !(kinds & kind) || !strstr(path, part)) return NOTHING;
    int call = ++calls;
    if (call < first || times <= 0) return NOTHING;
    times--;
    long file = syscall(SYS_openat, AT_FDCWD, fired, O_WRONLY | O_CREAT, 0666);
    if (file >= 0) syscall(SYS_close, file);
    switch (action) {
    case DELAY: {
        struct timespec wait = {number / 1000, number % 1000 * 1000000L};
        nanosleep(&wait, NULL);
        return NOTHING;
    }
    case KILL: kill(getpid(), SIGKILL); return NOTHING;
    case STOP: kill(getpid(), SIGSTOP); return NOTHING;
    case JUMP: jumped = number * 3600L; return NOTHING;
    default: return action;
    }
}

static int happens_to(int file, int kind) {
    char link[64], path[PATH_MAX];
    if (!action) return NOTHING;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return NOTHING;
    path[length] = 0;
    return happens(path, kind);
}

static int fail(void) {
    errno = number;
    return -1;
}

#define WRITING (O_WRONLY | O_RDWR | O_CREAT)
#define OPENER(name)                                                                  \
    int name(const char *path, int flags, ...) {                                      \
        mode_t mode = 0;                                                              \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                        \
            va_list rest;                                                             \
            va_start(rest, flags);                                                    \
            mode = va_arg(rest, mode_t);                                              \
            va_end(rest);                                                             \
        }                                                                             \
        if ((flags & WRITING) && happens(path, OTHERS) == FAIL) return fail();        \
        return ((int (*)(const char *, int, ...))next_of(#name))(path, flags, mode);  \
    }
OPENER(open)
OPENER(open64)

ssize_t write(int file, const void *bytes, size_t size) {
    int what = happens_to(file, OTHERS);
    if (what == FAIL) return fail();
    if (what == SHORTEN && size > 1) size /= 2;
    return ((ssize_t(*)(int, const void *, size_t))next_of("write"))(file, bytes, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    int what = happens_to(file, OTHERS);
    if (what == FAIL) return fail();
    if (what == SHORTEN && count > 1) count = 1;
    return ((ssize_t(*)(int, const struct iovec *, int))next_of("writev"))(file, parts, count);
}

#define AT(name, offset)                                                                        \
    ssize_t name(int file, const void *bytes, size_t size, offset at) {                         \
        int what = happens_to(file, OTHERS);                                                    \
        if (what == FAIL) return fail();                                                        \
        if (what == SHORTEN && size > 1) size /= 2;                                             \
        return ((ssize_t(*)(int, const void *, size_t, offset))next_of(#name))(file, bytes, size, at); \
    }
AT(pwrite, off_t)
AT(pwrite64, off64_t)

#define ON_FILE(name)                                        \
    int name(int file) {                                     \
        if (happens_to(file, OTHERS) == FAIL) return fail(); \
        return ((int (*)(int))next_of(#name))(file);         \
    }
ON_FILE(fsync)
ON_FILE(fdatasync)

int rename(const char *from, const char *to) {
    if (happens(to, RENAMES) == FAIL) return fail();
    return ((int (*)(const char *, const char *))next_of("rename"))(from, to);
}

int mkdir(const char *path, mode_t mode) {
    if (happens(path, OTHERS) == FAIL) return fail();
    return ((int (*)(const char *, mode_t))next_of("mkdir"))(path, mode);
}

int unlink(const char *path) {
    if (happens(path, OTHERS) == FAIL) return fail();
    return ((int (*)(const char *))next_of("unlink"))(path);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = ((int (*)(clockid_t, struct timespec *))next_of("clock_gettime"))(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += jumped;
    return result;
}

time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = ((int (*)(struct timeval *, void *))next_of("gettimeofday"))(now, zone);
    now->tv_sec += jumped;
    return result;
}
