/* half.c: the products of a LoRA beside a linear map in bf16, and a bank's, with factors in fp32, by AVX-512. */

#include <stdint.h>

typedef uint16_t Number; /* in bf16 */

#include "rows.h"

INLINE __m512 got(const Number *from) { return widened(_mm256_loadu_si256((const __m256i *)from)); }
INLINE void set(Number *to, __m512 v) { _mm256_storeu_si256((__m256i *)to, rounded(v)); }

#include "skinny.h"
