/* packed_tiles.c: products of rows of bf16 with packed weights, 64 rows at a time, in AMX tiles.

       few      y = x Wᵀ + bias     x (t, i), W (o, i), y (t, o)
       back     dx = dy W           dy (t, o), dx (t, i)

   W is formed a piece at a time, which never leaves the nearest cache, to the bits of packed.c. Only the
   first takes int8 and fp8 as they are, since bf16 has their codes exactly, and scales what comes of a row.
   It sums up yᵀ: tiles of W, 16 rows and 32 columns, times tiles of xᵀ, which is laid out for it first.
   The second takes dy as it is, times tiles of two rows of W side by side. See low_rank.c for what a tile is. */

#define _GNU_SOURCE
#include "packed.h"
#include "share.h"
#include "tiles.h"
#include <stdlib.h>

typedef uint16_t bf16;
typedef bf16 Tile[SIDE][32];

enum { AT_ONCE = 64, PART = 64 }; /* rows of x; and columns, or rows of W in a block of the job */

struct Few {
    const struct Weights *w;
    const bf16 *x; /* tiles of xᵀ: rows 2k and 2k + 1 side by side, for 16 tokens */
    const bf16 *bias;
    bf16 *y;
    long tokens, i, o;
};

/* Columns i to i + 64 of a row that is wanted soon. */
INLINE void fetch(enum Kind kind, const struct Weights *w, long row, long i, long columns) {
    _mm_prefetch(w->codes + (row * columns + i) / (kind == NF4 ? 2 : 1), _MM_HINT_T0);
}

/* Columns i to i + 64 of a row, in two halves. */
INLINE void form(enum Kind kind, const struct Weights *w, long row, long i, long columns, float scale,
                 __m512i *to) {
    const uint8_t *codes = w->codes + (row * columns + i) / (kind == NF4 ? 2 : 1);
    const __m512 s = _mm512_set1_ps(scale), none = _mm512_setzero_ps();
    if (kind == NF4) {
        __m512 products = _mm512_mul_ps(_mm512_loadu_ps(w->levels), s);
        __m512i twice = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(products));
        to[0] = of_pairs(_mm_loadu_si128((const __m128i *)codes), twice);
        to[1] = of_pairs(_mm_loadu_si128((const __m128i *)codes + 1), twice);
        return;
    }
    for (int half = 0; half < 2; half++) {
        __m512 first = sixteen(kind, codes, 32 * half, none), second = sixteen(kind, codes, 32 * half + 16, none);
        to[half] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(second, s), _mm512_mul_ps(first, s));
    }
}

/* -- forward */

/* 64 columns from i on of 16 rows, in two tiles; what isn't there is the last row again. */
INLINE void form_rows(enum Kind kind, const struct Few *job, const float *scales, long row, long i, Tile *to) {
    const struct Weights *w = job->w;
    const long blocks = job->i / w->block, last = at_most(SIDE, job->o - row) - 1;
    for (long r = 0; r < SIDE; r++) {
        const long at = at_most(r, last);
        __m512i found[2];
        form(kind, w, row + at, i, job->i, kind == NF4 ? scales[at * blocks + i / w->block] : 1, found);
        fetch(kind, w, row + at + SIDE, i, job->i);
        _mm512_store_si512(to[0][r], found[0]);
        _mm512_store_si512(to[1][r], found[1]);
    }
}

/* y of 16 rows of W, and of 16 tokens for each of `groups`, from the sums of both. */
INLINE void finish(enum Kind kind, const struct Few *job, const float *scales, long row,
                   float sums[][SIDE][SIDE]) {
    const __m512i column = _mm512_slli_epi32(lanes(), 4);
    const __mmask16 which = first_of(job->o - row);
    __m512 scale = _mm512_set1_ps(1), bias = _mm512_setzero_ps();
    if (kind != NF4) scale = _mm512_maskz_loadu_ps(which, scales);
    if (job->bias) bias = widened(_mm256_maskz_loadu_epi16(which, job->bias + row));
    for (long t = 0; t < job->tokens; t++) {
        __m512 y = _mm512_i32gather_ps(column, &sums[t / SIDE][0][t % SIDE], 4);
        put(_mm512_fmadd_ps(y, scale, bias), 0, job->y + t * job->o + row, 0, which);
    }
}

