/* skinny.h: the products of low_rank.c by AVX-512, for rows of any `Number`; and a bank's.

       down     h = s·drop(x) Aᵀ     x (t, n), A (r, n), h (t, r)
       across   g = dᵀ drop(x)       d (t, r), g (r, n)
       up       y += drop(h U)       h (t, r), U (r, n), y (t, n)
       mixed    y += s_k·(x A_kᵀ) B_kᵀ, with a k for each row of a batch

   A vector is 16 ranks of one column of A, or 16 columns of a row: what is multiplied with it is one number.
   16 tokens of 32 columns are widened first, with their mask's zeros, so that all of their numbers are
   a fixed way apart. Sums are of 32 columns, or of 16 tokens, and these are added up: as exact as BLAS.

   What includes it has rows.h before it, and says how 16 numbers are read, `got`, and written, `set`. */

#include "share.h"

enum {
    SIDE = 16,      /* tokens, or ranks, at a time */
    FEW = 8,        /* tokens at a time up, so that y's lines stay in the nearest cache */
    COLUMNS = 32,   /* at a time */
    RANKS = 64,     /* at most */
};

typedef float Square[SIDE][SIDE];
typedef float Tile[SIDE][COLUMNS];

#define EACH(i, n) _Pragma("GCC unroll 16") for (long i = 0; i < n; i++)

/* The ranks of a group, column by column. */
static void pack_down(const struct Factor *a, long rank, long group, long columns, float *to) {
    const float *at = a->at + group * SIDE * a->by_rank;
    const long count = at_most(rank - group * SIDE, SIDE);
    if (a->by_other == 1)
        for (long c = 0; c < columns; c += SIDE) {
            _Alignas(64) Square rows;
            EACH(r, SIDE) _mm512_store_ps(rows[r], picked(at + r * a->by_rank + c, 1, r < count ? SIDE : 0));
            turned((void *)rows, (void *)(to + c * SIDE));
        }
    else
        for (long c = 0; c < columns; c++)
            _mm512_store_ps(to + c * SIDE, picked(at + c * a->by_other, a->by_rank, count));
}

/* 16 ranks of 16 tokens, and zeros for those that there aren't. */
static void pack(const struct Factor *d, long rank, long group, long first, long count, Square to) {
    EACH(t, SIDE) {
        const float *at = d->at + (first + t) * d->by_other + group * SIDE * d->by_rank;
        _mm512_store_ps(to[t], picked(at, d->by_rank, t < count ? at_most(rank - group * SIDE, SIDE) : 0));
    }
}

/* 32 columns of 16 tokens with their mask's zeros, and zeros for the tokens that there aren't. */
INLINE void stage(const struct Rows *x, long first, long count, long column, Tile to) {
    const __m512i pairs = x->threshold ? of_pairs(x, column) : _mm512_setzero_si512();
    for (long t = 0; t < SIDE; t++) {
        __m512 low = _mm512_setzero_ps(), high = low;
        if (t < count) {
            const Number *at = row_of(x, first + t) + column;
            const __mmask32 keep = x->threshold ? kept(x, of_row(x, first + t), pairs) : ~0u;
            // the next ones, which are asked for while these are multiplied
            _mm_prefetch(at + COLUMNS, _MM_HINT_T0), _mm_prefetch(at + COLUMNS + SIDE, _MM_HINT_T0);
            low = _mm512_maskz_mov_ps(keep, got(at)), high = _mm512_maskz_mov_ps(keep >> SIDE, got(at + SIDE));
        }
        _mm512_store_ps(to[t], low);
        _mm512_store_ps(to[t] + SIDE, high);
    }
}

/* h += x Aᵀ */
INLINE void down(const Tile x, const float *a, __m512 h[SIDE]) {
    __m512 sum[SIDE];
    EACH(t, SIDE) sum[t] = _mm512_setzero_ps();
    for (long c = 0; c < COLUMNS; c++) {
        const __m512 v = _mm512_load_ps(a + c * SIDE);
        EACH(t, SIDE) sum[t] = _mm512_fmadd_ps(_mm512_set1_ps(x[t][c]), v, sum[t]);
    }
    EACH(t, SIDE) h[t] = _mm512_add_ps(h[t], sum[t]);
}

/* g = dᵀ x, or more by that */
INLINE void across(const Tile x, const Square d, Tile g, int fresh) {
    for (long half = 0; half < COLUMNS; half += SIDE) {
        __m512 sum[SIDE];
        EACH(r, SIDE) sum[r] = _mm512_setzero_ps();
        for (long t = 0; t < SIDE; t++) {
            const __m512 v = _mm512_load_ps(x[t] + half);
            EACH(r, SIDE) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(d[t][r]), v, sum[r]);
        }
        EACH(r, SIDE) {
            if (!fresh) sum[r] = _mm512_add_ps(sum[r], _mm512_load_ps(g[r] + half));
            _mm512_store_ps(g[r] + half, sum[r]);
        }
    }
}

