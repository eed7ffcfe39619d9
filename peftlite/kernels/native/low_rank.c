/* low_rank.c: the products of a LoRA beside a linear map in bf16, with factors in fp32, in AMX tiles.

       down     h = s·drop(x) Aᵀ     x (t, n), A (r, n), h (t, r)
       across   g = dᵀ drop(x)       d (t, r), g (r, n)
       up       y += drop(h U)       h (t, r), U (r, n), y (t, n)

   A product of tiles takes bf16 and sums up in fp32. x and y are in bf16 anyway; what is in fp32 is
   split into bf16 numbers that add up to it: three for h and g, which are as exact then as products in
   fp32, and two for y, which is rounded to bf16 once. Down and across read x once for both.

   A tile is 16 rows of 64 bytes. C += A B for A of 16 x 32 and for B of 32 x 16, which lies in rows of
   16 pairs: rows 2k and 2k + 1 of B, side by side. A tile of x, 16 tokens and 32 columns, is such an A.
   Taken for such a B, its pairs are two columns of one token. So g's even columns are what dᵀ gives
   that has a 0 after each of its numbers, its odd ones what it gives with a 0 before each; and x is
   never turned. */

#define _GNU_SOURCE
#include <stdint.h>

typedef uint16_t Number; /* in bf16 */

#include "rows.h"
#include "share.h"
#include "tiles.h"

typedef Words Tile; /* pairs of bf16, or numbers in fp32 */

enum {
    COLUMNS = 32,   /* of x in a tile */
    BLOCK = 32,
    ROWS = 32,      /* tokens at a time up */
    PARTS = 3,      /* of what is split */
    GROUPS = 4,     /* of 16 ranks, at most */
};

/* -- numbers */

/* The nearest in bf16 as the low halves of words, and what is left. */
INLINE __m512i taken(__m512 *v) {
    __m256i part = (__m256i)_mm512_cvtneps_pbh(*v);
    *v = _mm512_sub_ps(*v, widened(part));
    return _mm512_cvtepu16_epi32(part);
}

INLINE __m512i paired(__m512i first, __m512i second) {
    return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

/* -- down and across */

struct Pass {
    struct Rows x;
    long rank;
    const Tile *a;      /* A's parts, or NULL: [group of 16 ranks][column][part] */
    float *h;
    float scale;
    struct Factor d;    /* or NULL */
    float *sums;        /* g's, of the tokens of a piece: [piece][group][column][even, odd][16][16] */
    struct Factor g;
    long groups, columns, chunk; /* of ranks; of 32; tokens of a piece */
};

/* 32 columns of 16 ranks in parts, of an A whose ranks are far apart. */
static void split_rows(const float *at, long by_rank, long ranks, Tile *to) {
    _Alignas(64) Tile parts[PARTS];
    for (long r = 0; r < SIDE; r++) {
        __m512 low = picked(at + r * by_rank, 1, r < ranks ? SIDE : 0);
        __m512 high = picked(at + r * by_rank + SIDE, 1, r < ranks ? SIDE : 0);
        for (int p = 0; p < PARTS; p++) {
            const __m512i part = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            _mm512_store_si512(parts[p][r], part);
            low = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(part)));
            high = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(part, 1)));
        }
    }
    for (int p = 0; p < PARTS; p++) turned(parts[p], to[p]);
}

static void split_down(const struct Factor *a, long rank, long groups, long columns, Tile *to) {
    for (long group = 0; group < groups; group++)
        for (long c = 0; c < columns; c++, to += PARTS) {
            const float *at = a->at + group * SIDE * a->by_rank + c * COLUMNS * a->by_other;
            const long ranks = rank - group * SIDE;
            if (a->by_other == 1) {
                split_rows(at, a->by_rank, ranks, to);
                continue;
            }
            for (long k = 0; k < SIDE; k++, at += 2 * a->by_other) {
                __m512 even = picked(at, a->by_rank, ranks);
                __m512 odd = picked(at + a->by_other, a->by_rank, ranks);
                for (int p = 0; p < PARTS; p++) {
                    __m512i first = taken(&even), second = taken(&odd);
                    _mm512_store_si512(to[p][k], paired(first, second));
                }
            }
        }
}

