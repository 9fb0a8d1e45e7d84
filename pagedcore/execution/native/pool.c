/* Work that threads share. Whoever has work takes part in it, and waits at its end only for helpers
   that are in the middle of a task: never for one that the system has not let run yet. On a machine
   that others use too, where a helper may be away for milliseconds, work then takes as long as it
   does in one thread, and not as long as the helper is away. */

#include "pool.h"

#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_HELPERS = 255, MOST_EACH = 16, PATIENCE = 1 << 18 };
/* Tasks for each thread at most. Clock ticks that a helper looks out for work before it sleeps: a
   tenth of a millisecond, which is longer than the gaps within a step. */

#define CLOSED 0xffffffffu /* the ticket of work that is done */

#define APART _Alignas(64) /* in a line of the cache that nothing else is written to */

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* of the work below */
static APART _Atomic(Task) shared_work;
static _Atomic(void *) shared_context;
static atomic_long shared_tasks;
static APART atomic_long num_finished;
static APART _Atomic uint64_t ticket = CLOSED; /* number of the work << 32 | next task */
static APART _Atomic uint32_t alarm_number;    /* what sleepers sleep on */
static atomic_int num_asleep, num_active;
static int num_helpers;

static uint32_t number_of(uint64_t value) { return (uint32_t)(value >> 32); }

/* Do tasks of the work with this number while there are any.

   What was read of the work belongs to it if the ticket could be taken: before the next work is
   written down, the ticket is closed. */
static void take_part(uint32_t number) {
    for (;;) {
        uint64_t value = atomic_load(&ticket);
        if (number_of(value) != number || (uint32_t)value == CLOSED) return;
        Task work = atomic_load_explicit(&shared_work, memory_order_relaxed);
        void *context = atomic_load_explicit(&shared_context, memory_order_relaxed);
        long tasks = atomic_load_explicit(&shared_tasks, memory_order_relaxed);
        if ((long)(uint32_t)value >= tasks) return;
        if (!atomic_compare_exchange_weak(&ticket, &value, value + 1)) continue;
        work(context, (long)(uint32_t)value);
        atomic_fetch_add(&num_finished, 1);
    }
}

static uint32_t next_number(uint32_t seen) {
    for (;;) {
        uint64_t start = __rdtsc();
        while (__rdtsc() - start < PATIENCE) {
            uint32_t number = number_of(atomic_load(&ticket));
            if (number != seen) return number;
            _mm_pause();
        }
        uint32_t before = atomic_load(&alarm_number);
        atomic_fetch_add(&num_asleep, 1);
        if (number_of(atomic_load(&ticket)) == seen)
            syscall(SYS_futex, &alarm_number, FUTEX_WAIT_PRIVATE, before, NULL, NULL, 0);
        atomic_fetch_sub(&num_asleep, 1);
    }
}

static void *help(void *index) {
    for (uint32_t seen = 0;;) {
        seen = next_number(seen);
        if ((int)(intptr_t)index < atomic_load(&num_active)) take_part(seen);
    }
    return NULL;
}

void pagedcore_share(Task work, void *context, long tasks) {
    if (tasks <= 1 || atomic_load(&num_active) == 0 || pthread_mutex_trylock(&owner)) {
        for (long task = 0; task < tasks; task++) work(context, task);
        return;
    }
    uint32_t number = number_of(atomic_load(&ticket)) + 1;
    atomic_store_explicit(&shared_work, work, memory_order_relaxed);
    atomic_store_explicit(&shared_context, context, memory_order_relaxed);
    atomic_store_explicit(&shared_tasks, tasks, memory_order_relaxed);
    atomic_store_explicit(&num_finished, 0, memory_order_relaxed);
    atomic_store(&ticket, (uint64_t)number << 32);
    if (atomic_load(&num_asleep)) {
        atomic_fetch_add(&alarm_number, 1);
        syscall(SYS_futex, &alarm_number, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }
    take_part(number);
    for (int turns = 0; atomic_load(&num_finished) < tasks; turns++) {
        if (turns < 1 << 12)
            _mm_pause();
        else
            sched_yield();
    }
    atomic_store(&ticket, (uint64_t)number << 32 | CLOSED);
    pthread_mutex_unlock(&owner);
}

long pagedcore_num_tasks(long size, long least) {
    long threads = atomic_load(&num_active) + 1, each = size / (threads * least);
    return threads * (each < 1 ? 1 : each > MOST_EACH ? MOST_EACH : each);
}

/* Let this many threads share work, the caller's included. */
__attribute__((visibility("default"))) void pagedcore_threads(int count) {
    int wanted = count - 1 < MAX_HELPERS ? count - 1 : MAX_HELPERS;
    if (wanted == atomic_load(&num_active)) return;
    pthread_mutex_lock(&owner);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
    while (num_helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(intptr_t)num_helpers)) break;
        pthread_detach(thread);
        num_helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    atomic_store(&num_active, wanted < num_helpers ? wanted : num_helpers);
    pthread_mutex_unlock(&owner);
}
