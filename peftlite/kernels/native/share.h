/* share.h: a job in blocks, which torch's threads take one after another. */

#include <stdatomic.h>
#include <stddef.h>

typedef void Work(const void *job, long block);

/* Whose pool it is: GOMP_parallel of the OpenMP that torch has loaded. A pool of our own would wait
   for the cores that torch's threads keep busy for a while after each of its operations. */
typedef void Team(void (*turn)(void *), void *shift, unsigned threads, unsigned flags);
static Team *team;

/* Which of those at work this thread is: whose room it may use. */
static _Thread_local long worker __attribute__((unused));

void join_team(Team *torchs) { team = torchs; }

struct Shift {
    Work *work;
    const void *job;
    long blocks;
    atomic_long next, workers;
};

static void take_turns(void *arg) {
    struct Shift *shift = arg;
    long block;
    while ((block = atomic_fetch_add(&shift->next, 1)) < shift->blocks)
        shift->work(shift->job, block);
}

static void join(void *arg) {
    struct Shift *shift = arg;
    worker = atomic_fetch_add(&shift->workers, 1);
    take_turns(shift);
    worker = 0;
}

/* Who is late, since another process has its core, finds less left to do. What a block writes must
   not depend on who did it: then results are the same for any number of threads. */
static void share(Work *work, const void *job, long blocks, int threads) {
    struct Shift shift = {work, job, blocks, 0, 0};
    if (threads > blocks) threads = blocks;
    if (team && threads > 1)
        team(join, &shift, threads, 0);
    else
        take_turns(&shift);
}