/* dᵀ of some tokens in parts, with zeros after its numbers, and before them. */
static void split_across(const struct Pass *job, long first, long tokens, long group,
                         Tile to[][PARTS][2]) {
    for (long i = 0; i < BLOCK / SIDE; i++)
        for (long k = 0; k < SIDE; k++) {
            const long r = group * SIDE + k, token = first + i * SIDE;
            const float *at = job->d.at + token * job->d.by_other + r * job->d.by_rank;
            long count = r < job->rank ? tokens - i * SIDE : 0;
            __m512 v = picked(at, job->d.by_other, count < 0 ? 0 : count);
            for (int p = 0; p < PARTS; p++) {
                __m512i part = taken(&v);
                _mm512_store_si512(to[i][p][0][k], part);
                _mm512_store_si512(to[i][p][1][k], _mm512_slli_epi32(part, 16));
            }
        }
}

/* A tile of x with its mask's zeros, and zeros for the tokens that there aren't. */
static void stage(const struct Rows *x, long first, long count, long column, __m512i pairs,
                  Tile to) {
    for (long i = 0; i < SIDE; i++) {
        __m512i v = _mm512_setzero_si512();
        if (i < count) {
            v = _mm512_loadu_si512(row_of(x, first + i) + column);
            if (x->threshold) v = _mm512_maskz_mov_epi16(kept(x, of_row(x, first + i), pairs), v);
        }
        _mm512_store_si512(to[i], v);
    }
}

#define DOWN(i) \
    if (i < tiles) { \
        _tile_loadd(6, x[i], stride); \
        _tile_dpbf16ps(i, 6, 7); \
    }

#define ACROSS(i) \
    if (i < tiles) _tile_loadd(6, x[i], stride); \
    for (int p = 0; i < tiles && p < PARTS; p++) { \
        _tile_loadd(7, d[i][p][0], STRIDE); \
        _tile_dpbf16ps(4, 7, 6); \
        _tile_loadd(7, d[i][p][1], STRIDE); \
        _tile_dpbf16ps(5, 7, 6); \
    }

/* Up to 64 tokens, for a group of 16 ranks. */
static void block(const struct Pass *job, long first, long tokens, long group, float *sums,
                  int fresh) {
    _Alignas(64) Tile d[BLOCK / SIDE][PARTS][2], staged[BLOCK / SIDE], h[BLOCK / SIDE];
    const struct Rows *rows = &job->x;
    const int direct = tokens % SIDE == 0 && !rows->threshold && !rows->order;
    const long tiles = parts_of(tokens, SIDE);
    const void *x[BLOCK / SIDE];
    const long stride = direct ? rows->stride * 2 : STRIDE;
    if (job->d.at) split_across(job, first, tokens, group, d);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long c = 0; c < job->columns; c++) {
        __m512i pairs = rows->threshold ? of_pairs(rows, c * COLUMNS) : _mm512_setzero_si512();
        for (long i = 0; i < tiles; i++) {
            long token = first + i * SIDE;
            x[i] = direct ? (void *)((Number *)rows->at + token * rows->stride + c * COLUMNS) : staged[i];
            if (!direct) stage(rows, token, tokens - i * SIDE, c * COLUMNS, pairs, staged[i]);
        }
        SETTLE();
        if (job->a) {
            const Tile *a = job->a + (group * job->columns + c) * PARTS;
            for (int p = 0; p < PARTS; p++) {
                _tile_loadd(7, a[p], STRIDE);
                DOWN(0) DOWN(1)
            }
        }
        if (job->d.at) {
            float *even = sums + c * 512, *odd = even + 256;
            if (fresh) {
                _tile_zero(4); _tile_zero(5);
            } else {
                _tile_loadd(4, even, STRIDE);
                _tile_loadd(5, odd, STRIDE);
            }
            ACROSS(0) ACROSS(1)
            _tile_stored(4, even, STRIDE);
            _tile_stored(5, odd, STRIDE);
        }
    }
    if (!job->a) return;
    _tile_stored(0, h[0], STRIDE); _tile_stored(1, h[1], STRIDE);
    
    SETTLE();
    for (long i = 0; i < tokens; i++) {
        __m512 v = _mm512_mul_ps(_mm512_load_ps(h[i / SIDE][i % SIDE]), _mm512_set1_ps(job->scale));
        float *to = job->h + (first + i) * job->rank + group * SIDE;
        _mm512_mask_storeu_ps(to, first_of(job->rank - group * SIDE), v);
    }
}

