/* packed.c: weights of four and eight bits, formed at the speed of a copy, or multiplied as they are.

   W = s q, where q is one of 16 levels (NF4), a whole number of 8 bits, or a float of 4 + 3 bits, and
   s is the scale of a block of weights that follow one another: NF4's block, or a whole row. Numbers
   are the same to the last bit as those of quant/nf4.py and quant/rows.py: one product in fp32, which
   is rounded once. AVX-512 F, BW and VL. */

#include "share.h"
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum Kind { NF4, INT8, FP8 };

/* The scales of blocks: numbers, or 8-bit codes of numbers with scales and an offset of their own. */
struct Scales {
    const float *absmax;  /* where they are numbers */
    const uint8_t *codes; /* where they are codes */
    const float *map;     /* 256 */
    const float *nested;  /* one for 256 codes */
    const float *offset;
};

struct Weights {
    long kind;
    const uint8_t *codes;
    const float *levels; /* 16, of NF4 */
    struct Scales scales;
    long numbers, block;
};

static const long PIECE = 1 << 15; /* weights in a block of a job, at least */

static void read_scales(const struct Scales *from, long first, long count, float *restrict to) {
    if (from->absmax) {
        memcpy(to, from->absmax + first, count * sizeof *to);
        return;
    }
    const float offset = *from->offset;
    for (long i = first; i < first + count; i++)
        to[i - first] = from->map[from->codes[i]] * from->nested[i / 256] + offset;
}

/* 16 codes from number i on, in fp32. */
INLINE __m512 sixteen(enum Kind kind, const uint8_t *codes, long i, __m512 levels) {
    if (kind == NF4) {
        const __m128i low = _mm_set1_epi8(15);
        __m128i pairs = _mm_loadl_epi64((const __m128i *)(codes + i / 2));
        __m128i first = _mm_and_si128(_mm_srli_epi16(pairs, 4), low); /* the high one */
        __m128i each = _mm_unpacklo_epi8(first, _mm_and_si128(pairs, low));
        return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(each), levels);
    }
    __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i));
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    __m512i wide = _mm512_cvtepu8_epi32(bytes);
    __m512i sign = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x80)), 24);
    __m512i rest = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x7f)), 20);
    /* from an exponent's bias of 127 to one of 7 */
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(sign, rest)), _mm512_set1_ps(0x1p120f));
}

/* The same where fewer than 16 are left to read. */
static __m512 fewer(enum Kind kind, const uint8_t *codes, long i, long count, __m512 levels) {
    uint8_t left[16] = {0};
    memcpy(left, codes + (kind == NF4 ? i / 2 : i), kind == NF4 ? (count + 1) / 2 : count);
    return sixteen(kind, left, 0, levels);
}

