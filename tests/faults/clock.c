/* A wall clock that can be moved while a process runs: preloaded, it adds the seconds in the
   file $MOE_CLOCK to what Python is told. Only Python: Ray's C++ waits for moments of the real
   clock, and a real jump would move those with it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long offset(void *caller) {
    Dl_info from;
    if (!dladdr(caller, &from) || !from.dli_fname || !strstr(from.dli_fname, "python"))
        return 0;
    if (strstr(from.dli_fname, "site-packages")) return 0;
    const char *path = getenv("MOE_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    char text[32] = {0};
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    return size > 0 ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now) != 0;
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += offset(__builtin_return_address(0));
    return failed ? -1 : 0;
}
