/* mask.c: dropout's zeros, in place or in a copy; the mask is the one of kernels/reference.py.

   Plain C, which compilers turn into vectors by themselves: first a row's words are hashed, each of the
   seed, the row and a pair of columns, then their halves decide. */

#include "share.h"
#include <stdint.h>

enum { PIECE = 32, CHUNK = 512 }; /* rows in a block of the job; pairs of columns at a time */

struct Rows {
    void *at;
    const void *from; /* of what; it may be the same */
    long rows, columns, first; /* the number of the first row */
    long bytes;                /* of an entry: 2 or 4 */
    uint64_t seed;
    long threshold; /* what is dropped, in steps of 2⁻¹⁶ */
};

static inline uint32_t mixed(uint32_t word) {
    word *= 0x85EBCA6B;
    word = (word ^ word >> 13) * 0xC2B2AE35;
    return word ^ word >> 16;
}

static inline uint32_t hashed(uint32_t number, uint32_t seed) { return mixed(number * 0x9E3779B1 ^ seed); }

static void drop_row(const struct Rows *x, long row, long column, long count, const uint32_t *pairs) {
    uint32_t words[CHUNK], of_row = hashed(x->first + row, x->seed);
    for (long i = 0; i < (count + 1) / 2; i++) words[i] = mixed(of_row ^ pairs[i]);
    const int16_t *halves = (const int16_t *)words, least = x->threshold - 0x8000;
    long at = row * x->columns + column;
    if (x->bytes == 2)
        for (long i = 0; i < count; i++)
            ((int16_t *)x->at)[at + i] = ((const int16_t *)x->from)[at + i] & -(halves[i] >= least);
    else
        for (long i = 0; i < count; i++)
            ((int32_t *)x->at)[at + i] = ((const int32_t *)x->from)[at + i] & -(halves[i] >= least);
}

static void drop_piece(const void *arg, long piece) {
    const struct Rows *x = arg;
    long last = (piece + 1) * PIECE < x->rows ? (piece + 1) * PIECE : x->rows;
    for (long column = 0; column < x->columns; column += 2 * CHUNK) {
        long count = x->columns - column < 2 * CHUNK ? x->columns - column : 2 * CHUNK;
        uint32_t pairs[CHUNK];
        for (long i = 0; i < (count + 1) / 2; i++) pairs[i] = hashed(column / 2 + i, x->seed >> 32);
        for (long row = piece * PIECE; row < last; row++) drop_row(x, row, column, count, pairs);
    }
}

/* Contiguous rows, with zeros where the mask has them. */
void drop(const struct Rows *x, int threads) {
    share(drop_piece, x, (x->rows + PIECE - 1) / PIECE, threads);
}
