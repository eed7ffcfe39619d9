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