static void pass_piece(const void *arg, long piece) {
    const struct Pass *job = arg;
    const long start = piece * job->chunk, end = at_most(start + job->chunk, job->x.tokens);
    struct Tiles before;
    set_up(&before);
    for (long first = start; first < end; first += BLOCK)
        for (long group = 0; group < job->groups; group++) {
            float *sums = job->sums + (piece * job->groups + group) * job->columns * 512;
            block(job, first, at_most(BLOCK, end - first), group, sums, first == start);
        }
    put_back(&before);
}

/* g of 32 columns, of the sums of all pieces. */
static void add_up(const void *arg, long c) {
    const struct Pass *job = arg;
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (long r = 0; r < job->rank; r++) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (long piece = 0; piece * job->chunk < job->x.tokens; piece++) {
            long at = ((piece * job->groups + r / SIDE) * job->columns + c) * 512 + r % SIDE * SIDE;
            even = _mm512_add_ps(even, _mm512_load_ps(job->sums + at));
            odd = _mm512_add_ps(odd, _mm512_load_ps(job->sums + at + 256));
        }
        float *to = job->g.at + r * job->g.by_rank + c * COLUMNS * job->g.by_other;
        put(to, job->g.by_other, _mm512_permutex2var_ps(even, low, odd));
        put(to + SIDE * job->g.by_other, job->g.by_other, _mm512_permutex2var_ps(even, high, odd));
    }
}

/* h, contiguous, where A is given, and g where d is. In the room are A's parts, then g's sums of each
   chunk of tokens. */
void reduce(const struct Rows *x, long rank, const struct Factor *a, float *h, float scale,
            const struct Factor *d, const struct Factor *g, long chunk, Words *room, int threads) {
    const long groups = parts_of(rank, SIDE), columns = x->columns / COLUMNS;
    struct Pass job = {*x, rank, NULL, h, scale, {0}, NULL, {0}, groups, columns, chunk};
    if (a) {
        split_down(a, rank, groups, columns, room);
        job.a = room;
        room += groups * columns * PARTS;
    }
    if (d) {
        job.d = *d;
        job.g = *g;
        job.sums = (float *)room;
    }
    share(pass_piece, &job, parts_of(x->tokens, chunk), threads);
    if (d) share(add_up, &job, columns, threads);
}

/* -- up */

struct Up {
    struct Rows y;
    const Number *bias; /* what each row of y is before; or NULL: what it is */
    struct Factor h;
    long rank, groups;
    const Tile *u; /* U's two parts, the first above the second: [16 columns][group] */
};

static void split_up(const struct Factor *u, long rank, long groups, long columns, Tile *to) {
    for (long c = 0; c < columns; c += SIDE)
        for (long group = 0; group < groups; group++, to++)
            for (long k = 0; k < SIDE / 2; k++) {
                long r = group * SIDE + 2 * k;
                const float *at = u->at + r * u->by_rank + c * u->by_other;
                __m512 even = picked(at, u->by_other, r < rank ? SIDE : 0);
                __m512 odd = picked(at + u->by_rank, u->by_other, r + 1 < rank ? SIDE : 0);
                __m512i first = taken(&even), second = taken(&odd);
                _mm512_store_si512((*to)[k], paired(first, second));
                first = taken(&even), second = taken(&odd);
                _mm512_store_si512((*to)[k + SIDE / 2], paired(first, second));
            }
}

