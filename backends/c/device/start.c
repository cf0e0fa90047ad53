/* Reset of a bare Cortex-M: vector table, FPU on, .data copied, .bss cleared, main called once.
 *
 * No libc is needed. The arena and the I/O buffers are never cleared: a model that reads what it
 * has not written is a defect that the emulator finds by filling them with garbage. */
#include <stdint.h>

extern uint32_t lrc_stack_top[], lrc_data_load[], lrc_data_start[], lrc_data_end[], lrc_bss_start[], lrc_bss_end[];
extern int main(void);
void Reset_Handler(void);
__attribute__((noinline, used)) void lrc_done(void);
void lrc_fault(void);

#define CPACR (*(volatile uint32_t *)0xE000ED88u)

/* Both stop here: the emulator ends the run at lrc_done, a debugger sees which of them it was. */
void lrc_done(void)
{
    for (;;) {
    }
}

void lrc_fault(void)
{
    for (;;) {
    }
}

void Reset_Handler(void)
{
    const uint32_t *from = lrc_data_load;
    uint32_t *to;

    CPACR |= 0xFu << 20; /* full access to coprocessors 10 and 11: the FPU */
    for (to = lrc_data_start; to < lrc_data_end; ++to, ++from) {
        *to = *from;
    }
    for (to = lrc_bss_start; to < lrc_bss_end; ++to) {
        *to = 0u;
    }
    (void)main();
    lrc_done();
}

typedef void (*Handler)(void);

extern const Handler lrc_vectors[];
const Handler lrc_vectors[16] = {
    (Handler)(uintptr_t)lrc_stack_top, /* initial stack pointer */
    Reset_Handler,
    lrc_fault, lrc_fault, lrc_fault, lrc_fault, lrc_fault, /* NMI, hard, memory, bus, usage */
    0, 0, 0, 0,
    lrc_fault, lrc_fault, 0, lrc_fault, lrc_fault, /* SVCall, debug, -, PendSV, SysTick */
};