/* Names of tiles are written into the code: 0 to 3 are sums, of as many groups of 16 tokens. */
#define EACH(call) call(0) call(1) call(2) call(3)
#define ZERO(n) _tile_zero(n);
#define SUM(n)                                           \
    if (groups > n) {                                    \
        _tile_loadd(5, x + n * job->i * SIDE, STRIDE);   \
        _tile_dpbf16ps(n, 4, 5);                         \
    }
#define KEEP(n) _tile_stored(n, sums[n], STRIDE);

INLINE void multiply(enum Kind kind, const struct Few *job, long row, int groups) {
    const long blocks = job->i / job->w->block;
    float scales[SIDE * blocks];
    read_scales(&job->w->scales, row * blocks, at_most(SIDE, job->o - row) * blocks, scales);
    Tile w[2][2] __attribute__((aligned(64)));
    float sums[4][SIDE][SIDE] __attribute__((aligned(64)));
    EACH(ZERO)
    for (long i = 0; i < job->i; i += 64) {
        Tile *formed = w[i / 64 % 2]; /* as the other two are multiplied */
        form_rows(kind, job, scales, row, i, formed);
        SETTLE();
        for (int half = 0; half < 2; half++) {
            const bf16 *x = job->x + (i + 32 * half) * SIDE;
            _tile_loadd(4, formed[half], STRIDE);
            EACH(SUM)
        }
    }
    EACH(KEEP)
    SETTLE();
    finish(kind, job, scales, row, sums);
}

INLINE void multiply_kind(enum Kind kind, const struct Few *job, long row) {
    switch ((job->tokens - 1) / SIDE) {
    case 0: multiply(kind, job, row, 1); break;
    case 1: multiply(kind, job, row, 2); break;
    case 2: multiply(kind, job, row, 3); break;
    case 3: multiply(kind, job, row, 4); break;
    }
}

static void multiply_piece(const void *arg, long piece) {
    const struct Few *job = arg;
    struct Tiles before;
    set_up(&before);
    for (long row = piece * PART; row < at_most((piece + 1) * PART, job->o); row += SIDE) {
        if (job->w->kind == NF4) multiply_kind(NF4, job, row);
        if (job->w->kind == INT8) multiply_kind(INT8, job, row);
        if (job->w->kind == FP8) multiply_kind(FP8, job, row);
    }
    put_back(&before);
}

static void lay_out(const struct Few *job, const bf16 *x, bf16 *to) {
    for (long t = 0; t < job->tokens; t++)
        for (long i = 0; i < job->i; i += 2)
            memcpy(to + (t / SIDE * job->i + i / 32 * 32) * SIDE + (i % 32 / 2 * SIDE + t % SIDE) * 2,
                   x + t * job->i + i, 4);
}

/* y (t, o) = x (t, i) Wᵀ + bias, all in bf16; 0 if done. i is a multiple of 64, and for NF4 of the block,
   which is one too. */
int few(const struct Weights *w, const bf16 *x, const bf16 *bias, bf16 *y, long tokens, long i, long o,
        long wide, int threads) {
    const size_t size = at_most(AT_ONCE, parts_of(tokens, SIDE) * SIDE) * i * sizeof *x;
    bf16 *laid = wide ? NULL : aligned_alloc(64, size);
    if (!laid) return 1;
    memset(laid, 0, size);
    for (long t = 0; t < tokens; t += AT_ONCE) {
        struct Few job = {w, laid, bias, y + t * o, at_most(AT_ONCE, tokens - t), i, o};
        lay_out(&job, x + t * i, laid);
        share(multiply_piece, &job, parts_of(o, PART), threads);
    }
    free(laid);
    return 0;
}

/* -- back */

enum { DEPTH = 128, WIDTH = 1024 }; /* rows of W at a time; and columns in a block of the job, at most */

struct Back {
    const struct Weights *w;
    const bf16 *dy; /* with rows of 0, to be a multiple of 16 */
    bf16 *dx;
    long tokens, i, o, width;
};

/* Rows of W and 64 columns as tiles of two rows side by side: of 8 columns, the first has four. */
INLINE void form_pairs(enum Kind kind, const struct Back *job, long row, long depth, long i,
                       const float *scales, long blocks, Tile (*to)[4]) {
    for (long r = 0; r < depth; r += 2) {
        const float *of = scales + r * blocks;
        __m512i first[2], second[2];
        form(kind, job->w, row + r, i, job->i, of[0], first);
        form(kind, job->w, row + r + 1, i, job->i, of[blocks], second);
        fetch(kind, job->w, row + r + DEPTH, i, job->i);
        fetch(kind, job->w, row + r + 1 + DEPTH, i, job->i);
        for (int half = 0; half < 2; half++) {
            Tile *pair = to[r / 32] + 2 * half;
            _mm512_store_si512(pair[0][r % 32 / 2], _mm512_unpacklo_epi16(first[half], second[half]));
            _mm512_store_si512(pair[1][r % 32 / 2], _mm512_unpackhi_epi16(first[half], second[half]));
        }
    }
}

