/* packed.c: weights of four and eight bits, formed at the speed of a copy, or multiplied as they are.

   W = s q, where q is one of 16 levels (NF4), a whole number of 8 bits, or a float of 4 + 3 bits, and
   s is the scale of a block of weights that follow one another: NF4's block, or a whole row. Numbers
   are the same to the last bit as those of quant/nf4.py and quant/rows.py: one product in fp32, which
   is rounded once. AVX-512 F, BW and VL. */

#include "packed.h"
#include "share.h"
#include <stdlib.h>

enum { PIECE = 1 << 15, MOST = 512 }; /* weights in a block of a job, at least; and scales, at most */

struct Form {
    const struct Weights *w;
    long wide, at_once; /* blocks of weights in a block of the job */
    void *out;
};

/* Numbers i to end of NF4 in bf16, of a block, whose 16 products are rounded once. */
INLINE void look_up(const struct Form *job, long i, long end, __m512 products) {
    const __m512i twice = _mm512_broadcast_i64x4(rounded(products));
    for (; i < end; i += 32) {
        const __mmask16 pairs = first_of((end - i + 1) / 2);
        const __mmask32 which = end - i < 32 ? (1u << (end - i)) - 1 : ~0u;
        __m512i found = of_pairs(_mm_maskz_loadu_epi8(pairs, job->w->codes + i / 2), twice);
        _mm512_mask_storeu_epi16((uint16_t *)job->out + i, which, found);
    }
}

/* 16 codes from number i on, where fewer are left to read. */
static __m512 fewer(enum Kind kind, const uint8_t *codes, long i, long count, __m512 levels) {
    uint8_t left[16] = {0};
    memcpy(left, codes + (kind == NF4 ? i / 2 : i), kind == NF4 ? (count + 1) / 2 : count);
    return sixteen(kind, left, 0, levels);
}

INLINE void form(enum Kind kind, const struct Form *job, long piece) {
    const struct Weights *w = job->w;
    const __m512 levels = kind == NF4 ? _mm512_loadu_ps(w->levels) : _mm512_setzero_ps();
    const long first = piece * job->at_once, blocks = parts_of(w->numbers, w->block);
    const long stop = at_most(first + job->at_once, blocks);
    float scales[MOST];
    read_scales(&w->scales, first, stop - first, scales);
    for (long b = first; b < stop; b++) {
        const __m512 s = _mm512_set1_ps(scales[b - first]);
        long i = b * w->block, end = at_most(i + w->block, w->numbers);
        if (kind == NF4 && !job->wide) {
            look_up(job, i, end, _mm512_mul_ps(levels, s));
            continue;
        }
        for (; i + 16 <= end; i += 16)
            put(_mm512_mul_ps(sixteen(kind, w->codes, i, levels), s), job->wide, job->out, i, 0xffff);
        if (i < end) {
            __m512 last = fewer(kind, w->codes, i, end - i, levels);
            put(_mm512_mul_ps(last, s), job->wide, job->out, i, first_of(end - i));
        }
    }
}

static void form_piece(const void *arg, long piece) {
    const struct Form *job = arg;
    if (job->w->kind == NF4) form(NF4, job, piece);
    if (job->w->kind == INT8) form(INT8, job, piece);
    if (job->w->kind == FP8) form(FP8, job, piece);
}

/* W in fp32 where `wide`, else in bf16. */
void unpack(const struct Weights *w, long wide, void *out, int threads) {
    long at_once = w->block < PIECE ? at_most(PIECE / w->block, MOST) : 1;
    struct Form job = {w, wide, at_once, out};
    share(form_piece, &job, parts_of(w->numbers, w->block * at_once), threads);
}

/* The product with a few rows of x, before which W isn't formed: four rows of W with four of x, or
   fewer, at a time. Memory is what takes time, and what the CPU fetches by itself ends with a page:
   so the next rows of W are fetched as these are multiplied.

   NF4 is read 128 weights at a time, as 16 words of 8 codes: a shift brings one of each word to where
   a permutation of the levels looks for it. So x is laid out in that order first. */

enum { WORDS = 128, TILE = 4 };

struct Few {
    const struct Weights *w;
    const float *x; /* with rows of 0, to be a multiple of TILE */
    long tokens, i, o, wide, at_once; /* rows of W in a block of the job */
    const void *bias;
    void *y;
};

/* Sums of products of n rows of W with m of x; each in 16 parts that are yet to be added up. */
INLINE void dot_nf4(const struct Few *job, const float *scales, long row, int n, const float *x, int m,
                    __m512 *sum) {
    const struct Weights *w = job->w;
    const __m512 levels = _mm512_loadu_ps(w->levels);
    const long shift = __builtin_ctzl(w->block), blocks = job->i >> shift;
    for (long i = 0; i < job->i; i += WORDS) {
        __m512i words[TILE];
        __m512 scale[TILE];
        for (int r = 0; r < n; r++) {
            const uint8_t *codes = w->codes + ((row + r) * job->i + i) / 2;
            const float *of = scales + r * blocks;
            words[r] = _mm512_loadu_si512(codes);
            _mm_prefetch(codes + n * job->i / 2, _MM_HINT_T0);
            scale[r] = _mm512_set1_ps(of[i >> shift]);
            scale[r] = _mm512_mask_broadcastss_ps(scale[r], 0xff00, _mm_set_ss(of[(i + 64) >> shift]));
        }
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            __m512 q[TILE];
            for (int r = 0; r < n; r++) {
                q[r] = _mm512_permutexvar_ps(_mm512_srli_epi32(words[r], 4 * k), levels);
                q[r] = _mm512_mul_ps(q[r], scale[r]);
            }
            for (int t = 0; t < m; t++) {
                __m512 of = _mm512_loadu_ps(x + t * job->i + i + 16 * k);
                for (int r = 0; r < n; r++) sum[r * m + t] = _mm512_fmadd_ps(q[r], of, sum[r * m + t]);
            }
        }
    }
}

