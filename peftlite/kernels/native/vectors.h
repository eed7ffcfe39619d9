/* vectors.h: what is counted, and vectors of 16 numbers. AVX-512 F. */

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

INLINE long at_most(long a, long b) { return a < b ? a : b; }
INLINE long parts_of(long whole, long part) { return (whole + part - 1) / part; }
INLINE __mmask16 first_of(long count) { return count < 16 ? (1 << count) - 1 : 0xffff; }

/* 0 to 15. */
INLINE __m512i lanes(void) {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/* From bf16. */
INLINE __m512 widened(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

/* To bf16, a tie to the even one. The instruction for it takes the smallest numbers for 0. */
INLINE __m256i rounded(__m512 v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q); /* what is none stays none */
    up = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fc00000), number, up);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
