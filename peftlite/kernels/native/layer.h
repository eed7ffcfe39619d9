/* layer.h: all that a LoRA adds beside a linear map, in one call each way; and of many experts at once.
   By what includes it: its `Number`, `reduce` and `up`. */

enum { CHUNK = 64 }; /* tokens of a piece, where no sums are kept of each */

/* y += drop(h U) */
void expand(const struct Rows *y, long rank, const struct Factor *h, const struct Factor *u, Words *room,
            int threads) {
    up(y, NULL, rank, h, u, room, threads);
}

struct Forward {
    struct Rows x, y;
    const Number *bias;
    long rank;
    struct Factor a, u;
    float *h;
    Words *room;
};

/* h = s·drop(x) Aᵀ, contiguous, and y += h U, or y = bias + h U. */
void forward(const struct Forward *job, float scale, int threads) {
    const struct Factor h = {job->h, 1, job->rank};
    reduce(&job->x, job->rank, &job->a, job->h, scale, NULL, NULL, CHUNK, job->room, threads);
    up(&job->y, job->bias, job->rank, &h, &job->u, job->room, threads);
}

struct Backward {
    struct Rows dy, x, dx; /* of the last two, what isn't at all is NULL */
    long rank;
    struct Factor a, b, h, da, db;
    float *dh;
    long chunk; /* as in a pass */
    Words *room;
};

/* dh = s·dY B, contiguous, and dBᵀ = hᵀ dY; dA = dhᵀ drop(x) and dx += drop(dh A). */
void backward(const struct Backward *job, float scale, int threads) {
    const struct Factor dh = {job->dh, 1, job->rank};
    reduce(&job->dy, job->rank, &job->b, job->dh, scale, &job->h, &job->db, job->chunk, job->room, threads);
    if (job->x.at) reduce(&job->x, job->rank, NULL, NULL, 1, &dh, &job->da, job->chunk, job->room, threads);
    if (job->dx.at) up(&job->dx, NULL, job->rank, &dh, &job->a, job->room, threads);
}

/* -- of many at once, whose rows follow one another in h: of experts, and of deltas of each */

struct Stack {
    float *at;
    long by_expert, by_delta, by_rank, by_other;
};

struct Own {
    long expert, delta;
    long at, first, tokens; /* in which entry of x its rows begin, and which they are of h */
};

struct Experts {
    struct Rows rows;
    long leading, rank; /* how far apart entries are */
    const struct Own *each;
    struct Stack a, g;
    float *h;
    const float *scale; /* of each */
    struct Factor d;
    Words *room;
    long tiles; /* of a worker's room */
};

static struct Factor matrix_of(const struct Stack *of, const struct Own *own) {
    struct Factor found = {of->at, of->by_rank, of->by_other};
    if (found.at) found.at += own->expert * of->by_expert + own->delta * of->by_delta;
    return found;
}

static struct Rows rows_of(const struct Experts *job, const struct Own *own) {
    struct Rows found = job->rows;
    found.at = (Number *)found.at + own->at * job->leading;
    found.tokens = own->tokens;
    if (found.order) found.order += own->first;
    return found;
}

static void reduce_own(const void *arg, long k) {
    const struct Experts *job = arg;
    const struct Own *own = job->each + k;
    struct Rows x = rows_of(job, own);
    struct Factor a = matrix_of(&job->a, own), g = matrix_of(&job->g, own), d = job->d;
    if (d.at) d.at += own->first * d.by_other;
    reduce(&x, job->rank, a.at ? &a : NULL, a.at ? job->h + own->first * job->rank : NULL,
           a.at ? job->scale[k] : 1, d.at ? &d : NULL, &g, own->tokens, job->room + worker * job->tiles, 1);
}

void reduce_each(const struct Rows *x, long leading, long rank, const struct Stack *a, float *h,
                 const float *scale, const struct Factor *d, const struct Stack *g, const struct Own *each,
                 long experts, Words *room, long tiles, int threads) {
    struct Experts job = {.rows = *x, .leading = leading, .rank = rank, .each = each};
    if (a) job.a = *a;
    if (d) job.d = *d, job.g = *g;
    job.h = h, job.scale = scale, job.room = room, job.tiles = tiles;
    share(reduce_own, &job, experts, threads);
}

static void expand_own(const void *arg, long k) {
    const struct Experts *job = arg;
    const struct Own *own = job->each + k;
    struct Rows y = rows_of(job, own);
    struct Factor h = job->d, u = matrix_of(&job->a, own);
    h.at += own->first * h.by_other;
    expand(&y, job->rank, &h, &u, job->room + worker * job->tiles, 1);
}

void expand_each(const struct Rows *y, long leading, long rank, const struct Factor *h,
                 const struct Stack *u, const struct Own *each, long experts, Words *room, long tiles,
                 int threads) {
    struct Experts job = {.rows = *y, .leading = leading, .rank = rank, .each = each};
    job.a = *u, job.d = *h, job.room = room, job.tiles = tiles;
    share(expand_own, &job, experts, threads);
}
