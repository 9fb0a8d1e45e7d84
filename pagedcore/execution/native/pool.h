/* See pool.c. */

#pragma once

typedef void (*Task)(void *context, long task);

/* Do tasks 0 .. tasks - 1, with the help of other threads; returns when all are done. */
void pagedcore_share(Task work, void *context, long tasks);

/* How many tasks to make of `size` units, of which a task should have at least `least`: as many for
   each thread, and no more than are good for an even end. */
long pagedcore_num_tasks(long size, long least);