/* h of 16 tokens and a group of ranks, which lie column by column. */
static void low(const struct Rows *x, long first, long count, const float *a, __m512 h[SIDE]) {
    _Alignas(64) Tile staged;
    EACH(t, SIDE) h[t] = _mm512_setzero_ps();
    for (long c = 0; c < x->columns; c += COLUMNS) {
        stage(x, first, count, c, staged);
        down(staged, a + c * SIDE, h);
    }
}

/* -- down and across */

struct Pass {
    struct Rows x;
    long rank;
    const float *a;     /* A column by column, or NULL: [group of 16 ranks][column][16] */
    float *h;
    float scale;
    struct Factor d;    /* or NULL */
    Tile *sums;         /* g's, of the tokens of a piece: [piece][group][32 columns] */
    struct Factor g;
    long groups, tiles, chunk; /* of ranks; of columns; tokens of a piece */
};

static void block(const struct Pass *job, long first, long count, long group, Tile *sums, int fresh) {
    _Alignas(64) Tile staged;
    _Alignas(64) Square d;
    __m512 h[SIDE];
    EACH(t, SIDE) h[t] = _mm512_setzero_ps();
    if (job->d.at) pack(&job->d, job->rank, group, first, count, d);
    for (long c = 0; c < job->tiles; c++) {
        stage(&job->x, first, count, c * COLUMNS, staged);
        if (job->a) down(staged, job->a + (group * job->tiles + c) * COLUMNS * SIDE, h);
        if (job->d.at) across(staged, d, sums[c], fresh);
    }
    if (!job->a) return;
    for (long t = 0; t < count; t++) {
        float *to = job->h + (first + t) * job->rank + group * SIDE;
        const __m512 v = _mm512_mul_ps(h[t], _mm512_set1_ps(job->scale));
        _mm512_mask_storeu_ps(to, first_of(job->rank - group * SIDE), v);
    }
}

static void pass_piece(const void *arg, long piece) {
    const struct Pass *job = arg;
    const long start = piece * job->chunk, end = at_most(start + job->chunk, job->x.tokens);
    for (long first = start; first < end; first += SIDE)
        for (long group = 0; group < job->groups; group++) {
            Tile *sums = job->sums + (piece * job->groups + group) * job->tiles;
            block(job, first, at_most(SIDE, end - first), group, sums, first == start);
        }
}

/* g of 32 columns, of the sums of all pieces. */
static void add_up(const void *arg, long c) {
    const struct Pass *job = arg;
    for (long r = 0; r < job->rank; r++) {
        __m512 low = _mm512_setzero_ps(), high = low;
        for (long piece = 0; piece * job->chunk < job->x.tokens; piece++) {
            const float *at = job->sums[(piece * job->groups + r / SIDE) * job->tiles + c][r % SIDE];
            low = _mm512_add_ps(low, _mm512_load_ps(at));
            high = _mm512_add_ps(high, _mm512_load_ps(at + SIDE));
        }
        float *to = job->g.at + r * job->g.by_rank + c * COLUMNS * job->g.by_other;
        put(to, job->g.by_other, low);
        put(to + SIDE * job->g.by_other, job->g.by_other, high);
    }
}

/* h, contiguous, where A is given, and g where d is. In the room is A, then g's sums of each chunk of
   tokens. */
void reduce(const struct Rows *x, long rank, const struct Factor *a, float *h, float scale,
            const struct Factor *d, const struct Factor *g, long chunk, Words *room, int threads) {
    const long groups = parts_of(rank, SIDE), tiles = x->columns / COLUMNS;
    struct Pass job = {*x, rank, NULL, h, scale, {0}, NULL, {0}, groups, tiles, chunk};
    float *to = (float *)room;
    if (a) {
        job.a = to;
        for (long group = 0; group < groups; group++, to += x->columns * SIDE)
            pack_down(a, rank, group, x->columns, to);
    }
    if (d) {
        job.d = *d;
        job.g = *g;
        job.sums = (Tile *)to;
    }
    share(pass_piece, &job, parts_of(x->tokens, chunk), threads);
    if (d) share(add_up, &job, tiles, threads);
}

/* -- up */

/* U, whose rows of 32 columns are a way apart. */
struct Above {
    const float *at;
    long by_tile, by_rank;
};

