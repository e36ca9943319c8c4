/* Preloaded into a broker, this writes down everything it does to the files below one folder, in order and with
 * the data, so that a test can tell what a disk would hold had the power gone at any moment.
 *
 * MPYPI_JOURNAL_ROOT  the folder, absolute and without symbolic links
 * MPYPI_JOURNAL       where to write, outside of it
 *
 * A record: u8 what, u64 first, u64 second, u32 and u32 lengths, then so many bytes and bytes, little-endian.
 * tests/src/disk.rs reads them. One lock is held for each change and its record, so that their order is the
 * same. What cannot be told apart from the outside, as a shared writable mapping, is recorded as unsupported,
 * and fails the test. Syncing is only written down: the journal is the disk here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

enum { CREATE = 1, FOLDER, WRITE, LENGTH, SYNC, RENAME, UNLINK, RMDIR, LINK, UNSUPPORTED = 255 };

#define FILES 65536
#define EXPORT __attribute__((visibility("default")))
#define NEXT(name) ((__typeof__(&name))next(#name))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int journal = -1;
static volatile unsigned char ours[FILES];

static void *next(const char *name) {
  void *found = dlsym(RTLD_NEXT, name);
  if (!found) abort();
  return found;
}

static void record(uint8_t what, uint64_t first, uint64_t second, const void *one, size_t one_length,
                   const void *two, size_t two_length) {
  uint8_t head[25];
  uint32_t lengths[2] = {(uint32_t)one_length, (uint32_t)two_length};
  head[0] = what;
  memcpy(head + 1, &first, 8);
  memcpy(head + 9, &second, 8);
  memcpy(head + 17, lengths, 8);
  struct iovec parts[3] = {{head, sizeof head}, {(void *)one, one_length}, {(void *)two, two_length}};
  ssize_t all = (ssize_t)(sizeof head + one_length + two_length);
  int saved = errno;
  /* The disk of the test is full or gone: there is nothing to prove any more. */
  if (syscall(SYS_writev, journal, parts, 3) != all) abort();
  errno = saved;
}

static void record_path(uint8_t what, uint64_t first, const char *path) {
  record(what, first, 0, path, strlen(path), "", 0);
}

static void unsupported(const char *name) { record_path(UNSUPPORTED, 0, name); }

__attribute__((constructor)) static void start(void) {
  const char *folder = getenv("MPYPI_JOURNAL_ROOT"), *path = getenv("MPYPI_JOURNAL");
  if (!folder || !path) abort();
  root_length = strlen(folder);
  if (root_length >= sizeof root) abort();
  memcpy(root, folder, root_length + 1);
  journal = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (journal < 0) abort();
}

/* Whether a path is the folder or below it; `whole` gets it from the root of the file system. */
static int is_ours(int folder, const char *path, char whole[PATH_MAX * 2]) {
  if (journal < 0 || !path) return 0;
  if (path[0] == '/') {
    snprintf(whole, PATH_MAX * 2, "%s", path);
  } else {
    char base[PATH_MAX], link[64];
    if (folder == AT_FDCWD) {
      if (!getcwd(base, sizeof base)) return 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      ssize_t length = readlink(link, base, sizeof base - 1);
      if (length < 0) return 0;
      base[length] = 0;
    }
    snprintf(whole, PATH_MAX * 2, "%s/%s", base, path);
  }
  return !strncmp(whole, root, root_length) && (whole[root_length] == '/' || !whole[root_length]);
}

/* libc closes some files behind our back, as those of opendir, and their numbers come again as sockets. */
static int is_our_file(int file) {
  struct stat found;
  if (file < 0 || file >= FILES || !ours[file]) return 0;
  if (!fstat(file, &found) && (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode))) return 1;
  ours[file] = 0;
  return 0;
}

static uint64_t number_of(int file) {
  struct stat found;
  if (fstat(file, &found)) abort();
  return found.st_ino;
}

static int open_any(int folder, const char *path, int flags, mode_t mode) {
  char whole[PATH_MAX * 2];
  if (!is_ours(folder, path, whole)) {
    return (int)syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode);
  }
  pthread_mutex_lock(&lock);
  struct stat before;
  int existed = !lstat(whole, &before);
  int file = (int)syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode);
  if (file >= FILES) abort();
  if (file >= 0) {
    ours[file] = 1;
    if ((flags & O_TMPFILE) == O_TMPFILE) unsupported("O_TMPFILE");
    else if (!existed) record_path(CREATE, number_of(file), whole);
    else if (flags & O_TRUNC) record(LENGTH, number_of(file), 0, "", 0, "", 0);
  }
  pthread_mutex_unlock(&lock);
  return file;
}

#define OPEN(flags, mode)                                  \
  mode_t mode = 0;                                         \
  if ((flags) & (O_CREAT | __O_TMPFILE)) {                 \
    va_list rest;                                          \
    va_start(rest, flags);                                 \
    mode = va_arg(rest, mode_t);                           \
    va_end(rest);                                          \
  }