/* The same of a kind whose rows have one scale, which is left to the end. */
INLINE void dot_rows(enum Kind kind, const struct Few *job, long row, int n, const float *x, int m,
                     __m512 *sum) {
    for (long i = 0; i < job->i; i += 16) {
        __m512 q[TILE];
        for (int r = 0; r < n; r++) {
            const uint8_t *codes = job->w->codes + (row + r) * job->i + i;
            if (i % 64 == 0) _mm_prefetch(codes + n * job->i, _MM_HINT_T0);
            q[r] = sixteen(kind, codes, 0, _mm512_setzero_ps());
        }
        for (int t = 0; t < m; t++) {
            __m512 of = _mm512_loadu_ps(x + t * job->i + i);
            for (int r = 0; r < n; r++) sum[r * m + t] = _mm512_fmadd_ps(q[r], of, sum[r * m + t]);
        }
    }
}

INLINE void multiply(enum Kind kind, const struct Few *job, const float *scales, long row, int n,
                     long token, int m) {
    __m512 sum[TILE * TILE];
    for (int k = 0; k < n * m; k++) sum[k] = _mm512_setzero_ps();
    const float *x = job->x + token * job->i;
    if (kind == NF4)
        dot_nf4(job, scales, row, n, x, m, sum);
    else
        dot_rows(kind, job, row, n, x, m, sum);
    for (int r = 0; r < n; r++) {
        const __m512 scale = _mm512_set1_ps(kind == NF4 ? 1 : scales[r]);
        __m512 bias = _mm512_setzero_ps();
        if (job->bias) bias = get(job->bias, job->wide, row + r);
        for (int t = 0; t < m && token + t < job->tokens; t++) {
            __m512 y = _mm512_set1_ps(_mm512_reduce_add_ps(sum[r * m + t]));
            put(_mm512_fmadd_ps(y, scale, bias), job->wide, job->y, (token + t) * job->o + row + r, 1);
        }
    }
}

INLINE void multiply_rows(enum Kind kind, const struct Few *job, long row, int n) {
    const long blocks = kind == NF4 ? job->i / job->w->block : 1;
    float scales[n * blocks];
    read_scales(&job->w->scales, row * blocks, n * blocks, scales);
    for (long t = 0; t < job->tokens; t += TILE) switch (job->tokens - t) {
        case 1: multiply(kind, job, scales, row, n, t, 1); break;
        case 2: multiply(kind, job, scales, row, n, t, 2); break;
        default: multiply(kind, job, scales, row, n, t, TILE);
        }
}

INLINE void multiply_all(enum Kind kind, const struct Few *job, long piece) {
    long row = piece * job->at_once, end = at_most(row + job->at_once, job->o);
    for (; row + TILE <= end; row += TILE) multiply_rows(kind, job, row, TILE);
    for (; row < end; row++) multiply_rows(kind, job, row, 1);
}

static void multiply_piece(const void *arg, long piece) {
    const struct Few *job = arg;
    if (job->w->kind == NF4) multiply_all(NF4, job, piece);
    if (job->w->kind == INT8) multiply_all(INT8, job, piece);
    if (job->w->kind == FP8) multiply_all(FP8, job, piece);
}

static void lay_out(const struct Few *job, const void *x, float *to) {
    for (long t = 0; t < job->tokens; t++)
        for (long i = 0; i < job->i; i++) {
            long k = i % WORDS; /* of 8 in a word the first is the high half of its first byte */
            long at = job->w->kind == NF4 ? i - k + (k % 8 ^ 1) * 16 + k / 8 : i;
            float v;
            uint32_t bits = job->wide ? 0 : (uint32_t)((const uint16_t *)x)[t * job->i + i] << 16;
            memcpy(&v, job->wide ? (const void *)((const float *)x + t * job->i + i) : &bits, 4);
            to[t * job->i + at] = v;
        }
}

/* y (t, o) = x Wᵀ + bias for x (t, i), all in fp32 where `wide`, else in bf16; 0 if done. i is a
   multiple of 16, for NF4 of 128 and of the block, which is 64 at least. */
int few(const struct Weights *w, const void *x, const void *bias, void *y, long tokens, long i, long o,
        long wide, int threads) {
    float *laid = calloc(parts_of(tokens, TILE) * TILE * i, sizeof *laid);
    if (!laid) return 1;
    long at_once = i < PIECE / TILE ? PIECE / i / TILE * TILE : TILE;
    struct Few job = {w, laid, tokens, i, o, wide, at_once, bias, y};
    lay_out(&job, x, laid);
    share(multiply_piece, &job, parts_of(o, at_once), threads);
    free(laid);
    return 0;
}
