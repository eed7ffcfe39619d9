/* packed.h: codes of four and eight bits, their scales, and the numbers that they are. */

#include "vectors.h"
#include <string.h>

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

static void read_scales(const struct Scales *from, long first, long count, float *restrict to) {
    if (from->absmax) {
        memcpy(to, from->absmax + first, count * sizeof *to);
        return;
    }
    const __m512 offset = _mm512_set1_ps(*from->offset);
    for (long i = first; i < first + count; i += 16) {
        const __mmask16 which = first_of(first + count - i);
        __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(which, from->codes + i));
        __m512i of = _mm512_srli_epi32(_mm512_add_epi32(_mm512_set1_epi32(i % 256), lanes()), 8);
        __m512 nested = _mm512_mask_i32gather_ps(offset, which, of, from->nested + i / 256, 4);
        __m512 scale = _mm512_mul_ps(_mm512_i32gather_ps(codes, from->map, 4), nested);
        _mm512_mask_storeu_ps(to + i - first, which, _mm512_add_ps(scale, offset));
    }
}

/* 16 codes from number i on, in fp32. */
INLINE __m512 sixteen(enum Kind kind, const uint8_t *codes, long i, __m512 levels) {
    if (kind == NF4) {
        const __m128i low = _mm_set1_epi8(15);
        __m128i pairs = _mm_loadl_epi64((const __m128i *)(codes + i / 2));
        __m128i first = _mm_and_si128(_mm_srli_epi16(pairs, 4), low); /* the high one */
        __m128i index = _mm_unpacklo_epi8(first, _mm_and_si128(pairs, low));
        return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index), levels);
    }
    __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i));
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    __m512i wide = _mm512_cvtepu8_epi32(bytes);
    __m512i sign = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x80)), 24);
    __m512i rest = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x7f)), 20);
    /* from an exponent's bias of 127 to one of 7 */
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(sign, rest)), _mm512_set1_ps(0x1p120f));
}

/* 32 numbers of 16 bytes of NF4, from a table of its 16 in bf16 that is there twice. */
INLINE __m512i of_pairs(__m128i bytes, __m512i twice) {
    __m512i byte = _mm512_cvtepu8_epi32(bytes);
    /* the high code, then the low one; of the 16 bits of an index, all but five are for nothing */
    __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    return _mm512_permutexvar_epi16(index, twice);
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