EXPORT int open(const char *path, int flags, ...) { OPEN(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
EXPORT int open64(const char *path, int flags, ...) { OPEN(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
EXPORT int openat(int folder, const char *path, int flags, ...) { OPEN(flags, mode) return open_any(folder, path, flags, mode); }
EXPORT int openat64(int folder, const char *path, int flags, ...) { OPEN(flags, mode) return open_any(folder, path, flags, mode); }
EXPORT int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

EXPORT int close(int file) {
  if (file >= 0 && file < FILES) ours[file] = 0;
  return (int)syscall(SYS_close, file);
}

static int copied(int from, int to) {
  if (to >= 0 && to < FILES) ours[to] = is_our_file(from);
  return to;
}

EXPORT int dup(int file) { return copied(file, (int)syscall(SYS_dup, file)); }
EXPORT int dup3(int file, int to, int flags) { return copied(file, (int)syscall(SYS_dup3, file, to, flags)); }
EXPORT int dup2(int file, int to) { return file == to ? file : dup3(file, to, 0); }

#define FCNTL(name)                                                                   \
  EXPORT int name(int file, int what, ...) {                                          \
    va_list rest;                                                                     \
    va_start(rest, what);                                                             \
    long argument = va_arg(rest, long);                                               \
    va_end(rest);                                                                     \
    int done = (int)syscall(SYS_fcntl, file, what, argument);                         \
    return what == F_DUPFD || what == F_DUPFD_CLOEXEC ? copied(file, done) : done;    \
  }
FCNTL(fcntl)
FCNTL(fcntl64)

EXPORT ssize_t write(int file, const void *data, size_t length) {
  if (!is_our_file(file)) return NEXT(write)(file, data, length);
  pthread_mutex_lock(&lock);
  ssize_t done = syscall(SYS_write, file, data, length);
  /* The position after it, wherever it was before: a file may be open for appending. */
  if (done > 0) record(WRITE, number_of(file), (uint64_t)(lseek(file, 0, SEEK_CUR) - done), data, (size_t)done, "", 0);
  pthread_mutex_unlock(&lock);
  return done;
}

static ssize_t write_at(int file, const void *data, size_t length, off_t at) {
  pthread_mutex_lock(&lock);
  ssize_t done = syscall(SYS_pwrite64, file, data, length, at);
  if (done > 0 && is_our_file(file)) record(WRITE, number_of(file), (uint64_t)at, data, (size_t)done, "", 0);
  pthread_mutex_unlock(&lock);
  return done;
}

EXPORT ssize_t pwrite(int file, const void *data, size_t length, off_t at) { return write_at(file, data, length, at); }
EXPORT ssize_t pwrite64(int file, const void *data, size_t length, off64_t at) { return write_at(file, data, length, at); }

static int set_length(int file, off_t length) {
  pthread_mutex_lock(&lock);
  int done = (int)syscall(SYS_ftruncate, file, length);
  if (!done && is_our_file(file)) record(LENGTH, number_of(file), (uint64_t)length, "", 0, "", 0);
  pthread_mutex_unlock(&lock);
  return done;
}

EXPORT int ftruncate(int file, off_t length) { return set_length(file, length); }
EXPORT int ftruncate64(int file, off64_t length) { return set_length(file, length); }

static int synced(int file, long number) {
  if (!is_our_file(file)) return (int)syscall(number, file);
  pthread_mutex_lock(&lock);
  record(SYNC, number_of(file), 0, "", 0, "", 0);
  pthread_mutex_unlock(&lock);
  return 0;
}

EXPORT int fsync(int file) { return synced(file, SYS_fsync); }
EXPORT int fdatasync(int file) { return synced(file, SYS_fdatasync); }
/* It promises nothing after a power cut. */
EXPORT int sync_file_range(int file, off64_t at, off64_t length, unsigned flags) {
  (void)file, (void)at, (void)length, (void)flags;
  return 0;
}

static int made(int folder, const char *path, mode_t mode) {
  char whole[PATH_MAX * 2];
  pthread_mutex_lock(&lock);
  int done = (int)syscall(SYS_mkdirat, folder, path, mode);
  struct stat found;
  if (!done && is_ours(folder, path, whole)) {
    if (lstat(whole, &found)) abort();
    record_path(FOLDER, found.st_ino, whole);
  }
  pthread_mutex_unlock(&lock);
  return done;
}

EXPORT int mkdir(const char *path, mode_t mode) { return made(AT_FDCWD, path, mode); }
EXPORT int mkdirat(int folder, const char *path, mode_t mode) { return made(folder, path, mode); }

static int removed(int folder, const char *path, int flags) {
  char whole[PATH_MAX * 2];
  pthread_mutex_lock(&lock);
  int done = (int)syscall(SYS_unlinkat, folder, path, flags);
  if (!done && is_ours(folder, path, whole)) record_path(flags & AT_REMOVEDIR ? RMDIR : UNLINK, 0, whole);
  pthread_mutex_unlock(&lock);
  return done;
}

EXPORT int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
EXPORT int rmdir(const char *path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }
EXPORT int unlinkat(int folder, const char *path, int flags) { return removed(folder, path, flags); }

static int named(uint8_t what, int folder, const char *path, int to_folder, const char *to, unsigned flags) {
  char one[PATH_MAX * 2], two[PATH_MAX * 2];
  pthread_mutex_lock(&lock);
  int done = what == LINK ? (int)syscall(SYS_linkat, folder, path, to_folder, to, flags)
                          : (int)syscall(SYS_renameat2, folder, path, to_folder, to, flags);
  int from_us = is_ours(folder, path, one), to_us = is_ours(to_folder, to, two);
  if (!done && (from_us || to_us)) {
    if (from_us && to_us && !flags) record(what, 0, 0, one, strlen(one), two, strlen(two));
    else unsupported("a name that comes from or goes to another folder, or flags");
  }
  pthread_mutex_unlock(&lock);
  return done;
}

EXPORT int rename(const char *path, const char *to) { return named(RENAME, AT_FDCWD, path, AT_FDCWD, to, 0); }
EXPORT int renameat(int folder, const char *path, int to_folder, const char *to) { return named(RENAME, folder, path, to_folder, to, 0); }
EXPORT int renameat2(int folder, const char *path, int to_folder, const char *to, unsigned flags) { return named(RENAME, folder, path, to_folder, to, flags); }
EXPORT int link(const char *path, const char *to) { return named(LINK, AT_FDCWD, path, AT_FDCWD, to, 0); }
EXPORT int linkat(int folder, const char *path, int to_folder, const char *to, int flags) { return named(LINK, folder, path, to_folder, to, (unsigned)flags); }

/* A socket's name is one more name; what it names has no content. */
EXPORT int bind(int socket, const struct sockaddr *address, socklen_t length) {
  char path[sizeof(struct sockaddr_un) + 1] = {0}, whole[PATH_MAX * 2];
  if (address->sa_family != AF_UNIX || length <= offsetof(struct sockaddr_un, sun_path)) {
    return (int)syscall(SYS_bind, socket, address, length);
  }
  memcpy(path, ((const struct sockaddr_un *)address)->sun_path, length - offsetof(struct sockaddr_un, sun_path));
  pthread_mutex_lock(&lock);
  int done = (int)syscall(SYS_bind, socket, address, length);
  struct stat found;
  if (!done && path[0] && is_ours(AT_FDCWD, path, whole)) {
    if (lstat(whole, &found)) abort();
    record_path(CREATE, found.st_ino, whole);
  }
  pthread_mutex_unlock(&lock);
  return done;
}

/* What no test can follow. */
#define GUARD(file, name)              \
  if (is_our_file(file)) {             \
    pthread_mutex_lock(&lock);         \
    unsupported(name);                 \
    pthread_mutex_unlock(&lock);       \
  }

#define MAP(name)                                                                              \
  EXPORT void *name(void *address, size_t length, int protection, int flags, int file, off_t at) { \
    if ((flags & MAP_SHARED) && (protection & PROT_WRITE)) GUARD(file, #name)                  \
    return (void *)syscall(SYS_mmap, address, length, protection, flags, file, at);            \
  }
MAP(mmap)
MAP(mmap64)

EXPORT ssize_t writev(int file, const struct iovec *parts, int count) {
  GUARD(file, "writev")
  return NEXT(writev)(file, parts, count);
}
EXPORT ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
  GUARD(file, "pwritev")
  return NEXT(pwritev)(file, parts, count, at);
}
EXPORT ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t at) {
  GUARD(file, "pwritev64")
  return NEXT(pwritev64)(file, parts, count, at);
}
EXPORT int fallocate(int file, int mode, off_t at, off_t length) {
  GUARD(file, "fallocate")
  return NEXT(fallocate)(file, mode, at, length);
}
EXPORT int fallocate64(int file, int mode, off64_t at, off64_t length) {
  GUARD(file, "fallocate64")
  return NEXT(fallocate64)(file, mode, at, length);
}
EXPORT int posix_fallocate(int file, off_t at, off_t length) {
  GUARD(file, "posix_fallocate")
  return NEXT(posix_fallocate)(file, at, length);
}
EXPORT int posix_fallocate64(int file, off64_t at, off64_t length) {
  GUARD(file, "posix_fallocate64")
  return NEXT(posix_fallocate64)(file, at, length);
}
EXPORT ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t length, unsigned flags) {
  GUARD(to, "copy_file_range")
  return NEXT(copy_file_range)(from, from_at, to, to_at, length, flags);
}
EXPORT ssize_t sendfile64(int to, int from, off64_t *at, size_t length) {
  GUARD(to, "sendfile64")
  return syscall(SYS_sendfile, to, from, at, length);
}
EXPORT int symlink(const char *target, const char *path) {
  char whole[PATH_MAX * 2];
  if (is_ours(AT_FDCWD, path, whole)) unsupported("symlink");
  return NEXT(symlink)(target, path);
}
EXPORT int truncate64(const char *path, off64_t length) {
  char whole[PATH_MAX * 2];
  if (is_ours(AT_FDCWD, path, whole)) unsupported("truncate64");
  return NEXT(truncate64)(path, length);
}
