/* single.c: the products of a LoRA beside a linear map in fp32, and a bank's, by AVX-512. */

typedef float Number;

#include "rows.h"

INLINE __m512 got(const Number *from) { return _mm512_loadu_ps(from); }
INLINE void set(Number *to, __m512 v) { _mm512_storeu_ps(to, v); }

#include "skinny.h"