#define LOAD(n) _tile_loadd(n, at + n * SIDE, WIDTH * sizeof *at);
#define STORE(n) _tile_stored(n, at + n * SIDE, WIDTH * sizeof *at);
#define TIMES(n)                           \
    _tile_loadd(5, w[o / 32][n], STRIDE);  \
    _tile_dpbf16ps(n, 4, 5);

/* What some rows of W add to the sums of 64 columns. */
INLINE void add(const struct Back *job, long row, long depth, Tile (*w)[4], float *sums) {
    for (long t = 0; t < job->tokens; t += SIDE) {
        float *at = sums + t * WIDTH;
        EACH(LOAD)
        for (long o = 0; o < depth; o += 32) {
            _tile_loadd(4, job->dy + t * job->o + row + o, job->o * sizeof *job->dy);
            EACH(TIMES)
        }
        EACH(STORE)
    }
}

/* 16 columns are the halves of two tiles, four by four. */
static void unmix(const struct Back *job, long begin, long end, float (*sums)[WIDTH]) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (long t = 0; t < job->tokens; t++)
        for (long i = begin; i < end; i += 32) {
            __m512 low = _mm512_load_ps(&sums[t][i - begin]), high = _mm512_load_ps(&sums[t][i - begin + 16]);
            bf16 *to = job->dx + t * job->i + i;
            put(_mm512_permutex2var_ps(low, first, high), 0, to, 0, 0xffff);
            put(_mm512_permutex2var_ps(low, second, high), 0, to, 16, 0xffff);
        }
}

INLINE void pass_back(enum Kind kind, const struct Back *job, long begin) {
    const long end = at_most(begin + job->width, job->i), block = job->w->block;
    const long first = begin / block, blocks = (end - 1) / block - first + 1;
    Tile w[DEPTH / 32][4] __attribute__((aligned(64)));
    float sums[AT_ONCE][WIDTH] __attribute__((aligned(64)));
    float scales[DEPTH * blocks];
    memset(sums, 0, sizeof sums);
    for (long row = 0; row < job->o; row += DEPTH) {
        const long depth = at_most(DEPTH, job->o - row);
        for (long r = 0; r < depth; r++)
            read_scales(&job->w->scales, (row + r) * (job->i / block) + first, blocks, scales + r * blocks);
        for (long i = begin; i < end; i += PART) {
            form_pairs(kind, job, row, depth, i, scales + i / block - first, blocks, w);
            SETTLE();
            add(job, row, depth, w, &sums[0][i - begin]);
        }
    }
    SETTLE();
    unmix(job, begin, end, sums);
}

static void back_piece(const void *arg, long piece) {
    const struct Back *job = arg;
    struct Tiles before;
    set_up(&before);
    if (job->w->kind == NF4) pass_back(NF4, job, piece * job->width);
    if (job->w->kind == INT8) pass_back(INT8, job, piece * job->width);
    if (job->w->kind == FP8) pass_back(FP8, job, piece * job->width);
    put_back(&before);
}

/* dx (t, i) = dy (t, o) W, all in bf16; 0 if done. i as above, and o is a multiple of 32. */
int back(const struct Weights *w, const bf16 *dy, bf16 *dx, long tokens, long i, long o, int threads) {
    bf16 *whole = aligned_alloc(64, AT_ONCE * o * sizeof *dy);
    if (!whole) return 1;
    const long width = at_most(WIDTH, parts_of(i / PART, threads) * PART);
    for (long t = 0; t < tokens; t += AT_ONCE) {
        struct Back job = {w, whole, dx + t * i, at_most(AT_ONCE, tokens - t), i, o, width};
        memcpy(whole, dy + t * o, job.tokens * o * sizeof *dy);
        memset(whole + job.tokens * o, 0, (AT_ONCE - job.tokens) * o * sizeof *dy);
        share(back_piece, &job, parts_of(i, width), threads);
    }
    free(whole);
    return 0;
}
