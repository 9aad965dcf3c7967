/* Counts the changing calls of a whole tree of processes, and ends it at the k-th: LD_PRELOAD, state shared through a mapped file.

   KILL_STATE names the file: calls so far, the limit (0: none), the mode, the verb's process number, and whether the machine is dead.
   Mode 0: all die, each before its next changing call or write; 1: only the process that makes the call; 2: only the verb.
   KILL_LOG gets a line a call, and one for every sync: without these nobody knows what a power cut would have left. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct state { _Atomic uint64_t count; uint64_t limit, mode; _Atomic uint64_t verb, dead; };
static struct state *state;
static int log_fd = -1;

static void die(void) { for (;;) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); }

static void say(const char *what, const char *path, uint64_t number) {
    char line[640];
    struct timespec now;
    /* The coarse clock is the one that file times are taken from. */
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    int length = snprintf(line, sizeof line, "%llu %lld %d %s %.500s\n", (unsigned long long)number,
                          (long long)now.tv_sec * 1000000000 + now.tv_nsec, (int)syscall(SYS_getpid), what, path ? path : "");
    if (log_fd >= 0 && length > 0) (void)!syscall(SYS_write, log_fd, line, (size_t)length < sizeof line ? (size_t)length : sizeof line - 1);
}

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("KILL_STATE"), *log = getenv("KILL_LOG");
    if (!name || !log) return;
    int fd = syscall(SYS_openat, AT_FDCWD, name, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (at == MAP_FAILED) return;
    int low = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CLOEXEC, 0);
    /* High, for programs that count on low numbers being free. */
    log_fd = low < 0 ? -1 : fcntl(low, F_DUPFD_CLOEXEC, 200);
    if (low >= 0) syscall(SYS_close, low);
    state = at;
    uint64_t none = 0;
    atomic_compare_exchange_strong(&state->verb, &none, (uint64_t)getpid());
}

static void alive(void) { if (state && atomic_load(&state->dead)) die(); }

/* A device or the kernel's own; a world may well lie in /dev/shm. */
static int is_special(const char *path) {
    return !strncmp(path, "/proc/", 6) || (!strncmp(path, "/dev/", 5) && strncmp(path, "/dev/shm/", 9));
}

static void changing(const char *what, const char *path) {
    if (!state || (path && is_special(path))) return;
    alive();
    int saved = errno;
    uint64_t number = atomic_fetch_add(&state->count, 1) + 1;
    say(what, path, number);
    if (state->limit && number == state->limit) {
        if (state->mode == 0) { atomic_store(&state->dead, 1); die(); }
        if (state->mode == 1) die();
        syscall(SYS_kill, (pid_t)atomic_load(&state->verb), SIGKILL);
        if ((pid_t)atomic_load(&state->verb) == (pid_t)syscall(SYS_getpid)) die();
    }
    errno = saved;
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); real; })
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define MODE(flags) ({ mode_t given = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); given = va_arg(rest, mode_t); va_end(rest); } given; })

int open(const char *path, int flags, ...) { mode_t mode = MODE(flags); if (WRITES(flags)) changing("open", path); return REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { mode_t mode = MODE(flags); if (WRITES(flags)) changing("open", path); return REAL(open64)(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { mode_t mode = MODE(flags); if (WRITES(flags)) changing("open", path); return REAL(openat)(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { mode_t mode = MODE(flags); if (WRITES(flags)) changing("open", path); return REAL(openat64)(at, path, flags, mode); }
int creat(const char *path, mode_t mode) { changing("open", path); return REAL(creat)(path, mode); }
FILE *fopen(const char *path, const char *how) { if (strpbrk(how, "wa+")) changing("open", path); return REAL(fopen)(path, how); }
FILE *fopen64(const char *path, const char *how) { if (strpbrk(how, "wa+")) changing("open", path); return REAL(fopen64)(path, how); }
/* A rename onto a file writes the new content first: ext4 since 2009 (auto_da_alloc, ext4(5)), btrfs, and XFS nearly. */
static void replacing(const char *from, const char *to) {
    struct stat new, old;
    char inode[64];
    if (!state || lstat(from, &new) || lstat(to, &old) || !S_ISREG(new.st_mode)) return;
    snprintf(inode, sizeof inode, "%llu", (unsigned long long)new.st_ino);
    say("fsync", inode, 0);
}
int rename(const char *from, const char *to) { changing("rename", to); replacing(from, to); return REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { changing("rename", to); return REAL(renameat)(a, from, b, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { changing("rename", to); return REAL(renameat2)(a, from, b, to, flags); }
int unlink(const char *path) { changing("unlink", path); return REAL(unlink)(path); }
int unlinkat(int at, const char *path, int flags) { changing("unlink", path); return REAL(unlinkat)(at, path, flags); }
int remove(const char *path) { changing("unlink", path); return REAL(remove)(path); }
int rmdir(const char *path) { changing("rmdir", path); return REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { changing("mkdir", path); return REAL(mkdir)(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { changing("mkdir", path); return REAL(mkdirat)(at, path, mode); }
int link(const char *from, const char *to) { changing("link", to); return REAL(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) { changing("link", to); return REAL(linkat)(a, from, b, to, flags); }
int symlink(const char *to, const char *path) { changing("symlink", path); return REAL(symlink)(to, path); }
int symlinkat(const char *to, int at, const char *path) { changing("symlink", path); return REAL(symlinkat)(to, at, path); }
int truncate(const char *path, off_t size) { changing("truncate", path); return REAL(truncate)(path, size); }
int truncate64(const char *path, off64_t size) { changing("truncate", path); return REAL(truncate64)(path, size); }
int ftruncate(int fd, off_t size) { changing("truncate", NULL); return REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { changing("truncate", NULL); return REAL(ftruncate64)(fd, size); }
int chmod(const char *path, mode_t mode) { changing("chmod", path); return REAL(chmod)(path, mode); }
int fchmod(int fd, mode_t mode) { changing("chmod", NULL); return REAL(fchmod)(fd, mode); }
int fchmodat(int at, const char *path, mode_t mode, int flags) { changing("chmod", path); return REAL(fchmodat)(at, path, mode, flags); }
ssize_t write(int fd, const void *from, size_t size) { alive(); return REAL(write)(fd, from, size); }
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t at) { alive(); return REAL(pwrite64)(fd, from, size, at); }

/* A sync is written down before it is asked for: what changes while it runs counts as not synced. */
static void synced(int fd) {
    struct stat found;
    char inode[64];
    if (!state || fstat(fd, &found)) return;
    snprintf(inode, sizeof inode, "%llu", (unsigned long long)found.st_ino);
    say("fsync", inode, 0);
}
/* No call syncs for real: what a power cut leaves is worked out from the log, and a real sync would wait for every writer of the machine. */
int fsync(int fd) { alive(); if (!state) return REAL(fsync)(fd); synced(fd); return 0; }
int fdatasync(int fd) { alive(); if (!state) return REAL(fdatasync)(fd); synced(fd); return 0; }
void sync(void) { alive(); if (state) say("sync", "", 0); else REAL(sync)(); }
