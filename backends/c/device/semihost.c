/* A main for QEMU: inputs from files, one call, outputs and what it cost to files, all through semihosting.
 *
 * It is appended to a generated head that declares, for every port, {file name, buffer, bytes} in lrc_files, with
 * the LRC_INPUTS inputs first, and calls the model in lrc_call. */
#define SYS_OPEN 0x01
#define SYS_CLOSE 0x02
#define SYS_WRITE 0x05
#define SYS_READ 0x06
#define SYS_EXIT 0x18
#define STOPPED 0x20026

#define SYST_CSR (*(volatile uint32_t *)0xE000E010u)
#define SYST_RVR (*(volatile uint32_t *)0xE000E014u)
#define SYST_CVR (*(volatile uint32_t *)0xE000E018u)
#define PAINT 0xC5C5C5C5u

extern uint32_t lrc_stack_bottom[], lrc_stack_top[];

static uintptr_t host(uintptr_t operation, uintptr_t argument)
{
    register uintptr_t r0 __asm__("r0") = operation;
    register uintptr_t r1 __asm__("r1") = argument;

    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void transfer(const struct lrc_file *file, uintptr_t mode, uintptr_t operation)
{
    uintptr_t length = 0;
    uintptr_t open[3], block[3];

    while (file->name[length]) {
        ++length;
    }
    open[0] = (uintptr_t)file->name;
    open[1] = mode; /* 1: "rb", 5: "wb" */
    open[2] = length;
    block[0] = host(SYS_OPEN, (uintptr_t)open);
    block[1] = (uintptr_t)file->buffer;
    block[2] = file->bytes;
    (void)host(operation, (uintptr_t)block);
    (void)host(SYS_CLOSE, (uintptr_t)block);
}

int main(void)
{
    volatile uint32_t *here; /* the stack pointer: nothing interrupts, so what is below is free to paint */
    volatile uint32_t *word;
    uint32_t cost[2];
    struct lrc_file report;
    unsigned index;

    for (index = 0; index < LRC_INPUTS; ++index) {
        transfer(&lrc_files[index], 1, SYS_READ);
    }
    __asm__ volatile("mov %0, sp" : "=r"(here));
    for (word = lrc_stack_bottom; word < here; ++word) {
        *word = PAINT;
    }
    SYST_RVR = 0xFFFFFFu;
    SYST_CVR = 0;
    SYST_CSR = 5; /* processor clock, no interrupt */
    lrc_call();
    cost[0] = 0xFFFFFFu - SYST_CVR;
    for (word = lrc_stack_bottom; word < here && *word == PAINT; ++word) {
    }
    cost[1] = (uint32_t)((uintptr_t)here - (uintptr_t)word);
    for (; index < sizeof lrc_files / sizeof lrc_files[0]; ++index) {
        transfer(&lrc_files[index], 5, SYS_WRITE);
    }
    report.name = "cost.bin";
    report.buffer = cost;
    report.bytes = sizeof cost;
    transfer(&report, 5, SYS_WRITE);
    (void)host(SYS_EXIT, STOPPED);
    return 0;
}
