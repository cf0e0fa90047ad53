/* The emulator's basic-block hook, compiled for the host: a Python hook would be a hundred times slower. */
#include <stdint.h>

typedef struct {
    uint32_t base;       /* address of the first byte of code */
    uint32_t bytes;      /* of code */
    const uint16_t *code; /* a copy of it */
    uint32_t *size;      /* by halfword address: bytes of the block that starts here, when seen last */
    uint32_t *length;    /* its instructions */
    uint64_t *executed;  /* instructions executed by blocks that start here */
    uint64_t elsewhere;  /* blocks outside the code: none in a sound run */
} Counter;

/* Thumb: 0b11101, 0b11110 and 0b11111 open an instruction of two halfwords. */
static uint32_t instructions(const uint16_t *code, uint32_t bytes)
{
    uint32_t count = 0;
    uint32_t at;

    for (at = 0; at < bytes / 2; at += (code[at] >> 11) >= 0x1D ? 2 : 1) {
        ++count;
    }
    return count;
}

void lrc_on_block(void *engine, uint64_t address, uint32_t size, void *data)
{
    Counter *counter = data;
    uint32_t at = (uint32_t)address - counter->base;

    (void)engine;
    if (at >= counter->bytes || size > counter->bytes - at) {
        ++counter->elsewhere;
        return;
    }
    if (counter->size[at / 2] != size) {
        counter->size[at / 2] = size;
        counter->length[at / 2] = instructions(counter->code + at / 2, size);
    }
    counter->executed[at / 2] += counter->length[at / 2];
}