/* h of 16 tokens: its first part twice, and its second part once, for U's first. */
static void split_h(const struct Up *job, long first, long count, long group, Tile to[2]) {
    for (long i = 0; i < SIDE; i++) {
        const float *at = job->h.at + (first + i) * job->h.by_other;
        at += group * SIDE * job->h.by_rank;
        __m512 v = picked(at, job->h.by_rank, i < count ? job->rank - group * SIDE : 0);
        __m256i high = _mm512_cvtepi32_epi16(taken(&v)), low = _mm512_cvtepi32_epi16(taken(&v));
        _mm512_store_si512(to[0][i], _mm512_broadcast_i64x4(high));
        _mm512_store_si512(to[1][i], _mm512_zextsi256_si512(low));
    }
}

/* 32 columns of a row of y, of what it is before. */
INLINE void add_row(const struct Rows *y, long row, long column, __m512i pairs, __m512i before,
                    const float *low, const float *high) {
    const __mmask32 keep = y->threshold ? kept(y, of_row(y, row), pairs) : ~0u;
    __m512 first = widened(_mm512_castsi512_si256(before));
    __m512 second = widened(_mm512_extracti64x4_epi64(before, 1));
    first = _mm512_mask_add_ps(first, keep, first, _mm512_load_ps(low));
    second = _mm512_mask_add_ps(second, keep >> 16, second, _mm512_load_ps(high));
    _mm512_storeu_si512(row_of(y, row) + column, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

#define UP(to, i, part) \
    _tile_loadd(6, h[i][group][part], STRIDE); \
    _tile_dpbf16ps(to, 6, 7);

static void up_piece(const void *arg, long piece) {
    const struct Up *job = arg;
    const long first = piece * ROWS, count = at_most(ROWS, job->y.tokens - first);
    _Alignas(64) Tile h[2][GROUPS][2], sums[4];
    struct Tiles before;
    for (long i = 0; i < 2; i++)
        for (long group = 0; group < job->groups; group++)
            split_h(job, first + i * SIDE, count - i * SIDE, group, h[i][group]);
    set_up(&before);
    for (long column = 0; column < job->y.columns; column += COLUMNS) {
        const Tile *u = job->u + column / SIDE * job->groups;
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (long group = 0; group < job->groups; group++) {
            _tile_loadd(7, u[group], STRIDE);
            UP(0, 0, 0) UP(1, 1, 0) UP(0, 0, 1) UP(1, 1, 1)
            _tile_loadd(7, u[job->groups + group], STRIDE);
            UP(2, 0, 0) UP(3, 1, 0) UP(2, 0, 1) UP(3, 1, 1)
        }
        _tile_stored(0, sums[0], STRIDE); _tile_stored(1, sums[1], STRIDE);
        _tile_stored(2, sums[2], STRIDE); _tile_stored(3, sums[3], STRIDE);
        SETTLE();
        __m512i pairs = job->y.threshold ? of_pairs(&job->y, column) : _mm512_setzero_si512();
        for (long i = 0; i < count; i++) {
            const float *low = (float *)sums[i / SIDE][i % SIDE], *high = low + 2 * SIDE * SIDE;
            const Number *from = job->bias ? job->bias : row_of(&job->y, first + i);
            add_row(&job->y, first + i, column, pairs, _mm512_loadu_si512(from + column), low, high);
        }
    }
    put_back(&before);
}

/* y += drop(h U), or y = bias + drop(h U). In the room are U's parts. */
static void up(const struct Rows *y, const Number *bias, long rank, const struct Factor *h,
               const struct Factor *u, Words *room, int threads) {
    const long groups = parts_of(rank, SIDE);
    split_up(u, rank, groups, y->columns, room);
    struct Up job = {*y, bias, *h, rank, groups, room};
    share(up_piece, &job, parts_of(y->tokens, ROWS), threads);
}

#include "layer.h"
