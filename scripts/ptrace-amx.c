// User-mode Linux 6.1 has room for a process's registers up to AVX-512. With AMX there are more, and
// the host takes back all of them or none (ptrace(2), EFAULT). So this library, loaded before others,
// adds the registers that user-mode Linux does not know, as they are.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
    static long (*next)(int, ...);
    static char registers[65536];
    struct iovec *data, all = {registers, sizeof registers};
    va_list arguments;
    int pid;
    void *address;

    va_start(arguments, request);
    pid = va_arg(arguments, int);
    address = va_arg(arguments, void *);
    data = va_arg(arguments, struct iovec *);
    va_end(arguments);
    if (!next)
        next = dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE
        && next(PTRACE_GETREGSET, pid, address, &all) == 0 && all.iov_len > data->iov_len) {
        memcpy(registers, data->iov_base, data->iov_len);
        data = &all;
    }
    return next(request, pid, address, data);
}
