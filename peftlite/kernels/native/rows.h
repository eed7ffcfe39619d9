/* rows.h: rows of numbers with the mask of a dropout, factors in fp32, and vectors of AVX-512.
   What includes it says before what a `Number` is. */

#include "vectors.h"

typedef uint32_t Words[16][16];

/* Rows of numbers, of which dropout keeps what its mask has; see kernels/reference.py. */
struct Rows {
    void *at;
    const long *order; /* which rows they are, or NULL: all, from the first one on */
    long tokens, columns, stride;
    uint64_t seed;
    long threshold; /* in steps of 2⁻¹⁶; 0 is no dropout */
};

INLINE Number *row_of(const struct Rows *x, long row) {
    return (Number *)x->at + (x->order ? x->order[row] : row) * x->stride;
}

/* A matrix in fp32. */
struct Factor {
    float *at;
    long by_rank, by_other; /* how far apart its numbers are */
};

/* 16 numbers that are a stride apart, or as many as there are, and zeros. */
INLINE __m512 picked(const float *from, long stride, long count) {
    const __m512 zero = _mm512_setzero_ps();
    if (stride == 1) return _mm512_maskz_loadu_ps(first_of(count), from);
    __m512i at = _mm512_mullo_epi32(lanes(), _mm512_set1_epi32(stride));
    return _mm512_mask_i32gather_ps(zero, first_of(count), at, from, 4);
}

INLINE void put(float *to, long stride, __m512 v) {
    if (stride == 1)
        _mm512_storeu_ps(to, v);
    else
        _mm512_i32scatter_ps(to, _mm512_mullo_epi32(lanes(), _mm512_set1_epi32(stride)), v, 4);
}

/* 16 x 16 words, turned over. */
INLINE void turned(const Words from, Words to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(from[i]);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
            a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
        }
    for (int k = 0; k < 4; k++) {
        __m512i even = _mm512_shuffle_i32x4(a[k], a[k + 4], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(a[k], a[k + 4], 0xdd);
        __m512i high_even = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0x88);
        __m512i high_odd = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0xdd);
        _mm512_store_si512(to[k], _mm512_shuffle_i32x4(even, high_even, 0x88));
        _mm512_store_si512(to[k + 4], _mm512_shuffle_i32x4(odd, high_odd, 0x88));
        _mm512_store_si512(to[k + 8], _mm512_shuffle_i32x4(even, high_even, 0xdd));
        _mm512_store_si512(to[k + 12], _mm512_shuffle_i32x4(odd, high_odd, 0xdd));
    }
}

/* -- dropout: a word is hashed of the seed, the row and the pair of columns, whose mask it is */

static const uint32_t STEP = 0x9E3779B1, FIRST = 0x85EBCA6B, SECOND = 0xC2B2AE35;

INLINE uint32_t mixed(uint32_t word) {
    word *= FIRST;
    word = (word ^ word >> 13) * SECOND;
    return word ^ word >> 16;
}

INLINE __m512i mixed_16(__m512i word) {
    word = _mm512_mullo_epi32(word, _mm512_set1_epi32(FIRST));
    word = _mm512_xor_si512(word, _mm512_srli_epi32(word, 13));
    word = _mm512_mullo_epi32(word, _mm512_set1_epi32(SECOND));
    return _mm512_xor_si512(word, _mm512_srli_epi32(word, 16));
}

INLINE uint32_t of_row(const struct Rows *x, long row) {
    return mixed((uint32_t)row * STEP ^ x->seed);
}

INLINE __m512i of_pairs(const struct Rows *x, long column) {
    __m512i pair = _mm512_add_epi32(_mm512_set1_epi32(column / 2), lanes());
    pair = _mm512_mullo_epi32(pair, _mm512_set1_epi32(STEP));
    return mixed_16(_mm512_xor_si512(pair, _mm512_set1_epi32(x->seed >> 32)));
}

/* What is kept of 32 columns of a row. */
INLINE __mmask32 kept(const struct Rows *x, uint32_t row, __m512i pairs) {
    __m512i word = mixed_16(_mm512_xor_si512(_mm512_set1_epi32(row), pairs));
    return _mm512_cmpge_epi16_mask(word, _mm512_set1_epi16(x->threshold - 0x8000));
}