/* y of 8 tokens, or of as many as there are, for an h that has as many ranks as U. */
INLINE void add_rows(const struct Rows *y, const Number *bias, long first, long count,
                     float h[SIDE][RANKS], long rank, const struct Above *u) {
    for (long column = 0; column < y->columns; column += COLUMNS) {
        const float *at = u->at + column / COLUMNS * u->by_tile;
        const __m512i pairs = y->threshold ? of_pairs(y, column) : _mm512_setzero_si512();
        __m512 low[FEW], high[FEW];
        EACH(t, FEW) low[t] = high[t] = _mm512_setzero_ps();
        for (long r = 0; r < rank; r++, at += u->by_rank) {
            const __m512 left = _mm512_loadu_ps(at), right = _mm512_loadu_ps(at + SIDE);
            EACH(t, FEW) {
                const __m512 v = _mm512_set1_ps(h[t][r]);
                low[t] = _mm512_fmadd_ps(v, left, low[t]);
                high[t] = _mm512_fmadd_ps(v, right, high[t]);
            }
        }
        EACH(t, FEW) {
            if (t >= count) break;
            Number *to = row_of(y, first + t) + column;
            const Number *from = bias ? bias + column : to;
            const __mmask32 keep = y->threshold ? kept(y, of_row(y, first + t), pairs) : ~0u;
            const __m512 a = got(from), b = got(from + SIDE);
            set(to, _mm512_mask_add_ps(a, keep, a, low[t]));
            set(to + SIDE, _mm512_mask_add_ps(b, keep >> SIDE, b, high[t]));
        }
    }
}

struct Up {
    struct Rows y;
    const Number *bias; /* what each row of y is before; or NULL: what it is */
    struct Factor h;
    long rank;
    struct Above u;
};

static void up_piece(const void *arg, long piece) {
    const struct Up *job = arg;
    const long first = piece * SIDE, count = at_most(SIDE, job->y.tokens - first);
    _Alignas(64) float h[SIDE][RANKS];
    for (long t = 0; t < SIDE; t++)
        for (long r = 0; r < job->rank; r += SIDE) {
            const float *at = job->h.at + (first + t) * job->h.by_other + r * job->h.by_rank;
            _mm512_store_ps(h[t] + r, picked(at, job->h.by_rank, t < count ? at_most(job->rank - r, SIDE) : 0));
        }
    for (long t = 0; t < count; t += FEW)
        add_rows(&job->y, job->bias, first + t, count - t, h + t, job->rank, &job->u);
}

/* y += drop(h U), or y = bias + drop(h U). In the room is U, where its columns don't lie side by side. */
static void up(const struct Rows *y, const Number *bias, long rank, const struct Factor *h,
               const struct Factor *u, Words *room, int threads) {
    struct Up job = {*y, bias, *h, rank, {u->at, COLUMNS, u->by_rank}};
    if (u->by_other != 1) {
        float *to = (float *)room;
        job.u = (struct Above){to, rank * COLUMNS, COLUMNS};
        for (long c = 0; c < y->columns; c += SIDE)
            for (long r = 0; r < rank; r++) {
                const float *at = u->at + c * u->by_other + r * u->by_rank;
                float *there = to + (c / COLUMNS * rank + r) * COLUMNS + c % COLUMNS;
                _mm512_store_ps(there, picked(at, u->by_other, SIDE));
            }
    }
    share(up_piece, &job, parts_of(y->tokens, SIDE), threads);
}

#include "layer.h"

/* -- rows with factors of their own */

struct Mixed {
    struct Rows x, y;           /* of all rows' tokens */
    long rows, tokens;          /* of the batch; of a row */
    const long *slots, *order;  /* those there are; which of them a row has, or -1 */
    struct Factor a, b;         /* of the first slot */
    const float *scale;
    const int *rank;
    long a_slots, b_slots, scale_slots, rank_slots; /* how far apart the slots' are */
    float *room;                /* A's column by column: [slot that there is][group][column][16] */
    long groups;
};

static void pack_slot(const void *arg, long k) {
    const struct Mixed *job = arg;
    const long slot = job->slots[k], size = job->x.columns * SIDE;
    const long rank = job->rank[slot * job->rank_slots];
    struct Factor a = job->a;
    a.at += slot * job->a_slots;
    for (long group = 0; group * SIDE < rank; group++)
        pack_down(&a, rank, group, job->x.columns, job->room + (k * job->groups + group) * size);
}

static void mix_row(const void *arg, long row) {
    const struct Mixed *job = arg;
    const long k = job->order[row], start = row * job->tokens, size = job->x.columns * SIDE;
    if (k < 0) return;
    const long slot = job->slots[k], rank = job->rank[slot * job->rank_slots];
    const __m512 scale = _mm512_set1_ps(job->scale[slot * job->scale_slots]);
    const struct Above u = {job->b.at + slot * job->b_slots, COLUMNS, job->b.by_rank};
    _Alignas(64) float h[SIDE][RANKS];
    __m512 sum[SIDE];
    for (long first = 0; first < job->tokens; first += SIDE) {
        const long count = at_most(SIDE, job->tokens - first);
        for (long group = 0; group * SIDE < rank; group++) {
            low(&job->x, start + first, count, job->room + (k * job->groups + group) * size, sum);
            for (long t = 0; t < SIDE; t++)
                _mm512_store_ps(h[t] + group * SIDE, _mm512_mul_ps(sum[t], scale));
        }
        for (long t = 0; t < count; t += FEW)
            add_rows(&job->y, NULL, start + first + t, count - t, h + t, rank, &u);
    }
}

void mix(const struct Mixed *job, long slots, int threads) {
    share(pack_slot, job, slots, threads);
    share(mix_row, job, job->rows, threads);
}
