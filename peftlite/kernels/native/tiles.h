/* tiles.h: AMX, for which a thread says how large its tiles are. _GNU_SOURCE is to be defined. */

#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* to a compiler, what tiles read and write is no memory */
#define SETTLE() __asm__ volatile("" ::: "memory")

enum { SIDE = 16, STRIDE = 64 }; /* rows of a tile, which are 16 pairs or numbers; bytes of one */

struct Tiles {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* The kernel has to give leave for them, once a process; 0 where it does. */
int begin(void) { return syscall(SYS_arch_prctl, 0x1023, 18) != 0; }

/* All 8 as large as can be. What they were before is kept, for oneDNN. */
static void set_up(struct Tiles *before) {
    struct Tiles all = {.palette = 1};
    for (int i = 0; i < 8; i++) all.rows[i] = SIDE, all.bytes[i] = STRIDE;
    _tile_storeconfig(before);
    SETTLE();
    _tile_loadconfig(&all);
}

static void put_back(const struct Tiles *before) {
    SETTLE();
    if (before->palette)
        _tile_loadconfig(before);
    else
        _tile_release();
}