/* To bf16, a tie to the even one. The instruction for it takes the smallest numbers for 0. */
INLINE __m256i rounded(__m512 v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

INLINE void put(__m512 v, long wide, void *out, long i, __mmask16 which) {
    if (wide)
        _mm512_mask_storeu_ps((float *)out + i, which, v);
    else
        _mm256_mask_storeu_epi16((uint16_t *)out + i, which, rounded(v));
}

INLINE __m512 get(const void *from, long wide, long i) {
    if (wide) return _mm512_set1_ps(((const float *)from)[i]);
    uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
}

INLINE __mmask16 first_of(long count) { return count < 16 ? (1 << count) - 1 : 0xffff; }

struct Form {
    const struct Weights *w;
    long wide, at_once; /* blocks of weights in a block of the job */
    void *out;
};

INLINE void form(enum Kind kind, const struct Form *job, long piece) {
    const struct Weights *w = job->w;
    const __m512 levels = kind == NF4 ? _mm512_loadu_ps(w->levels) : _mm512_setzero_ps();
    long stop = (piece + 1) * job->at_once;
    for (long b = piece * job->at_once; b < stop && b * w->block < w->numbers; b++) {
        float scale;
        read_scales(&w->scales, b, 1, &scale);
        const __m512 s = _mm512_set1_ps(scale);
        long i = b * w->block, end = i + w->block < w->numbers ? i + w->block : w->numbers;
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
    long at_once = w->block < PIECE ? PIECE / w->block : 1;
    struct Form job = {w, wide, at_once, out};
    share(form_piece, &job, (w->numbers + w->block * at_once - 1) / (w->block * at_once), threads);
}

/* The product with a few rows of x, before which W isn't formed.

   NF4 is read 128 weights at a time, as 16 words of 8 codes: a shift brings one of each word to where
   a permutation of the levels looks for it. So x is laid out in that order first. */

enum { WORDS = 128, MOST = 8 }; /* weights in 16 words; rows of x, and sums in registers */

struct Few {
    const struct Weights *w;
    const float *x;
    long tokens, rows; /* of x; and with rows of 0, to be 1, 2, 4 or 8 */
    long i, o, wide, at_once; /* rows of W in a block of the job */
    const void *bias;
    void *y;
};

/* Sums of products of n rows of W, with m of x; each in 16 parts that are yet to be added up. */
INLINE void dot_nf4(const struct Few *job, const float *scales, long row, int n, int m, __m512 *sum) {
    const struct Weights *w = job->w;
    const __m512 levels = _mm512_loadu_ps(w->levels);
    const long shift = __builtin_ctzl(w->block), blocks = job->i >> shift;
    for (long i = 0; i < job->i; i += WORDS) {
        __m512i words[MOST];
        __m512 part[MOST];
        for (int r = 0; r < n; r++)
            words[r] = _mm512_loadu_si512(w->codes + (row + r) * (job->i / 2) + i / 2);
        for (int k = 0; k < n * m; k++) part[k] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++)
            for (int r = 0; r < n; r++) {
                __m512 q = _mm512_permutexvar_ps(_mm512_srli_epi32(words[r], 4 * k), levels);
                for (int t = 0; t < m; t++) {
                    __m512 x = _mm512_loadu_ps(job->x + t * job->i + i + 16 * k);
                    part[r * m + t] = _mm512_fmadd_ps(q, x, part[r * m + t]);
                }
            }
        for (int r = 0; r < n; r++) {
            const float *of = scales + r * blocks;
            __m512 s = _mm512_set1_ps(of[i >> shift]);
            s = _mm512_mask_broadcastss_ps(s, 0xff00, _mm_set_ss(of[i + 64 >> shift]));
            for (int t = 0; t < m; t++)
                sum[r * m + t] = _mm512_fmadd_ps(part[r * m + t], s, sum[r * m + t]);
        }
    }
}

INLINE void dot_rows(enum Kind kind, const struct Few *job, long row, int n, int m, __m512 *sum) {
    for (long i = 0; i < job->i; i += 16)
        for (int r = 0; r < n; r++) {
            __m512 q = sixteen(kind, job->w->codes, (row + r) * job->i + i, _mm512_setzero_ps());
            for (int t = 0; t < m; t++) {
                __m512 x = _mm512_loadu_ps(job->x + t * job->i + i);
                sum[r * m + t] = _mm512_fmadd_ps(q, x, sum[r * m + t]);
            }
        }
}

INLINE void multiply(enum Kind kind, const struct Few *job, long row, int n, int m) {
    const long blocks = kind == NF4 ? job->i / job->w->block : 1;
    float scales[n * blocks];
    __m512 sum[MOST];
    for (int k = 0; k < n * m; k++) sum[k] = _mm512_setzero_ps();
    read_scales(&job->w->scales, row * blocks, n * blocks, scales);
    if (kind == NF4)
        dot_nf4(job, scales, row, n, m, sum);
    else
        dot_rows(kind, job, row, n, m, sum);
    for (int r = 0; r < n; r++) {
        const __m512 scale = _mm512_set1_ps(kind == NF4 ? 1 : scales[r]);
        __m512 bias = _mm512_setzero_ps();
        if (job->bias) bias = get(job->bias, job->wide, row + r);
        for (int t = 0; t < m && t < job->tokens; t++) {
            __m512 y = _mm512_set1_ps(_mm512_reduce_add_ps(sum[r * m + t]));
            put(_mm512_fmadd_ps(y, scale, bias), job->wide, job->y, t * job->o + row + r, 1);
        }
    }
}

INLINE void multiply_all(enum Kind kind, const struct Few *job, long row, long end, int n, int m) {
    for (; row + n <= end; row += n) multiply(kind, job, row, n, m);
    for (; row < end; row++) multiply(kind, job, row, 1, m);
}

INLINE void multiply_kind(enum Kind kind, const struct Few *job, long row, long end) {
    switch (job->rows) {
    case 1: multiply_all(kind, job, row, end, 4, 1); break;
    case 2: multiply_all(kind, job, row, end, 4, 2); break;
    case 4: multiply_all(kind, job, row, end, 2, 4); break;
    case 8: multiply_all(kind, job, row, end, 1, 8); break;
    }
}

static void multiply_piece(const void *arg, long piece) {
    const struct Few *job = arg;
    long row = piece * job->at_once, end = row + job->at_once < job->o ? row + job->at_once : job->o;
    if (job->w->kind == NF4) multiply_kind(NF4, job, row, end);
    if (job->w->kind == INT8) multiply_kind(INT8, job, row, end);
    if (job->w->kind == FP8) multiply_kind(FP8, job, row, end);
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

/* y (t, o) = x Wᵀ + bias for x (t, i), all in fp32 where `wide`, else in bf16; 0 if done. At most 8
   rows; i is a multiple of 16, for NF4 of 128 and of the block, which is 64 at least. */
int few(const struct Weights *w, const void *x, const void *bias, void *y, long tokens, long i, long o,
        long wide, int threads) {
    long rows = tokens < 3 ? tokens : tokens < 5 ? 4 : MOST;
    float *laid = calloc(rows * i, sizeof *laid);
    if (!laid) return 1;
    long at_once = i < PIECE / 4 ? PIECE / i : 4;
    struct Few job = {w, laid, tokens, rows, i, o, wide, at_once, bias, y};
    lay_out(&job, x, laid);
    share(multiply_piece, &job, (o + at_once - 1) / at_once, threads);
    free(laid);
    return 0;
}
