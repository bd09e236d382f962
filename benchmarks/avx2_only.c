/* Makes every program believe that the processor has AVX2 and FMA, but neither AVX-512 nor AMX, so that one machine
 * shows what both kinds would do: runtimes choose their kernels, and the width of their blocks of channels, by CPUID.
 *
 *     gcc -O2 -shared -fPIC -o avx2_only.so benchmarks/avx2_only.c
 *     LD_PRELOAD=./avx2_only.so OMP_NUM_THREADS=1 python -m benchmarks.never_slower --only published
 *
 * Linux on x86-64, on processors that can fault on CPUID (cpuid_fault in /proc/cpuinfo). The instruction is emulated
 * in a signal handler; everything else runs as it is. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

static struct sigaction before;

static void answer(greg_t *registers) {
    unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, part, a, b, c, d);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 7 && part == 0) {
        b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
        c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
        d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
    } else if (leaf == 7 && part == 1) {
        a &= ~(1u << 4 | 1u << 5 | 1u << 21); /* AVX-VNNI, AVX512-BF16, AMX-FP16 */
    } else if (leaf == 0xd && part == 0) {
        a &= ~(7u << 5 | 3u << 17); /* the state of AVX-512 and of AMX */
    } else if (leaf == 0x1d || leaf == 0x1e) {
        a = b = c = d = 0; /* the palettes of AMX */
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

static void handle(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    if (info->si_code == SI_KERNEL && code[0] == 0x0f && code[1] == 0xa2) {
        answer(registers);
        return;
    }
    sigaction(SIGSEGV, &before, NULL); /* somebody else's fault: it happens again */
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, &before);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) {
        fputs("avx2_only: this processor or system cannot fault on CPUID\n", stderr);
        exit(1);
    }
}
